"""Metadata that contradicts itself, or leads out of the checkpoint, is refused. Every torch reads what is written.

torch 2.15 adds the strides to the properties of a tensor. An older torch is given what 2.15 has: the field, and a state
of six.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from azure_torch_ckpt.dcp.metadata.schema import check_metadata, load_metadata, pickle_metadata
from azure_torch_ckpt.dcp.metadata.views import data_paths
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError
from tests.dcp.metadata.pickles import WHERE, assert_fast_path_changes_nothing, small_metadata, states_set_one_by_one
from tests.support.containers import KEY, content

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

Change = Callable[[Any], object]


def tensor(m: Any) -> Any:
    return m.state_dict_metadata["w"]


def info(m: Any) -> Any:
    return m.storage_data[MetadataIndex("w", (0, 0))]


def put(target: Callable[[Any], Any], **values: Any) -> Change:
    return lambda m: target(m).__dict__.update(values)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../other/x",
        "a/../../x",
        "a/./x",
        ".",
        "a//x",
        "a/",
        "a\\..\\x",
        "C:x",
        "https://evil.example/x",
        "file:/x",
        "a/b://c",
        "a\nb",
        "a\x00",
        "a\x85",
        "\ud800",
        "x" * 1025,
    ],
)
def test_paths_that_leave_the_checkpoint(path: str) -> None:
    metadata = small_metadata()
    info(metadata).relative_path = path
    with pytest.raises(UnsafeMetadataError, match="plain path") as raised:
        check_metadata(load_metadata(pickle.dumps(metadata), WHERE), WHERE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["__0_0.distcp", "a/b/c", "...", ".a", "a..b", "ünï code%2e", "x" * 1024])
def test_paths_that_stay_inside(path: str) -> None:
    metadata = small_metadata()
    info(metadata).relative_path = path
    check_metadata(metadata, WHERE)
    assert path in data_paths(metadata)


@pytest.mark.parametrize(
    "change",
    [
        put(info, offset=-1),
        put(info, length=-1),
        put(info, offset=2**63 - 100),
        put(info, length=2**2000),
        put(info, payload_offset=-1),
        put(info, payload_offset=101),
        put(info, crc64=-1),
        put(info, crc64=2**64),
        put(tensor, size=torch.Size([-3, 3])),
        put(lambda m: tensor(m).chunks[0], offsets=torch.Size([-1, 0])),
        put(lambda m: tensor(m).chunks[0], sizes=torch.Size([2, -3])),
    ],
)
def test_hostile_numbers(change: Change) -> None:
    metadata = small_metadata()
    change(metadata)
    with pytest.raises(UnsafeMetadataError, match="refused"):
        check_metadata(metadata, WHERE)


@pytest.mark.parametrize(
    "change",
    [
        put(lambda m: m, state_dict_metadata=None),
        put(lambda m: m, storage_data=None),
        put(lambda m: m, storage_meta="x"),
        put(lambda m: m, version=1),
        lambda m: m.__dict__.pop("state_dict_metadata"),
        lambda m: m.state_dict_metadata.update({1: BytesStorageMetadata()}),
        lambda m: m.state_dict_metadata.update({"x": BytesStorageMetadata()}),
        lambda m: m.state_dict_metadata.update({"x": None}),
        lambda m: m.storage_data.update({"x": info(m)}),
        put(info, relative_path=b"x"),
        put(info, offset=True),
        put(info, offset=0.0),
        put(info, length=None),
        put(info, payload_offset=True),
        put(info, crc64="0"),
        put(info, transform_descriptors="zstd"),
        put(info, transform_descriptors=[1]),
        put(info, transform_descriptors=["zstd"]),
        put(info, payload_offset=77),
        put(info, length=87),
        lambda m: info(m).__dict__.pop("relative_path"),
        put(tensor, properties=None),
        put(lambda m: tensor(m).properties, dtype="float32"),
        put(lambda m: tensor(m).properties, dtype=torch.float64),
        put(tensor, size=(3, 3)),
        put(tensor, size=torch.Size([3])),
        put(tensor, size=torch.Size([2, 3])),
        put(tensor, chunks=()),
        lambda m: tensor(m).chunks.append(None),
        put(lambda m: tensor(m).chunks[0], offsets=torch.Size([1, 0]), sizes=torch.Size([1, 3])),
        put(lambda m: tensor(m).chunks[0], sizes=torch.Size([2, 4])),
        put(lambda m: tensor(m).chunks[0], sizes=torch.Size([2])),
        put(lambda m: tensor(m).chunks[0], sizes=None),
        lambda m: m.storage_data.pop(MetadataIndex("w", (2, 0))),
        lambda m: m.storage_data.pop(MetadataIndex("o")),
    ],
)
def test_contradictions(change: Change) -> None:
    metadata = small_metadata()
    check_metadata(metadata, WHERE)
    change(metadata)
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        check_metadata(metadata, WHERE)


def test_sizes_that_overflow_64_bits_are_computed_exactly() -> None:
    metadata = small_metadata()
    huge = torch.Size([2**40, 2**40])
    tensor(metadata).size = huge
    tensor(metadata).chunks = [ChunkStorageMetadata(torch.Size([0, 0]), huge)]
    with pytest.raises(CorruptCheckpointError, match=str(2**82)):
        check_metadata(metadata, WHERE)


def test_storage_of_another_plugin_is_named() -> None:
    metadata = small_metadata()
    metadata.storage_data[MetadataIndex("o")] = object()
    with pytest.raises(UnsupportedCheckpointError, match="Another storage plugin"):
        check_metadata(metadata, WHERE)


def test_the_payload_may_fill_the_item_to_its_last_byte() -> None:
    metadata = small_metadata()
    info(metadata).length = 64 + 2 * 3 * 4
    check_metadata(metadata, WHERE)
    assert copy.deepcopy(metadata) == metadata


HAS_STRIDES = hasattr(TensorProperties, "strides")


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch 2.15 as far as it pickles; undo it to read with the torch that is installed."""
    if HAS_STRIDES:
        return monkeypatch
    five: Any = TensorProperties.__getstate__
    create: Any = TensorProperties.create_from_tensor

    def of_tensor(tensor: torch.Tensor) -> Any:
        properties = create(tensor)
        properties.strides = tensor.stride()
        return properties

    monkeypatch.setattr(TensorProperties, "strides", None, raising=False)
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*five(self), self.strides))
    monkeypatch.setattr(TensorProperties, "create_from_tensor", staticmethod(of_tensor))
    return monkeypatch


def states_of_properties(data: bytes) -> list[int]:
    """The lengths of the states of all TensorProperties in a pickle."""
    found: list[int] = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name == "TensorProperties":
                return type(name, (), {"__setstate__": lambda self, state: found.append(len(state))})
            return super().find_class(module, name)

    Unpickler(io.BytesIO(data)).load()
    return found


def tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.arange(6.0).reshape(2, 3),
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3).t(),
        "ones": torch.ones(1, 4, 1).transpose(0, 2),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "channels last": torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last),
        "part of rows": torch.arange(12.0).reshape(3, 4)[:, :2],
    }


def metadata_of(strides: list[tuple[int, ...] | None], sizes: list[tuple[int, ...]]) -> Metadata:
    metadata = Metadata({}, {}, {})
    for number, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        properties: Any = TensorProperties(dtype=torch.float32)
        properties.strides = stride
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
        metadata.state_dict_metadata[f"{number}"] = TensorStorageMetadata(properties, torch.Size(size), [chunk])
    return metadata


def test_torch_of_any_version_reads_what_newest_torch_saves(newest: pytest.MonkeyPatch, container: str) -> None:
    plain = {key: tensors()[key] for key in ("matrix", "scalar", "empty", "ones")}
    dcp.save(plain, storage_writer=AzureBlobWriter(f"{container}/run", credential=KEY))
    data = content(container, "run/.metadata")
    assert set(states_of_properties(data)) == {5}
    newest.undo()
    assert pickle.loads(data).state_dict_metadata.keys() == plain.keys()  # as torch's own readers do
    assert_fast_path_changes_nothing(data)
    loaded = {key: torch.zeros(value.shape) for key, value in plain.items()}
    dcp.load(loaded, storage_reader=AzureBlobReader(f"{container}/run", credential=KEY))
    assert all(torch.equal(loaded[key], plain[key]) for key in plain)


def test_strides_that_do_not_follow_from_the_size_are_kept(newest: pytest.MonkeyPatch, container: str) -> None:
    dcp.save(tensors(), storage_writer=AzureBlobWriter(f"{container}/run", credential=KEY))
    data = content(container, "run/.metadata")
    assert sorted(states_of_properties(data))[-4:] == [5, 6, 6, 6]
    newest.undo()
    loaded = {key: torch.zeros(value.shape) for key, value in tensors().items()}
    dcp.load(loaded, storage_reader=AzureBlobReader(f"{container}/run", credential=KEY))
    assert all(torch.equal(loaded[key], value) for key, value in tensors().items())


def test_a_shard_s_own_strides_follow_from_the_shard_and_plans_are_written_alike(newest: pytest.MonkeyPatch) -> None:
    metadata: Any = metadata_of([(2, 1)], [(4, 8)])
    entry = metadata.state_dict_metadata["0"]
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, start]), torch.Size([4, 2])) for start in (0, 2, 4, 6)]
    odd: Any = TensorProperties()
    odd.strides = (1, 4)
    planned = [
        WriteItem(MetadataIndex("0"), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, entry.size))
        for chunk, properties in zip(entry.chunks, [entry.properties, metadata_of([None], [(1,)]), odd], strict=False)
        if isinstance(properties, TensorProperties)
    ]
    metadata.all_local_plans = [SavePlan(planned)]
    assert states_of_properties(pickle_metadata(metadata)) == [5, 6]


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("kind", ["each its own", "shared", "none", "none and some"])
def test_the_fast_path_takes_six_fields(newest: pytest.MonkeyPatch, protocol: int, kind: str) -> None:
    sizes: list[tuple[int, ...]] = [
        [(), (3,), (70_000, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 2**33)][n % 6] for n in range(600)
    ]
    shared = (5, 1)
    strides: list[tuple[int, ...] | None] = [
        {
            "each its own": tuple(range(len(size), 0, -1)),
            "shared": shared,
            "none": None,
            "none and some": None if number % 2 else (number, 1),
        }[kind]
        for number, size in enumerate(sizes)
    ]
    metadata = metadata_of(strides, sizes)
    data = pickle.dumps(metadata, protocol)
    assert set(states_of_properties(data)) == {6}
    if not HAS_STRIDES:
        newest.undo()
    assert_fast_path_changes_nothing(data)
    assert states_set_one_by_one(data) < 0.05 * 3 * 600
    read = load_metadata(data, WHERE)
    assert [entry.size for entry in read.state_dict_metadata.values()] == [torch.Size(size) for size in sizes]  # type: ignore[union-attr]
