"""The fast path for what metadata repeats is taken, and makes what the machine makes opcode by opcode."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import pickle
import pickletools
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from azure_torch_ckpt._internal.torch_private import StorageInfo
from azure_torch_ckpt.dcp.metadata.schema import load_metadata, storage_info
from azure_torch_ckpt.dcp.metadata.unpickler import MetadataUnpickler
from azure_torch_ckpt.errors import CorruptCheckpointError
from tests.dcp.metadata.pickles import (
    WHERE,
    assert_fast_path_changes_nothing,
    damaged,
    saved_by_torch,
    small_metadata,
    states_set_one_by_one,
)

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def share_set_one_by_one(data: bytes) -> float:
    """The share of all instances in `data` that the machine went through opcode by opcode."""
    return states_set_one_by_one(data) / sum(opcode.name == "BUILD" for opcode, _, _ in pickletools.genops(data))


def fresh(text: str) -> str:
    """An equal string of an identity of its own, as it comes from another rank."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")


def model(tensors: int, chunks: int) -> Metadata:
    """Metadata as our writer saves it, of a model whose shapes recur."""
    metadata = Metadata({}, {}, {}, StorageMeta("https://a.example/c/run"))
    assert metadata.planner_data is not None and metadata.storage_data is not None
    for number in range(tensors):
        name = f"model.layers.{number}.weight"
        rows, shape = 100 * (number % 7 + 1), [[], [3], [4096, 300], [7, 2, 3], [2**33, 3, 4, 5, 6]][number % 5]
        whole = torch.Size([rows * chunks, *shape])
        parts = [
            ChunkStorageMetadata(torch.Size([rows * part, *[0] * len(shape)]), torch.Size([rows, *shape]))
            for part in range(chunks)
        ]
        properties = TensorProperties(dtype=[torch.float32, torch.bfloat16][number % 2])
        metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, whole, parts)
        metadata.planner_data[name] = ("model", fresh(name.removeprefix("model.")))
        for part, chunk in enumerate(parts):
            metadata.storage_data[MetadataIndex(fresh(name), chunk.offsets, part)] = storage_info(
                fresh(f"{'0' * 32}/__{part}_0.distcp"),
                number * 70_000,
                66_000,
                payload_offset=1024,
                crc64=(number * chunks + part) * 0x9E3779B97F4A7C15 % 2**64,
            )
    return metadata


@pytest.mark.parametrize(("tensors", "chunks"), [(2000, 1), (500, 2), (50, 50), (2, 1500)])
@pytest.mark.parametrize("protocol", [4, 5])
def test_nearly_all_is_taken(tensors: int, chunks: int, protocol: int) -> None:
    data = pickle.dumps(model(tensors, chunks), protocol)
    # Of a tensor in several chunks, its own state and its list of chunks are left to the machine.
    allowed = 0.05 + (tensors if chunks > 1 else 0) / (tensors * (2 + 3 * chunks))
    assert share_set_one_by_one(data) < allowed
    assert load_metadata(data, WHERE) == pickle.loads(data)


def test_nearly_all_of_a_save_by_torch_is_taken(tmp_path: pathlib.Path) -> None:
    data = saved_by_torch(tmp_path, {f"{number}": torch.zeros(number % 3, 4) for number in range(400)})
    assert share_set_one_by_one(data) < 0.05


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("chunks", [1, 2, 40])
def test_what_is_made_is_the_same(protocol: int, chunks: int) -> None:
    metadata = model(30, chunks)
    assert_fast_path_changes_nothing(pickle.dumps(metadata, protocol))
    assert_fast_path_changes_nothing(pickle._dumps(metadata, protocol))  # type: ignore[attr-defined]


def test_what_torch_saved_is_the_same(tmp_path: pathlib.Path) -> None:
    data = saved_by_torch(tmp_path, thread_count=3)
    for protocol in PROTOCOLS:
        assert_fast_path_changes_nothing(pickle.dumps(pickle.loads(data), protocol))


def test_more_shapes_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azure_torch_ckpt.dcp.metadata.fast_path.REMEMBERED", 3)
    data = pickle.dumps(model(30, 5))
    assert_fast_path_changes_nothing(data)
    machine = MetadataUnpickler(data, WHERE)
    machine.run()
    taken: Any = machine.fast_path[StorageInfo].__self__  # type: ignore[attr-defined]
    assert all(len(value) <= 3 for name, value in vars(taken).items() if name.endswith("_runs"))


def wrong_offset(index: Any, info: Any, shared: Any) -> None:
    index.__dict__["offset"] = shared  # a reference, but not to a torch.Size


def wrong_name(index: Any, info: Any, shared: Any) -> None:
    index.__dict__["fqn"] = shared


def wrong_attribute(index: Any, info: Any, shared: Any) -> None:
    del info.__dict__["payload_offset"], info.__dict__["crc64"]
    info.__dict__.update(__class__=1, crc64=2)


def wrong_attribute_at_the_end(index: Any, info: Any, shared: Any) -> None:
    del info.__dict__["crc64"]
    info.__dict__["__class__"] = 1


@pytest.mark.parametrize("plant", [wrong_offset, wrong_name, wrong_attribute, wrong_attribute_at_the_end])
def test_what_only_looks_like_an_entry_is_refused(plant: Callable[[Any, Any, Any], None]) -> None:
    metadata = model(8, 1)
    assert metadata.storage_data is not None
    # What comes before the entries is in the memo, so that they only refer to it.
    metadata.planner_data = {"name": "__class__", "shared": (shared := (0, 0))}
    for index, info in list(metadata.storage_data.items())[4:]:
        plant(index, info, shared)
    data = pickle.dumps(metadata)
    with pytest.raises(CorruptCheckpointError):
        load_metadata(data, WHERE)
    assert_fast_path_changes_nothing(data)


def test_it_takes_no_more_memory_than_without() -> None:
    data = pickle.dumps(model(20, 300))
    peaks = []
    for fast in (False, True):
        tracemalloc.start()
        try:
            MetadataUnpickler(data, WHERE, fast=fast).run()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] <= 1.1 * peaks[0]


def test_what_was_read_needs_no_collector_to_go_away() -> None:
    data = pickle.dumps(model(20, 30))
    gc.collect()
    gc.disable()
    try:
        load_metadata(data, WHERE)
        assert gc.collect() < 20  # objects; in a cycle with the machine there would be thousands
    finally:
        gc.enable()


# Metadata of every kind, whole and damaged.

names = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=12),
    st.sampled_from(["Ô\u0394\x14", "x" * 255, "x" * 256, "ü" * 130, "\ud800", "a" * 0x94]),
)
extents = st.one_of(st.integers(0, 255), st.integers(0, 2**16), st.integers(0, 2**32), st.integers(-(2**63), 2**63 - 1))
shapes = st.lists(extents, max_size=5).map(torch.Size)
numbers = st.one_of(extents, st.integers(0, 2**64 - 1), st.integers(-(2**70), 2**70))
infos = st.builds(
    lambda path, offset, length, more: _with_more(storage_info(path, offset, length), more),
    names,
    numbers,
    numbers,
    st.one_of(
        st.fixed_dictionaries({}, optional={"payload_offset": numbers, "crc64": numbers}),
        st.dictionaries(st.sampled_from(["crc64", "offset", "new", "transform_descriptors"]), st.none() | numbers),
        st.just({"transform_descriptors": ["zstd"]}),
    ),
)
properties = st.builds(
    TensorProperties,
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from([torch.strided, torch.sparse_coo]),
    st.booleans(),
    st.sampled_from([torch.contiguous_format, torch.channels_last, torch.preserve_format]),
    st.booleans(),
)
chunks = st.builds(ChunkStorageMetadata, shapes, shapes)
entries = st.one_of(
    st.builds(TensorStorageMetadata, properties, shapes, st.lists(chunks, min_size=1, max_size=1)),
    st.builds(TensorStorageMetadata, properties, shapes, st.lists(chunks, max_size=6)),
    st.builds(BytesStorageMetadata),
)
indexes = st.builds(MetadataIndex, names, st.none() | shapes, st.none() | numbers)


def _with_more(info: Any, more: dict[str, Any]) -> Any:
    info.__dict__.update(more)
    return info


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Metadata in which a few different parts recur, as one object or as many, in frames of any size."""
    few_shapes, few_names = (
        draw(st.lists(shapes, min_size=1, max_size=3)),
        draw(st.lists(names, min_size=1, max_size=9)),
    )
    metadata = Metadata({}, {}, {}, StorageMeta("x"))
    assert metadata.planner_data is not None and metadata.storage_data is not None
    alone = draw(st.booleans())  # nothing is one object with something else

    def name() -> str:
        found = draw(st.sampled_from(few_names) | names)
        return fresh(found) if alone else found

    def shape() -> torch.Size:
        found = draw(st.sampled_from(few_shapes))
        return torch.Size(tuple(found)) if alone else found

    for _ in range(draw(st.integers(0, 12))):
        key, entry = name(), draw(entries)
        if isinstance(entry, TensorStorageMetadata) and draw(st.booleans()):
            entry.size = shape()
            entry.chunks = [ChunkStorageMetadata(shape(), shape()) for _ in entry.chunks]
        metadata.state_dict_metadata[key] = entry
        metadata.planner_data[key] = tuple(name() for _ in range(draw(st.integers(0, 4))))
    for _ in range(draw(st.integers(0, 12))):
        index = draw(indexes)
        index.__dict__["fqn"] = name()
        if index.offset is not None:
            index.__dict__["offset"] = shape()
        metadata.storage_data[index] = draw(infos)
    if draw(st.booleans()):
        metadata.from_the_future = metadata.state_dict_metadata  # type: ignore[attr-defined]
    protocol = draw(st.sampled_from([4, 4, 5, 3, 2]))
    if draw(st.booleans()):
        return pickle.dumps(metadata, protocol)
    with frames_of(draw(st.sampled_from([16, 50, 200, 65536]))):
        return pickle._dumps(metadata, protocol)  # type: ignore[attr-defined,no-any-return]


@contextlib.contextmanager
def frames_of(size: int) -> Iterator[None]:
    """So small that frames begin in the middle of entries. Only the pickler in Python has such an option."""
    framer: Any = pickle._Framer  # type: ignore[attr-defined]
    before = framer._FRAME_SIZE_TARGET
    framer._FRAME_SIZE_TARGET = size
    try:
        yield
    finally:
        framer._FRAME_SIZE_TARGET = before


@settings(max_examples=250, deadline=None)
@given(pickles())
def test_metadata_of_every_kind_is_the_same(data: bytes) -> None:
    assert_fast_path_changes_nothing(data)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
SAMPLES = [
    pickle.dumps(model(8, 1)),
    pickle.dumps(model(4, 3)),
    pickle.dumps(model(5, 1), 5),
    pickle.dumps(small_metadata()),
    pickle.dumps(small_metadata(), 2),
]
spots = st.integers(0, 1 << 16)
edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), spots, st.integers(0, 255)),
        st.tuples(st.just("flip"), spots, st.sampled_from(OPCODES).map(lambda code: code[0])),
        st.tuples(st.just("add"), spots, st.sampled_from([-2, -1, 1, 2])),  # to a reference, or to a length
        st.tuples(st.just("delete"), spots, st.integers(1, 20)),
        st.tuples(st.just("insert"), spots, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("insert"), spots, st.lists(st.sampled_from(OPCODES), max_size=3).map(b"".join)),
        st.tuples(st.just("repeat"), spots, st.integers(1, 300)),
        st.tuples(st.just("cut"), spots, st.none()),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(SAMPLES), edits)
def test_damaged_metadata_meets_the_same_end(data: bytes, changes: list[tuple[str, int, Any]]) -> None:
    assert_fast_path_changes_nothing(damaged(data, changes))


@settings(max_examples=150, deadline=None)
@given(pickles(), edits)
def test_damaged_metadata_of_every_kind_meets_the_same_end(data: bytes, changes: list[tuple[str, int, Any]]) -> None:
    assert_fast_path_changes_nothing(damaged(data, changes))


def test_every_byte_of_an_entry_counts() -> None:
    """Each byte of one entry of each kind, replaced by what could make it another entry."""
    data = pickle.dumps(model(6, 1))
    ends = [position for opcode, _, position in pickletools.genops(data) if opcode.name == "BUILD" and position]
    assert len(ends) > 30
    tensor = range(ends[9] + 1, ends[14] + 1)
    item = range(ends[-6] + 1, ends[-4] + 1)
    for spot in (*tensor, *item):
        for value in {data[spot] ^ 1, data[spot] + 1 & 255, data[spot] - 1 & 255, 0x94, 0x28, 0x4E, 0x2E}:
            assert_fast_path_changes_nothing(data[:spot] + bytes([value]) + data[spot + 1 :])
