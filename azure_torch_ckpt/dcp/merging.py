"""`merge_metadata`: the metadata that each rank wrote for itself becomes that of one checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from azure_torch_ckpt.dcp.metadata.views import StoredItems
from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk, are_disjoint, fill_exactly
from azure_torch_ckpt.errors import UnsupportedCheckpointError

__all__ = ["merge_metadata"]

# The chunks of one tensor by their offsets and sizes, each with the metadata that has it.
_Chunks = dict[tuple[torch.Size, torch.Size], tuple[ChunkStorageMetadata, Metadata]]


def merge_metadata(parts: Sequence[Metadata], where: str, *, own_values: bool = False) -> Metadata:
    """Merge the metadata of the ranks of a save without collectives. No element of a tensor is in two chunks of it.

    Without collectives, each rank stores its copy of what is replicated. The first of `parts` that has a chunk or an
    object counts.

    Args:
        parts: not changed.
        where: names the checkpoint in messages.
        own_values: under a key that has tensors of several shapes or dtypes, or a tensor and an object, the ranks have
            values of their own, and that of the first of `parts` counts as it does for objects. False raises.

    Raises:
        UnsupportedCheckpointError: the chunks of a tensor overlap, and no choice of them holds each element once; or
            `own_values` is False, and there is such a key.
    """
    if len(parts) == 1:
        return parts[0]
    stored = {id(part): _items(part) for part in parts}
    entries: dict[str, Any] = {}
    owners: dict[str, Metadata] = {}
    chunks: dict[str, _Chunks] = {}
    paths: dict[str, Any] = {}
    for part in parts:
        for key, entry in part.state_dict_metadata.items():
            known = entries.setdefault(key, entry)
            owners.setdefault(key, part)
            if not _are_of_one_value(known, entry):
                if not own_values:
                    raise UnsupportedCheckpointError(
                        f"The ranks saved different tensors under the name {key!r} (use_collectives=False), so there "
                        "is no one state dict. Load each rank's own with dcp.load"
                    )
            elif isinstance(entry, TensorStorageMetadata):
                of_tensor = chunks.setdefault(key, {})
                for chunk in entry.chunks:
                    of_tensor.setdefault((chunk.offsets, chunk.sizes), (chunk, part))
        if isinstance(part.planner_data, dict):
            paths = {**part.planner_data, **paths}
    storage: dict[MetadataIndex, Any] = {}
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            chosen = _choose(chunks[key], entry.size, f"{key!r} of {where}")
            entries[key] = TensorStorageMetadata(entry.properties, entry.size, [chunk for chunk, _ in chosen])
            for chunk, part in chosen:
                index = MetadataIndex(key, chunk.offsets)
                storage[index] = stored[id(part)][index]
        else:
            index = MetadataIndex(key)
            storage[index] = stored[id(owners[key])][index]
    return Metadata(entries, paths, storage, parts[0].storage_meta, parts[0].version)


def _items(part: Metadata) -> Mapping[MetadataIndex, Any]:
    items: Mapping[MetadataIndex, Any] = part.storage_data
    return items.to_dict() if isinstance(items, StoredItems) else items  # one by one would take long


def _are_of_one_value(one: object, other: object) -> bool:
    """Whether two ranks' entries under one key can be of one tensor, or are objects."""
    if isinstance(one, TensorStorageMetadata) and isinstance(other, TensorStorageMetadata):
        return bool(one.size == other.size and one.properties.dtype == other.properties.dtype)
    return isinstance(one, BytesStorageMetadata) and isinstance(other, BytesStorageMetadata)


def _choose(chunks: _Chunks, size: torch.Size, what: str) -> list[tuple[ChunkStorageMetadata, Metadata]]:
    """Choose chunks of which no two overlap and which hold all that is stored of the tensor."""
    every = [(TensorChunk(tuple(offsets), tuple(sizes)), chosen) for (offsets, sizes), chosen in chunks.items()]
    filled = [(chunk, chosen) for chunk, chosen in every if math.prod(chunk.sizes)]
    if not are_disjoint([chunk for chunk, _ in filled]):
        # A tensor that is whole on one rank and in shards on others, or in shards of several sizes.
        picked: list[tuple[TensorChunk, tuple[ChunkStorageMetadata, Metadata]]] = []
        for chunk, chosen in sorted(filled, key=lambda one: -math.prod(one[0].sizes)):
            if all(chunk.overlap(other.offsets, other.sizes) is None for other, _ in picked):
                picked.append((chunk, chosen))
        if not fill_exactly(size, [chunk for chunk, _ in picked]):
            raise UnsupportedCheckpointError(
                f"The ranks saved overlapping chunks of {what} (use_collectives=False), and no choice of them holds "
                "each element once. Load it on as many ranks as saved it, sharded in the same way"
            )
        filled = picked
    # Empty chunks, which may have the offsets of others, are needed only of a tensor without elements.
    return [chosen for _, chosen in filled or every[:1]]
