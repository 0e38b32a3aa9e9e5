"""`TensorChunk`, a rectangular part of a tensor: cut from it in row-major order, compared, put together.

Also whether chunks cover a tensor: all of it as it was saved, and all that a load wants of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor

from azure_torch_ckpt._internal.torch_private import create_chunk_list

__all__ = ["TensorChunk", "are_disjoint", "cut", "fill_exactly", "find_uncovered", "is_whole"]


@dataclass(frozen=True, slots=True)
class TensorChunk:
    """A rectangular part of a tensor: its first index and its extent, one number per dimension of each."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def overlap(self, offsets: Sequence[int], sizes: Sequence[int]) -> TensorChunk | None:
        """The part that lies in another chunk as well, or None."""
        first = tuple(map(max, self.offsets, offsets))
        ends = tuple(
            min(mine + size, theirs + extent)
            for mine, size, theirs, extent in zip(self.offsets, self.sizes, offsets, sizes, strict=True)
        )
        if any(start >= end for start, end in zip(first, ends, strict=True)):
            return None
        return TensorChunk(first, tuple(end - start for start, end in zip(first, ends, strict=True)))


def cut(sizes: Sequence[int], limit: int) -> Iterator[TensorChunk]:
    """Cut a tensor into chunks of at most `limit` elements (at least one), in row-major order.

    Each is one index of the first dimensions, a range of the next one, and all of the others. So what such a chunk
    shares with any other chunk of the tensor is one run of that one's elements, which is what reading them once needs.
    """
    if math.prod(sizes) > 0:
        yield from _cut((), tuple(sizes), max(limit, 1))


def _cut(before: tuple[int, ...], sizes: tuple[int, ...], limit: int) -> Iterator[TensorChunk]:
    ones = (1,) * len(before)
    if math.prod(sizes) <= limit:
        yield TensorChunk(before + (0,) * len(sizes), ones + sizes)
        return
    inner = math.prod(sizes[1:])
    rows = limit // inner
    if rows == 0:
        for index in range(sizes[0]):
            yield from _cut((*before, index), sizes[1:], limit)
        return
    for start in range(0, sizes[0], rows):
        rest = sizes[1:]
        yield TensorChunk((*before, start, *(0 for _ in rest)), (*ones, min(rows, sizes[0] - start), *rest))


def are_disjoint(chunks: Sequence[TensorChunk]) -> bool:
    """Whether no element lies in two of the chunks."""
    if len(chunks) < 2:
        return True
    dims = range(len(chunks[0].sizes))
    if not dims:
        return False
    # Most tensors are cut in one dimension: sorted by it, a chunk has few others to be compared with.
    dim = max(dims, key=lambda dim: len({chunk.offsets[dim] for chunk in chunks}))
    near: list[TensorChunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[dim]):
        near = [other for other in near if other.offsets[dim] + other.sizes[dim] > chunk.offsets[dim]]
        if any(chunk.overlap(other.offsets, other.sizes) is not None for other in near):
            return False
        near.append(chunk)
    return True


def fill_exactly(sizes: Sequence[int], chunks: Iterable[TensorChunk]) -> bool:
    """Whether the chunks, which lie inside a tensor of these sizes, hold each of its elements once."""
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    return sum(math.prod(chunk.sizes) for chunk in filled) == math.prod(sizes) and are_disjoint(filled)


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
