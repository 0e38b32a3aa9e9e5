"""Whether a checkpoint has all that a load wants of each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor

from azure_torch_ckpt._internal.torch_private import create_chunk_list
from azure_torch_ckpt.dcp.tensors.chunks import Box, make_up

__all__ = ["find_uncovered", "is_whole"]


def is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether the chunks of a tensor, which lie inside it, hold each of its elements once."""
    chunks = entry.chunks
    if len(chunks) == 1 and chunks[0].sizes == entry.size:
        return True
    return make_up(entry.size, (Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks))


def find_uncovered(plan: LoadPlan, planner: LoadPlanner, metadata: Metadata) -> str | None:
    """The key of a tensor that the plan would not fill, or not once; None where there is no such tensor.

    torch plans what the stored chunks hold of a tensor, and leaves the rest of it as it is. So this looks at tensors
    with chunks that do not make them up: after a save with ``use_collectives=False``, in damaged metadata.
    """
    stored = metadata.state_dict_metadata
    wanted = getattr(planner, "state_dict", None)  # of torch's planners and what derives from them
    if not isinstance(wanted, dict):
        wanted = {}
    names = {item.storage_index.fqn for item in plan.items} | (wanted.keys() & stored.keys())
    partly = {
        name for name in names if isinstance(entry := stored.get(name), TensorStorageMetadata) and not is_whole(entry)
    }
    if not partly:
        return None
    filled: dict[tuple[str, torch.Size | None], list[Box]] = {}
    for item in plan.items:
        if item.storage_index.fqn in partly:
            index = item.dest_index
            box = Box(tuple(item.dest_offsets), tuple(item.lengths))
            filled.setdefault((index.fqn, index.offset), []).append(box)
    # A planner may have other names for its tensors than the checkpoint.
    for name in sorted({name for name, _ in filled} | (partly & wanted.keys())):
        if any(not make_up(sizes, filled.get((name, offsets), ())) for offsets, sizes in _chunks(wanted.get(name))):
            return name
    return None


def _chunks(target: Any) -> Iterable[tuple[torch.Size, torch.Size]]:
    """The offsets and sizes of what this rank has of a tensor, if it is one."""
    if not isinstance(target, torch.Tensor) and not hasattr(target, "__create_chunk_list__"):
        return
    if isinstance(target, DTensor) and target.device_mesh.get_coordinate() is None:
        return  # another rank's affair
    for chunk in create_chunk_list(target):
        if math.prod(chunk.sizes):
            yield chunk.offsets, chunk.sizes
