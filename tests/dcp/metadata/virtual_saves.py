"""Saves of many ranks without the ranks: a plan, what each rank has written, and the metadata that comes of it.

A save by hand holds numbers that no real one has, such as offsets of petabytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import random
from collections.abc import Sequence
from typing import Any

import torch
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
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from azure_torch_ckpt.dcp.metadata.columns import entries_of
from azure_torch_ckpt.dcp.metadata.front import dump_with_index
from azure_torch_ckpt.dcp.metadata.index import StoredColumns
from azure_torch_ckpt.dcp.metadata.schema import storage_info
from azure_torch_ckpt.dcp.written_items import UploadedItem, WrittenItems, join_results
from tests.dcp.metadata.pickles import WHERE


@dataclasses.dataclass
class VirtualSave:
    """What the coordinator has in `finish`: the planner's metadata, and the results of all ranks.

    `made` is what `.metadata` must say.
    """

    planned: Metadata
    results: list[WrittenItems]
    made: Metadata

    def columns(self) -> StoredColumns:
        entries = entries_of(self.planned)
        assert entries is not None
        columns = join_results(entries, [result.packed() for result in self.results if len(result)])
        assert columns is not None
        return columns

    def dump(self) -> bytes:
        return dump_with_index(self.planned, self.columns(), WHERE)


def write_item(name: str, entry: Any, number: int = 0, hint: int | None = None) -> WriteItem:
    """What a planner plans for a chunk of a tensor, or for an object."""
    if not isinstance(entry, TensorStorageMetadata):
        return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
    chunk = entry.chunks[number]
    return WriteItem(
        MetadataIndex(name, chunk.offsets, number if hint is None else hint),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, entry.properties, entry.size),
    )


def written(blob: str, items: Sequence[UploadedItem]) -> tuple[WrittenItems, dict[MetadataIndex, Any]]:
    """What a rank sends, and what torch's metadata has of it."""
    checked = all(item.crc64 is not None for item in items)
    storage = {
        item.planned.index: storage_info(
            blob,
            item.offset,
            item.length,
            payload_offset=item.payload_offset,
            crc64=item.crc64 if checked else None,
        )
        for item in items
    }
    return WrittenItems(blob, list(items)), storage


def tensor_entry(
    size: Sequence[int], chunks: Sequence[tuple[Sequence[int], Sequence[int]]], dtype: torch.dtype = torch.float32
) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        torch.Size(size),
        [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks],
    )


def rows(size: Sequence[int], parts: int, dtype: torch.dtype = torch.float32) -> TensorStorageMetadata:
    """A tensor that is cut by rows, as evenly as torch does it."""
    each = -(-size[0] // parts)
    starts = range(0, size[0], each)
    tail = [0] * (len(size) - 1)
    return tensor_entry(
        size, [((start, *tail), (min(each, size[0] - start), *size[1:])) for start in starts], dtype=dtype
    )


def save_of(entries: dict[str, Any], ranks: int, *, crc64: bool = True, **fields: Any) -> VirtualSave:
    """Every rank has the chunk of its number of each tensor, back to back; rank 0 has the objects."""
    items: list[list[UploadedItem]] = [[] for _ in range(ranks)]
    ends = [0] * ranks
    for name, entry in entries.items():
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else [None]
        for number, chunk in enumerate(chunks):
            rank = number % ranks
            nbytes = 0 if chunk is None else math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            payload = None if chunk is None else 64
            check = 0x9E3779B97F4A7C15 * (number + len(items[rank]) + 1) % (1 << 64) if crc64 else None
            length = 64 + nbytes + 40
            items[rank].append(UploadedItem(write_item(name, entry, number), ends[rank], length, payload, check))
            ends[rank] += length
    return finished(entries, items, **fields)


def finished(entries: dict[str, Any], items: Sequence[Sequence[UploadedItem]], **fields: Any) -> VirtualSave:
    results = []
    storage: dict[MetadataIndex, Any] = {}
    for rank, of_rank in enumerate(items):
        result, stored = written(f"save-id/__{rank}_0.distcp", of_rank)
        results.append(result)
        storage.update(stored)
    rest: dict[str, Any] = {
        "planner_data": {name: tuple(name.split(".")) for name in entries},
        "storage_meta": StorageMeta(checkpoint_id="https://a.example/c/run", save_id="save-id"),
        "version": "1.0.0",
        **fields,
    }
    planned, made = Metadata(dict(entries)), Metadata(dict(entries), storage_data=storage)
    for metadata in (planned, made):
        vars(metadata).update(rest)
    return VirtualSave(planned, results, made)


def assert_same_metadata(got: Metadata, wanted: Metadata) -> None:
    """All that metadata says, with what torch's `==` passes over: order, hints, and our attributes of storage infos."""
    assert list(got.state_dict_metadata) == list(wanted.state_dict_metadata)
    for name, entry in wanted.state_dict_metadata.items():
        found = got.state_dict_metadata[name]
        assert type(found) is type(entry), name
        if isinstance(entry, TensorStorageMetadata):
            assert isinstance(found, TensorStorageMetadata)
            assert vars(found.properties) == vars(entry.properties), name
            assert (type(found.size), found.size) == (torch.Size, entry.size), name
            assert list(found.chunks) == list(entry.chunks), name
            assert {type(part) for chunk in found.chunks for part in vars(chunk).values()} <= {torch.Size}
        else:
            assert vars(found) == {}
    assert _stored(got) == _stored(wanted)
    assert _rest(got) == _rest(wanted)


def _stored(metadata: Metadata) -> dict[Any, Any]:
    stored = {
        (index.fqn, index.offset, index.index): {name: value for name, value in vars(info).items() if value is not None}
        for index, info in metadata.storage_data.items()
    }
    assert len(stored) == len(metadata.storage_data)
    return stored


def _rest(metadata: Metadata) -> dict[str, Any]:
    rest = {name: value for name, value in vars(metadata).items() if not name.startswith(("state_dict", "storage_d"))}
    return {**rest, "storage_meta": vars(rest["storage_meta"]) if rest["storage_meta"] is not None else None}


def plain(data: bytes) -> Metadata:
    """What torch's readers get."""
    metadata = pickle.loads(data)
    assert type(metadata) is Metadata
    assert type(metadata.state_dict_metadata) is dict and type(metadata.storage_data) is dict
    assert all(
        type(entry.chunks) is list
        for entry in metadata.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    )
    return metadata


def described(metadata: Metadata) -> dict[str, Any]:
    """What metadata says of tensors, whatever order their chunks are in."""
    return {
        name: (vars(entry.properties), entry.size, sorted((chunk.offsets, chunk.sizes) for chunk in entry.chunks))
        if isinstance(entry, TensorStorageMetadata)
        else "object"
        for name, entry in metadata.state_dict_metadata.items()
    }


# Saves of all kinds

NAMES = st.one_of(
    st.builds("layers.{}.{}".format, st.integers(0, 120), st.sampled_from(["weight", "bias", "0.exp_avg"])),
    st.sampled_from(
        [
            *("", ".", "0", "00", "007", "1.2.3", "999999999", "1000000000", "12345678901234567890", "x" * 300),
            *("é" * 130, "\0", "a\0b", "1\0", "\ud800", "\ud83d\ude00", "\U0001f600", "\udfff\ud800", "a\nb"),
        ]
    ),
    st.text(max_size=8),
)
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex128, torch.float8_e4m3fn]
LARGE = st.sampled_from([2**31 - 1, 2**31, 2**32, 2**46, 2**47 - 1, 2**47, 2**50])
GAPS = st.sampled_from([0, 0, 0, 1, 2**15, 2**16, 2**31, 2**47, 2**52])


@st.composite
def _tensors(draw: st.DrawFn) -> TensorStorageMetadata:
    dims = draw(st.integers(0, 5))
    size = draw(st.lists(st.integers(0, 7), min_size=dims, max_size=dims))
    if dims and draw(st.booleans()):
        size[draw(st.integers(0, dims - 1))] = draw(LARGE)
        size = [extent if extent > 7 else min(extent, 2) for extent in size]
    spans: list[list[tuple[int, int]]] = []
    for extent in size:
        cuts = sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=2))})
        of_dim = [(start, end - start) for start, end in itertools.pairwise(cuts)] or [(0, 0)]
        if extent and draw(st.integers(0, 4)) == 0:
            of_dim.append((extent, 0))  # an empty shard at the end
        spans.append(of_dim)
    grid = list(itertools.product(*spans))
    chunks = [([start for start, _ in cell], [extent for _, extent in cell]) for cell in grid]
    entry = tensor_entry(size, draw(st.permutations(chunks)), draw(st.sampled_from(DTYPES)))
    entry.properties.requires_grad = draw(st.booleans())
    entry.properties.memory_format = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return entry


@st.composite
def saves(draw: st.DrawFn) -> VirtualSave:
    """Any save that columns can hold."""
    ranks = draw(st.integers(1, 5))
    # Tensors of a model are alike.
    kinds = draw(st.lists(st.one_of(_tensors(), st.just(BytesStorageMetadata())), min_size=1, max_size=3))
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    entries: dict[str, Any] = {name: draw(st.sampled_from(kinds)) for name in names}
    mixed = random.Random(draw(st.integers(0, 2**32)))
    items: list[list[WriteItem]] = [[] for _ in range(ranks)]
    for name, entry in entries.items():
        for number in range(len(entry.chunks) if isinstance(entry, TensorStorageMetadata) else 1):
            items[mixed.randrange(ranks)].append(write_item(name, entry, number))
    uploaded = []
    for of_rank in items:
        if draw(st.booleans()):
            mixed.shuffle(of_rank)
        checked, end = draw(st.sampled_from([True, True, False])), 0
        done = []
        for item in of_rank:
            end += draw(GAPS)
            data = item.tensor_data
            payload = None if data is None else draw(st.sampled_from([None, 0, 1, 300, 2**47]))
            nbytes = 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
            length = (payload or 0) + nbytes + draw(GAPS)
            crc64 = draw(st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1])) if checked else None
            done.append(UploadedItem(item, end, length, payload, crc64))
            end += length
        if done and draw(st.integers(0, 9)) == 0:
            done[-1].crc64 = None  # so the rank has no checksums
        uploaded.append(done)
    fields: dict[str, Any] = {}
    if draw(st.booleans()):
        fields = {"planner_data": {"deep": [1, ("a", {"b": names})]}, "added": {"by": ["a", "planner"], "n": 2**70}}
    if draw(st.integers(0, 3)) == 0:
        fields["storage_meta"] = None
    return finished(entries, uploaded, **fields)
