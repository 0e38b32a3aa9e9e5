"""What ranks tell the coordinator becomes an index where that is possible, and plain metadata where it is not."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from azure_torch_ckpt import IncompleteSaveError, TransferOptions, UnsafeMetadataError
from azure_torch_ckpt.dcp.metadata.columns import Chunks, entries_of
from azure_torch_ckpt.dcp.metadata.front import open_metadata, read_front
from azure_torch_ckpt.dcp.metadata.schema import dump_metadata, load_metadata
from azure_torch_ckpt.dcp.metadata.views import ColumnMetadata, StoredItems, whole_tensors
from azure_torch_ckpt.dcp.written_items import UploadedItem, WrittenItems, join_results
from tests.dcp.metadata.pickles import WHERE
from tests.dcp.metadata.virtual_saves import (
    VirtualSave,
    assert_same_metadata,
    plain,
    rows,
    save_of,
    saves,
    tensor_entry,
    write_item,
    written,
)
from tests.support.columns import in_columns
from tests.support.containers import blob_names, contents, download
from tests.support.sharded import ShardPlanner
from tests.support.states import Place, assert_same, fill

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

Entries = dict[str, Any]


@pytest.fixture(autouse=True)
def few_items_in_columns() -> Iterator[None]:
    with in_columns():
        yield


# What is sent


def test_the_results_of_a_rank_of_a_thousand_are_small() -> None:
    """Llama 3 70B with two moments for each parameter: a rank of 1,024 sends 2,169 items."""
    entry = rows((8192, 8192), 1024)
    entries = {f"model.layers.{number % 80}.{number // 80}.weight": entry for number in range(2169)}
    sent = []
    for rank in (0, 500, 1023):
        items, end = [], 0
        for name, entry in entries.items():
            nbytes = math.prod(entry.chunks[rank].sizes) * 4
            items.append(
                UploadedItem(write_item(name, entry, rank), end, nbytes + 900, 320, (rank + end) * 7**20 % 2**64)
            )
            end += nbytes + 900
        sent.append(pickle.dumps(WrittenItems(f"save-id/__{rank}_0.distcp", items)))
    assert all(len(data) < 25_000 for data in sent)


@given(saves())
@settings(max_examples=50)
def test_results_as_torch_has_them(save: VirtualSave) -> None:
    sent = [pickle.loads(pickle.dumps(result)) for result in save.results]
    storage = {index: info for result in sent for index, info in result.storage_data().items()}
    assert_same_metadata(Metadata({}, storage_data=storage), Metadata({}, storage_data=save.made.storage_data))
    for of_rank, result in zip(sent, save.results, strict=True):
        assert (of_rank.blob, len(of_rank), of_rank.nbytes) == (result.blob, len(result), result.nbytes)
        assert of_rank.storage_data().keys() == result.storage_data().keys()
    # And so plain metadata can be made of them.
    old = load_metadata(dump_metadata(copy.copy(save.made), WHERE), WHERE)
    assert_same_metadata(old, save.made)


def test_metadata_is_small() -> None:
    """With the index, sections and all that torch reads."""
    names = [f"model.layers.{number // 6}.part{number % 6}.weight" for number in range(500)]
    save = save_of({name: rows((1024, 64), 64, torch.bfloat16) for name in names}, 64)
    assert len(save.dump()) < 150 * 64 * 500


# What is put together


def two_tensors() -> Entries:
    return {
        "w": rows((6, 2), 3),
        "b": tensor_entry((4,), [((0,), (4,))]),
        "s": tensor_entry((), [((), ())]),
        "o": BytesStorageMetadata(),
    }


def uploaded(entries: Entries) -> list[list[UploadedItem]]:
    """What three ranks write: each its rows of "w", and the first one all others."""
    items = [[UploadedItem(write_item("w", entries["w"], rank), 0, 16, 0, rank)] for rank in range(3)]
    for number, name in enumerate(("b", "s", "o")):
        items[0].append(
            UploadedItem(write_item(name, entries[name]), 16 * number + 16, 16, None if name == "o" else 0, 1)
        )
    return items


def joined(entries: Entries, items: list[list[UploadedItem]]) -> bool:
    """Whether the results were put together in columns."""
    planned = entries_of(Metadata(entries))
    assert planned is not None
    results = [written(f"save-id/__{rank}_0.distcp", of_rank)[0] for rank, of_rank in enumerate(items)]
    return join_results(planned, [result.packed() for result in results if len(result)]) is not None


def indexed(item: UploadedItem, *index: Any) -> None:
    item.planned = dataclasses.replace(item.planned, index=MetadataIndex(*index))


Items = list[list[UploadedItem]]
NOT_AS_PLANNED: dict[str, Callable[[Items], object]] = {
    "an item is missing": lambda items: items[1].pop(),
    "an object is missing": lambda items: items[0].pop(),
    "an item twice": lambda items: items[1].append(items[1][0]),
    "one item in the place of another": lambda items: items.__setitem__(1, items[2]),
    "an item that was not planned": lambda items: indexed(items[0][1], "x", (0,), 0),
    "an item more": lambda items: items[2].append(
        UploadedItem(WriteItem(MetadataIndex("x"), WriteItemType.BYTE_IO), 16, 9, None, 1)
    ),
    "no hint": lambda items: indexed(items[1][0], "w", (2, 0)),
    "the hint of another chunk": lambda items: indexed(items[1][0], "w", (2, 0), 0),
    "a hint out of range": lambda items: indexed(items[1][0], "w", (2, 0), 3),
    "other offsets": lambda items: indexed(items[1][0], "w", (0, 2), 1),
    "offsets of another dimension": lambda items: indexed(items[1][0], "w", (2,), 1),
    "a tensor without offsets": lambda items: indexed(items[0][1], "b"),
    "a scalar without offsets": lambda items: indexed(items[0][2], "s"),
    "a tensor with one dimension more": lambda items: indexed(items[0][1], "b", (0, 0), 0),
    "an object with offsets": lambda items: indexed(items[0][3], "o", ()),
    "nothing at all": lambda items: items.clear(),
}


@pytest.mark.parametrize("change", NOT_AS_PLANNED.values(), ids=NOT_AS_PLANNED)
def test_results_that_are_not_what_was_planned(change: Callable[[Items], object]) -> None:
    items = uploaded(two_tensors())
    assert joined(two_tensors(), items)
    change(items)
    assert not joined(two_tensors(), items)


@pytest.mark.parametrize("hint", [None, 5])
def test_hints_of_whole_tensors_do_not_matter(hint: int | None) -> None:
    """A planner sets none where torch's does."""
    items = uploaded(two_tensors())
    indexed(items[0][1], "b", (0,), hint)
    assert joined(two_tensors(), items)


class Properties(TensorProperties):
    """Of a user."""


def with_properties(**values: Any) -> Callable[[Any], None]:
    return lambda entry: vars(entry.properties).update(values)


class Tensor(TensorStorageMetadata):
    pass


NOT_PLAIN: dict[str, Callable[[Any], object]] = {
    "properties of a subclass": lambda entry: setattr(entry, "properties", Properties(dtype=torch.float32)),
    "another attribute of properties": with_properties(mine=1),
    "a missing attribute of properties": lambda entry: vars(entry.properties).pop("layout"),
    "requires_grad a number": with_properties(requires_grad=1),
    "a dtype by name": with_properties(dtype="float32"),
    "chunks in a tuple": lambda entry: setattr(entry, "chunks", tuple(entry.chunks)),
    "no chunks": lambda entry: entry.chunks.clear(),
    "a chunk that is a list": lambda entry: entry.chunks.append([(0, 0), (1, 1)]),
    "a chunk with another attribute": lambda entry: setattr(entry.chunks[0], "mine", 1),
    "offsets in a tuple": lambda entry: setattr(entry.chunks[0], "offsets", (0, 0)),
    "offsets of another dimension": lambda entry: setattr(entry.chunks[0], "offsets", torch.Size([0])),
    "a size in a list": lambda entry: setattr(entry, "size", list(entry.size)),
    "another attribute": lambda entry: setattr(entry, "mine", 1),
    "a chunk outside": lambda entry: setattr(entry.chunks[2], "offsets", torch.Size([5, 0])),
    "a chunk before the beginning": lambda entry: setattr(entry.chunks[0], "offsets", torch.Size([-1, 0])),
    "a negative size": lambda entry: setattr(entry.chunks[0], "sizes", torch.Size([-1, 2])),
    "more than there can be": lambda entry: setattr(entry, "size", torch.Size([1 << 40, 1 << 40])),
}


@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_plans_that_columns_cannot_hold(change: Callable[[Any], object]) -> None:
    entries = two_tensors()
    assert entries_of(Metadata(entries)) is not None
    change(entries["w"])
    assert entries_of(Metadata(entries)) is None


def test_entries_that_columns_cannot_hold() -> None:
    entries = two_tensors()
    of_subclass = Tensor(**vars(entries["w"]))
    more = BytesStorageMetadata()
    more.mine = 1  # type: ignore[attr-defined]
    others: list[Any] = [of_subclass, more, None, "w"]
    for entry in others:
        assert entries_of(Metadata({**entries, "w": entry})) is None
    assert entries_of(Metadata({**entries, 7: entries["w"]})) is None  # type: ignore[dict-item]
    assert entries_of(Metadata(OrderedDict(entries))) is None


# In a save


class CutPlanner(dcp.DefaultSavePlanner):
    """Cuts every tensor into three chunks of rows, as three ranks would, and plans and writes what a test says."""

    def __init__(self, planned: Callable[[Any], object] = id, chosen: Callable[[Any], object] = id) -> None:
        super().__init__()
        self.planned = planned
        self.chosen = chosen

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                items.append(item)
                continue
            for chunk in rows(data.size, 3).chunks:
                index = MetadataIndex(item.index.fqn, chunk.offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=dataclasses.replace(data, chunk=chunk)))
        return dataclasses.replace(plan, items=items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        changed = self.planned(metadata)
        self.metadata = changed if isinstance(changed, Metadata) else metadata
        return plans, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.chosen(new_plan.items)
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Any:
        data = super().resolve_data(dataclasses.replace(write_item, index=MetadataIndex(write_item.index.fqn)))
        if write_item.tensor_data is not None and isinstance(data, torch.Tensor):
            chunk = write_item.tensor_data.chunk
            return data[chunk.offsets[0] :][: chunk.sizes[0]]
        return data


def state_of(version: int = 0) -> dict[str, Any]:
    return {
        "a": fill(torch.empty(7, 5), seed=version),
        "b.1": fill(torch.empty(3, 2, dtype=torch.bfloat16), seed=version + 1),
        "o": f"version {version}",
    }


def has_index(place: Place) -> bool:
    return read_front(contents(place.url)[".metadata"], WHERE) is not None


def assert_loads(place: Place, folder: Path, version: int = 0) -> None:
    """With our reader in whole and in part, and with torch's."""
    for reader in (place.reader(), dcp.FileSystemReader(download(place.url, folder))):
        state: dict[str, Any] = {"a": torch.zeros(7, 5), "b.1": torch.zeros(3, 2, dtype=torch.bfloat16), "o": ""}
        dcp.load(state, storage_reader=reader)
        assert state["o"] == state_of(version)["o"]
        for name in ("a", "b.1"):
            assert_same(state[name], state_of(version)[name], name)
    part = {"a": torch.zeros(4, 2)}
    place.load(part, planner=ShardPlanner({"a": (2, 3)}))
    assert_same(part["a"], state_of(version)["a"][2:6, 3:5])


def without_hints(items: list[Any]) -> None:
    items[:] = [dataclasses.replace(item, index=MetadataIndex(item.index.fqn, item.index.offset)) for item in items]


class Extended(Metadata):
    """Of a user."""


def extended(metadata: Metadata) -> Metadata:
    return Extended(**vars(metadata))


def ordered(metadata: Metadata) -> Metadata:
    return dataclasses.replace(metadata, state_dict_metadata=OrderedDict(metadata.state_dict_metadata))


def with_own_properties(metadata: Any) -> None:
    metadata.state_dict_metadata["a"].properties = Properties(torch.float32)


PLANNERS: dict[str, tuple[CutPlanner, bool]] = {
    "as planned": (CutPlanner(), True),
    "in another order": (CutPlanner(chosen=lambda items: items.reverse()), True),
    "with an attribute": (CutPlanner(planned=lambda metadata: setattr(metadata, "mine", [1, {"a": (2,)}])), True),
    "metadata of a subclass": (CutPlanner(planned=extended), True),
    "without hints": (CutPlanner(chosen=without_hints), False),
    "an item twice": (CutPlanner(chosen=lambda items: items.append(items[0])), False),
    "properties of a subclass": (
        CutPlanner(planned=with_own_properties),
        False,
    ),
    "entries in an OrderedDict": (CutPlanner(planned=ordered), False),
}  # fmt: skip


@pytest.mark.parametrize(("planner", "in_columns"), PLANNERS.values(), ids=PLANNERS)
def test_every_plan_is_saved(place: Place, tmp_path: Path, planner: CutPlanner, in_columns: bool) -> None:
    place.save({"old": torch.ones(3)})  # and replaced
    returned = dcp.save(state_of(), storage_writer=place.writer(), planner=planner)
    assert has_index(place) == in_columns
    data = contents(place.url)[".metadata"]
    assert len(blob_names(place.url)) == 2
    assert isinstance(returned.storage_data, StoredItems) == in_columns
    stored = pickle.loads(data)
    assert_same_metadata(returned, stored)
    assert_same_metadata(pickle.loads(pickle.dumps(returned)), stored)
    assert_same_metadata(copy.deepcopy(returned), stored)
    assert_same_metadata(copy.copy(returned), stored)
    assert_loads(place, tmp_path)


def test_a_save_without_checksums(place: Place, tmp_path: Path) -> None:
    writer = place.writer(TransferOptions(checksums=False))
    returned = dcp.save(state_of(), storage_writer=writer, planner=CutPlanner())
    assert has_index(place)
    assert not any(hasattr(info, "crc64") for info in returned.storage_data.values())
    assert_loads(place, tmp_path)


def test_items_that_only_torch_can_read(place: Place, tmp_path: Path) -> None:
    """A planner that saves another dtype than it planned: no item has a payload offset."""

    class Widening(CutPlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            data = super().resolve_data(write_item)
            return data.double() if isinstance(data, torch.Tensor) else data

    returned = dcp.save(state_of(), storage_writer=place.writer(), planner=Widening())
    assert has_index(place)
    assert not any(hasattr(info, "payload_offset") for info in returned.storage_data.values())
    state: dict[str, Any] = {"a": torch.zeros(7, 5), "b.1": torch.zeros(3, 2, dtype=torch.bfloat16), "o": ""}
    place.load(state)
    for name in ("a", "b.1"):
        assert_same(state[name], state_of()[name].double().to(state[name].dtype), name)


@pytest.mark.parametrize(
    ("chosen", "name"), [(lambda items: items.pop(), "o"), (lambda items: items.pop(1), "a")], ids=["object", "chunk"]
)
def test_a_save_that_is_not_complete(place: Place, chosen: Callable[[Any], object], name: str) -> None:
    place.save({"old": torch.ones(3)})
    stood = blob_names(place.url)
    with pytest.raises(CheckpointException) as raised:
        dcp.save(state_of(), storage_writer=place.writer(), planner=CutPlanner(chosen=chosen))
    error = raised.value.failures[0][0]
    assert isinstance(error, IncompleteSaveError) and f"1 of the planned items were not written ({name!r}" in str(error)
    assert blob_names(place.url) == stood


def outside(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].size = torch.Size([6, 5])  # type: ignore[union-attr]


def in_tuple(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].chunks = tuple(metadata.state_dict_metadata["a"].chunks)  # type: ignore


def not_pickled(metadata: Metadata) -> None:
    metadata.mine = lambda: 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("planned", "name"), [(outside, ""), (in_tuple, ""), (not_pickled, "'mine'")])
def test_metadata_that_no_load_would_accept(place: Place, planned: Callable[[Any], object], name: str) -> None:
    place.save({"old": torch.ones(3)})
    stood = blob_names(place.url)
    with pytest.raises(CheckpointException) as raised:
        dcp.save(state_of(), storage_writer=place.writer(), planner=CutPlanner(planned=planned))
    error = raised.value.failures[0][0]
    assert isinstance(error, UnsafeMetadataError)
    assert "could not be loaded again" in str(error) and name in str(error)
    assert blob_names(place.url) == stood


# What torch hands back


def test_the_views_are_what_they_stand_for() -> None:
    save = save_of(two_tensors(), 3)
    data = save.dump()
    metadata, wanted = open_metadata(data, WHERE), plain(data)
    chunks: Any
    as_list: Any
    chunks, as_list = (vars(one.state_dict_metadata["w"])["chunks"] for one in (metadata, wanted))
    assert isinstance(chunks, Chunks)
    assert chunks == as_list and as_list == chunks and chunks == chunks[:] and chunks != as_list[1:]
    assert (len(chunks), chunks[-1], chunks[1:], repr(chunks)) == (3, as_list[-1], as_list[1:], repr(as_list))
    assert list(reversed(chunks)) == as_list[::-1] and as_list[1] in chunks and chunks.index(as_list[2]) == 2
    copies: list[object] = [pickle.loads(pickle.dumps(chunks)), copy.deepcopy(chunks)]
    assert list(map(type, copies)) == [list, list]
    with pytest.raises(IndexError):
        chunks[3]
    stored = metadata.storage_data
    assert stored == wanted.storage_data and wanted.storage_data == stored and len(stored) == 6
    assert list(stored) == [
        MetadataIndex(name, offset)
        for name, offset in [("w", (0, 0)), ("w", (2, 0)), ("w", (4, 0)), ("b", (0,)), ("s", ()), ("o", None)]
    ]
    for key, info in wanted.storage_data.items():
        for hint in (None, 0, 1, 2, 99, -1):
            assert stored[MetadataIndex(key.fqn, key.offset, hint)] == info
    for key in (
        MetadataIndex("x"),
        MetadataIndex("w"),
        MetadataIndex("o", ()),
        MetadataIndex("w", (1, 0)),
        MetadataIndex("w", (0,)),
    ):
        assert key not in stored and stored.get(key) is None
        with pytest.raises(KeyError):
            stored[key]
    assert "w" not in stored
    assert type(pickle.loads(pickle.dumps(stored))) is dict and copy.deepcopy(stored) == wanted.storage_data
    assert type(pickle.loads(pickle.dumps(metadata))) is ColumnMetadata
    assert len(pickle.dumps(metadata)) < len(data)


def test_metadata_that_was_changed_is_pickled_as_it_is() -> None:
    """Not as what it was made of; and with all chunks, where it shows none to torch's planner of loads."""
    save = save_of(two_tensors(), 3)
    changes: list[Callable[[Any], object]] = [
        lambda entries: entries.pop("b"),
        lambda entries: entries.update(x=BytesStorageMetadata()),
        lambda entries: setattr(entries["b"], "size", torch.Size([5])),
        lambda entries: entries.update(o=tensor_entry((), [((), ())])),
    ]
    for change in changes:
        for view in (whole_tensors, copy.copy):
            opened: Any = open_metadata(save.dump(), WHERE)
            metadata = view(opened)
            assert type(pickle.loads(pickle.dumps(metadata))) is ColumnMetadata
            change(metadata.state_dict_metadata)
            wanted = plain(save.dump())
            change(wanted.state_dict_metadata)
            data = pickle.dumps(metadata)
            assert b"azure" not in data
            assert_same_metadata(plain(data), wanted)


def test_another_writer_pickles_metadata_of_columns_as_torchs_own() -> None:
    """What a planner keeps for its next save, which is with another writer."""
    save = save_of(two_tensors(), 3)
    metadata = open_metadata(save.dump(), WHERE)
    metadata.storage_data = dict(save.made.storage_data)
    data = pickle.dumps(metadata)
    assert b"azure" not in data
    assert_same_metadata(plain(data), save.made)
    assert_same_metadata(load_metadata(data, WHERE), save.made)
