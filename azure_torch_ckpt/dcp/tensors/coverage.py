"""Whether the chunks of a tensor cover it: all of it as it was saved, and all that a load wants of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor

from azure_torch_ckpt._internal.torch_private import create_chunk_list
from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk, fill_exactly

__all__ = ["find_uncovered", "is_whole"]


def is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether the stored chunks of a tensor, which lie inside it, hold each of its elements once."""
    chunks = entry.chunks
    if len(chunks) == 1 and chunks[0].sizes == entry.size:
        return True
    return fill_exactly(entry.size, (TensorChunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks))


def find_uncovered(plan: LoadPlan, planner: LoadPlanner, metadata: Metadata) -> str | None:
    """Find a tensor that the plan would not fill, or not once; return its key, or None if there is none.

    torch plans what the stored chunks hold of a tensor, and leaves the rest of it as it is. So this looks at tensors
    that their chunks do not cover: after a save with ``use_collectives=False``, in damaged metadata.
    """
    stored = metadata.state_dict_metadata
    wanted = getattr(planner, "state_dict", None)  # torch's planners and their subclasses have it
    if not isinstance(wanted, dict):
        wanted = {}
    names = {item.storage_index.fqn for item in plan.items} | (wanted.keys() & stored.keys())
    partial = {
        name for name in names if isinstance(entry := stored.get(name), TensorStorageMetadata) and not is_whole(entry)
    }
    if not partial:
        return None
    filled: dict[tuple[str, torch.Size | None], list[TensorChunk]] = {}
    for item in plan.items:
        if item.storage_index.fqn in partial:
            index = item.dest_index
            chunk = TensorChunk(tuple(item.dest_offsets), tuple(item.lengths))
            filled.setdefault((index.fqn, index.offset), []).append(chunk)
    # A planner may have other names for its tensors than the checkpoint.
    for name in sorted({name for name, _ in filled} | (partial & wanted.keys())):
        if any(
            not fill_exactly(sizes, filled.get((name, offsets), ()))
            for offsets, sizes in _chunks_of_this_rank(wanted.get(name))
        ):
            return name
    return None


def _chunks_of_this_rank(target: Any) -> Iterable[tuple[torch.Size, torch.Size]]:
    """Yield offsets and sizes of what this rank has of a tensor; nothing for anything else."""
    if not isinstance(target, torch.Tensor) and not hasattr(target, "__create_chunk_list__"):
        return
    if isinstance(target, DTensor) and target.device_mesh.get_coordinate() is None:
        return  # only other ranks have chunks of it
    for chunk in create_chunk_list(target):
        if math.prod(chunk.sizes):
            yield chunk.offsets, chunk.sizes
