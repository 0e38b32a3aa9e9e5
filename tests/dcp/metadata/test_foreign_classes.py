"""What planners and trainers add to the metadata: it is saved and read past, or refused by name before the commit."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import os
import pickle
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, UnsafeMetadataError, catalog, verify
from azure_torch_ckpt._internal.torch_private import StorageInfo
from azure_torch_ckpt.dcp.metadata.schema import check_metadata, dump_metadata, load_metadata
from azure_torch_ckpt.errors import (
    CheckpointError,
    UnsupportedCheckpointError,
)
from tests.dcp.metadata.pickles import WHERE, small_metadata, states_set_one_by_one
from tests.support.containers import KEY

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

Change = Callable[[Metadata, list[SavePlan]], Any]


# A trainer's own classes. Readers of its checkpoints do not have them.


@dataclasses.dataclass
class TrainerMetadata(Metadata):
    """As Megatron-LM's MCoreMetadata."""

    mcore_data: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class TrainerPlan(SavePlan):
    mcore_data: dict[str, Any] | None = None


class TrainerTensor(TensorStorageMetadata):
    pass


class TrainerChunk(ChunkStorageMetadata):
    pass


class TrainerProperties(TensorProperties):
    pass


class TrainerIndex(MetadataIndex):
    pass


class TrainerInfo(StorageInfo):
    pass


class TrainerBytes(BytesStorageMetadata):
    pass


class TrainerMeta(StorageMeta):
    pass


class Slotted(ChunkStorageMetadata):
    __slots__ = ("extra",)


class Name(str):
    pass


class Number(int):
    pass


class Stage(enum.Enum):
    FIRST = 1


class Part(str, enum.Enum):
    W = "w"


class Names(list[Any]):
    pass


class Table(dict[Any, Any]):
    pass


class Loops:
    def __init__(self) -> None:
        self.me = (self,)


class Member:
    """Of a class that is not known, as early releases of Python 3.11 pickled members: as inert as the class."""

    def __reduce__(self) -> Any:
        return getattr, (Stage, "__init__")


class WithKeywords:
    def __new__(cls, *, value: int) -> WithKeywords:
        made = super().__new__(cls)
        made.value = value  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"value": 1}


def values() -> dict[str, Any]:
    """Of every kind that a pickle of plain things can have."""
    return {
        "enum": {Stage.FIRST: Part.W},
        "sizes": [torch.Size([1, 2]), torch.float32, torch.strided, torch.device("cpu")],
        "slice": slice(1, 2),
        "nested keys": {((1, ("a", 2.5)), None): 1, (torch.Size([1]), MetadataIndex("x", [1])): 2},
        "long keys": {tuple(range(1000)): 1},
        "large": [2**5000, -(2**40000), {2**40000: 1}],
        "sets": [{1, (2, 3)}, frozenset({4}), {frozenset({5}): 6}],
        "times": [datetime.datetime(2026, 1, 1), datetime.timedelta(1), uuid.UUID(int=1)],
        "collections": [Counter("aab"), defaultdict(list, a=[1]), deque([1]), OrderedDict(a=1)],
        "derived": [Name("n"), Number(1), Names([1]), Table(a=1)],
        "arrays": [np.float32(1), np.arange(3), np.dtype("int64"), torch.ones(2)],
        "bytes": [b"x", bytearray(b"y"), 1j, range(3), None],
        "cycle": Loops(),
        "keywords": WithKeywords(value=1),
        "classes": [Stage, Metadata, list],
        "member": Member(),
    }


class Planner(dcp.DefaultSavePlanner):
    """Changes the metadata that it has made."""

    def __init__(self, change: Change, **options: Any) -> None:
        super().__init__(**options)
        self._change = change

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, self._change(metadata, plans) or metadata


def state(value: float = 1.0) -> dict[str, Any]:
    return {"model": {"w": torch.full((3, 2), value), "b": torch.full((2,), value)}, "step": int(value)}


def save(url: str, change: Change, value: float = 1.0) -> None:
    dcp.save(state(value), storage_writer=AzureBlobWriter(url, credential=KEY), planner=Planner(change))


def assert_loads(reader: dcp.StorageReader, value: float) -> None:
    loaded = state(0.0)
    dcp.load(loaded, storage_reader=reader)
    wanted = state(value)
    assert loaded["step"] == wanted["step"]
    assert all(torch.equal(loaded["model"][key], wanted["model"][key]) for key in ("w", "b"))


def plans_on_metadata(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.all_local_plans = [TrainerPlan(plan.items, mcore_data={"a": (1, 2)}) for plan in plans]  # type: ignore[attr-defined]


def own_metadata_class(metadata: Metadata, plans: list[SavePlan]) -> Metadata:
    fields = {field.name: getattr(metadata, field.name) for field in dataclasses.fields(Metadata)}
    made = TrainerMetadata(**fields, mcore_data={"model.w": {"nd_reformulated_orig_global_shape": (3, 2)}})
    plans_on_metadata(made, plans)
    return made


def own_entry_classes(metadata: Metadata, plans: list[SavePlan]) -> None:
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            properties = TrainerProperties(**vars(entry.properties))
            chunks: list[Any] = [TrainerChunk(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
            metadata.state_dict_metadata[key] = TrainerTensor(properties, entry.size, chunks)
        else:
            metadata.state_dict_metadata[key] = TrainerBytes()


def odd_planner_data(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.planner_data |= {(("a", (1, 2)), 3): torch.Size([1]), tuple(range(500)): 2**40000, Name("n"): Name("v")}


def ordered(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.state_dict_metadata = collections.OrderedDict(metadata.state_dict_metadata)
    metadata.planner_data = collections.OrderedDict(metadata.planner_data)


def no_layout(metadata: Metadata, plans: list[SavePlan]) -> None:
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.properties.layout = None  # type: ignore[assignment]


def everything(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.__dict__.update(values())
    metadata.itself = metadata  # type: ignore[attr-defined]


KEPT: list[Change] = [
    plans_on_metadata,
    own_metadata_class,
    own_entry_classes,
    odd_planner_data,
    ordered,
    no_layout,
    everything,
]


@pytest.mark.parametrize("change", KEPT, ids=lambda change: change.__name__)
def test_what_a_planner_adds_is_kept_and_read_past(container: str, tmp_path: Path, change: Change) -> None:
    url = f"{container}/run/step-1"
    save(url, change)
    assert_loads(AzureBlobReader(url, credential=KEY), 1.0)
    assert [entry.name for entry in catalog.list_checkpoints(f"{container}/run", credential=KEY)] == ["step-1"]
    report = verify(url, credential=KEY)
    assert report.ok and sum(blob.checked for blob in report.blobs) == 3
    assert len(catalog.inspect(url, credential=KEY).tensors) == 2
    catalog.copy(url, f"{container}/run/step-2", credential=KEY)
    assert catalog.diff(url, f"{container}/run/step-2", values=True, credential=KEY).same
    catalog.copy(url, tmp_path / "copy", credential=KEY)
    assert_loads(dcp.FileSystemReader(tmp_path / "copy"), 1.0)
    save(url, change, 2.0)  # what was there is read for what it names
    assert_loads(AzureBlobReader(url, credential=KEY), 2.0)


@pytest.mark.parametrize("name", values())
def test_what_each_value_reads_as(name: str) -> None:
    metadata: Any = small_metadata()
    metadata.value, metadata.plain = values()[name], {"a": [1]}
    loaded = load_metadata(dump_metadata(metadata), WHERE)
    assert ("value" in vars(loaded)) == (name in ("nested keys", "long keys", "large", "sets"))
    assert vars(loaded)["plain"] == {"a": [1]}
    if "value" in vars(loaded):
        assert vars(loaded)["value"] == metadata.value
    del metadata.value
    vars(loaded).pop("value", None)
    assert loaded == metadata


def test_without_collectives_too(container: str) -> None:
    writer = AzureBlobWriter(f"{container}/run", credential=KEY)
    dcp.save(state(), storage_writer=writer, planner=Planner(plans_on_metadata), use_collectives=False)
    assert_loads(AzureBlobReader(f"{container}/run", credential=KEY), 1.0)


def test_a_file_of_a_trainer_whose_classes_derive_from_all_of_torch_is_read() -> None:
    metadata = own_metadata_class(small_metadata(), [SavePlan([])])
    own_entry_classes(metadata, [])
    w: Any = metadata.state_dict_metadata["w"]
    w.chunks[1] = Slotted(w.chunks[1].offsets, w.chunks[1].sizes)
    w.chunks[1].extra = 1
    metadata.storage_meta = TrainerMeta("https://a.example/c/run", "s")
    metadata.storage_data = {
        TrainerIndex(index.fqn, index.offset, index.index): TrainerInfo(**vars(info))
        for index, info in ((i, _only_fields(i2)) for i, i2 in small_metadata().storage_data.items())
    }
    loaded = load_metadata(pickle.dumps(metadata), WHERE)
    check_metadata(loaded, WHERE)
    assert type(loaded) is Metadata and type(loaded.storage_meta) is StorageMeta
    assert {type(index) for index in loaded.storage_data} == {MetadataIndex}
    assert loaded.storage_data[MetadataIndex("w", (2, 0))].length == 90
    assert loaded.state_dict_metadata == small_metadata().state_dict_metadata
    assert vars(loaded)["mcore_data"] == metadata.mcore_data  # type: ignore[attr-defined]
    assert "all_local_plans" not in vars(loaded)


def _only_fields(info: Any) -> Any:
    return StorageInfo(info.relative_path, info.offset, info.length)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_reads_past_plans(protocol: int) -> None:
    metadata = small_metadata()
    plans_on_metadata(metadata, [SavePlan([])])
    assert load_metadata(pickle.dumps(metadata, protocol), WHERE) == small_metadata()


def test_strings_of_a_subclass_are_read_as_strings() -> None:
    metadata = small_metadata()
    metadata.state_dict_metadata = {Name("w"): metadata.state_dict_metadata["w"], Name("o"): BytesStorageMetadata()}
    metadata.planner_data = {Part.W: (Name("model"), Part.W), "o": ("o",)}
    metadata.storage_data = {
        MetadataIndex(Part.W if index.fqn == "w" else Name("o"), index.offset, index.index): info
        for index, info in metadata.storage_data.items()
    }
    metadata.version = Name("1")
    loaded = load_metadata(pickle.dumps(metadata), WHERE)
    check_metadata(loaded, WHERE)
    assert {type(name) for name in loaded.state_dict_metadata} == {str} and loaded.version == "1"
    assert loaded.planner_data == {"w": ("model", "w"), "o": ("o",)}
    assert all(type(step) is str for path in loaded.planner_data.values() for step in path)
    assert MetadataIndex("w", (2, 0)) in loaded.storage_data


# Keys of the state dict


def unflattened(planner: type[Any]) -> Any:
    return planner(flatten_state_dict=False, flatten_sharded_tensors=False)


def test_keys_of_a_subclass_of_str_are_saved_as_strings(container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    saved = {Name("a"): torch.ones(3), Part.W: torch.full((2,), 2.0)}
    writer = AzureBlobWriter(url, credential=KEY)
    dcp.save(saved, storage_writer=writer, planner=unflattened(dcp.DefaultSavePlanner))
    for names in (("a", "w"), (Name("a"), Part.W)):
        loaded = {names[0]: torch.zeros(3), names[1]: torch.zeros(2)}
        reader = AzureBlobReader(url, credential=KEY)
        dcp.load(loaded, storage_reader=reader, planner=unflattened(dcp.DefaultLoadPlanner))
        assert torch.equal(loaded["a"], torch.ones(3)) and torch.equal(loaded["w"], torch.full((2,), 2.0))
    catalog.copy(url, tmp_path / "copy", credential=KEY)
    found = dcp.FileSystemReader(tmp_path / "copy").read_metadata()
    assert {type(name) for name in found.state_dict_metadata} == {str}


@pytest.mark.parametrize("key", [1, (1, 2), None, 1.5, b"x", Stage.FIRST])
def test_other_keys_are_refused_by_name_before_anything_is_sent(container: str, key: Any) -> None:
    url = f"{container}/run"
    save(url, lambda metadata, plans: None)
    writer = AzureBlobWriter(url, credential=KEY)
    with pytest.raises(CheckpointException) as raised:
        dcp.save({key: torch.ones(3)}, storage_writer=writer, planner=unflattened(dcp.DefaultSavePlanner))
    error = raised.value.failures[0][0]
    assert type(error) is CheckpointError and repr(key) in str(error) and "Rename it" in str(error)
    assert_loads(AzureBlobReader(url, credential=KEY), 1.0)


@pytest.mark.parametrize("dimensions", [64, 65, 1024])
def test_tensors_of_very_many_dimensions(container: str, dimensions: int) -> None:
    shape = [1] * (dimensions - 1) + [3]
    writer = AzureBlobWriter(f"{container}/run", credential=KEY)
    dcp.save({"t": torch.arange(3.0).reshape(shape)}, storage_writer=writer)
    loaded = {"t": torch.zeros(shape)}
    dcp.load(loaded, storage_reader=AzureBlobReader(f"{container}/run", credential=KEY))
    assert loaded["t"].flatten().tolist() == [0, 1, 2]
    metadata = AzureBlobReader(f"{container}/run", credential=KEY).read_metadata()
    assert metadata.state_dict_metadata["t"].size == torch.Size(shape)  # type: ignore[union-attr]
    assert verify(f"{container}/run", credential=KEY).ok


# Refused before the commit


def lambda_on_metadata(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.hook = lambda: 1  # type: ignore[attr-defined]


def function_on_metadata(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.hook = {"fine": 1, "run": os.system, "also fine": 2}  # type: ignore[attr-defined]


def object_in_planner_data(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.planner_data["model.w"] = Stage.FIRST


def own_mapping(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.state_dict_metadata = Table(metadata.state_dict_metadata)


def own_entry(metadata: Metadata, plans: list[SavePlan]) -> None:
    metadata.state_dict_metadata["model.w"] = Loops()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda_on_metadata, "because of its 'hook'"),
        (function_on_metadata, "because of 'run' in its 'hook'"),
        (object_in_planner_data, r"because of 'model\.w' in its 'planner_data'.*Stage.*add_safe_globals"),
        (own_mapping, "because of its 'state_dict_metadata'.*Table"),
        (own_entry, r"because of 'model\.w' in its 'state_dict_metadata'"),
    ],
)
def test_what_no_load_would_accept_is_refused_and_the_old_checkpoint_stands(
    container: str, change: Change, says: str
) -> None:
    url = f"{container}/run"
    save(url, lambda metadata, plans: None)
    with pytest.raises(CheckpointException) as raised:
        save(url, change, 2.0)
    error = raised.value.failures[0][0]
    assert isinstance(error, UnsafeMetadataError)
    with pytest.raises(UnsafeMetadataError, match=says):
        raise error
    assert "nothing was committed" in str(error) and len(str(error)) < 2000
    assert_loads(AzureBlobReader(url, credential=KEY), 1.0)
    assert verify(url, credential=KEY).ok


# Nothing of it is run


@pytest.mark.parametrize("name", ["Shiny", "ShinyPlan"])
def test_what_a_newer_torch_has_added_is_dropped_or_refused_as_such(name: str) -> None:
    """Instead of a class that is known, at each place, by a class that a newer torch might have there."""
    metadata: Any = small_metadata()
    plans_on_metadata(metadata, [SavePlan([])])
    data = pickle.dumps(metadata, 2)
    for known in ("BytesStorageMetadata", "TensorStorageMetadata", "ChunkStorageMetadata", "_StorageInfo"):
        changed = data.replace(f"{known}\n".encode(), f"{name}\n".encode())
        assert changed != data
        with pytest.raises(UnsupportedCheckpointError, match=f"{name}.*newer torch"):
            check_metadata(load_metadata(changed, WHERE), WHERE)
    metadata = small_metadata()
    metadata.hung = SavePlan([])
    hung = pickle.dumps(metadata, 2).replace(b"planner\nSavePlan\n", f"planner\n{name}\n".encode())
    assert name.encode() in hung and load_metadata(hung, WHERE) == small_metadata()


def test_a_stand_in_cannot_be_given_to_what_the_user_registered() -> None:
    metadata = small_metadata()
    metadata.planner_data = Names([{"a": Table(b=Stage.FIRST)}])
    data = pickle.dumps(metadata)
    with torch.serialization.safe_globals([Names, Table]), pytest.raises(UnsafeMetadataError, match="Stage"):
        load_metadata(data, WHERE)


def test_metadata_of_a_trainer_costs_little_more() -> None:
    """What consists of torch's own classes is still taken at once, whatever the class of the whole."""
    metadata = Metadata({}, {}, {})
    for number in range(300):
        chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([number, 2]))
        entry = TensorStorageMetadata(TensorProperties(), torch.Size([number, 2]), [chunk])
        metadata.state_dict_metadata[f"{number}"] = entry
    data = pickle.dumps(own_metadata_class(metadata, []))
    assert load_metadata(data, WHERE).state_dict_metadata == metadata.state_dict_metadata
    assert states_set_one_by_one(data) < 10
