"""Tests of check_metadata: metadata that contradicts itself, or would lead out of the checkpoint, is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
)

from azure_torch_ckpt.dcp.metadata.schema import (
    check_metadata,
    data_paths,
    load_metadata,
)
from azure_torch_ckpt.errors import (
    CorruptCheckpointError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
)
from tests.dcp.metadata.pickles import (
    WHERE,
    small_metadata,
)

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
