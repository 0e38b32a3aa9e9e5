"""How a rectangular region of a stored chunk, say the columns of one rank, is read into a tensor in memory.

A chunk lies in its blob row-major, without gaps. A region that spans whole rows is one run of bytes; a region of
columns is one run per row. Where the runs lie close together they are fetched as the smallest range that encloses them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from azure_torch_ckpt.blobs.download import GAP, Check, Read
from azure_torch_ckpt.dcp.tensors.copies import write_elements
from azure_torch_ckpt.dcp.tensors.memory import own_bytes, writable

__all__ = ["RegionRange", "region_ranges", "region_reads", "row_major"]


@dataclass(frozen=True, slots=True)
class RegionRange:
    """A part of a region, and the one range of bytes that encloses it.

    Attributes:
        start: first index of the part in the region, one per dimension.
        sizes: extent of the part, one per dimension.
        offset: first byte of the range, from the chunk's first byte.
        length: bytes of the range.
        dense: whether the range holds the part and nothing else.
    """

    start: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    length: int
    dense: bool


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, in elements, as torch gives them to a new one."""
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(sizes[dim + 1], 1)
    return tuple(strides)


def region_ranges(
    chunk: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    itemsize: int,
    *,
    limit: int,
    gap: int,
    split_dense: bool,
) -> Iterator[RegionRange]:
    """Cut a region into parts whose enclosing ranges are worth a fetch each.

    Args:
        chunk: sizes of the stored chunk.
        offsets: where the region starts in the chunk.
        sizes: extent of the region; the same number of dimensions.
        itemsize: bytes of an element.
        limit: largest range in bytes.
        gap: bytes between two runs that are still fetched rather than skipped.
        split_dense: whether the limit holds for dense parts too.
    """
    if math.prod(sizes) == 0:
        return
    cut = _Cut([stride * itemsize for stride in row_major(chunk)], itemsize, limit, gap, split_dense)
    first = sum(offset * stride for offset, stride in zip(offsets, cut.strides, strict=True))
    yield from cut.ranges([0] * len(sizes), list(sizes), first, 0)


@dataclass(frozen=True, slots=True)
class _Cut:
    strides: list[int]  # in bytes
    itemsize: int
    limit: int
    gap: int
    split_dense: bool

    def ranges(self, start: list[int], sizes: list[int], offset: int, dim: int) -> Iterator[RegionRange]:
        while dim < len(sizes) and sizes[dim] == 1:
            dim += 1
        wanted = math.prod(sizes) * self.itemsize
        length = sum((size - 1) * stride for size, stride in zip(sizes, self.strides, strict=True)) + self.itemsize
        dense = length == wanted
        fits = length <= self.limit or (dense and not self.split_dense)
        if dim == len(sizes):
            yield RegionRange(tuple(start), tuple(sizes), offset, length, True)
            return
        inner = length - (sizes[dim] - 1) * self.strides[dim]  # encloses one index of `dim`
        close = self.strides[dim] - inner <= self.gap
        if fits and (dense or close):
            yield RegionRange(tuple(start), tuple(sizes), offset, length, dense)
            return
        step = 1
        if close and inner <= self.limit:
            step = (self.limit - inner) // self.strides[dim] + 1
        for index in range(0, sizes[dim], step):
            part_start, part_sizes = list(start), list(sizes)
            part_start[dim] += index
            part_sizes[dim] = min(step, sizes[dim] - index)
            yield from self.ranges(part_start, part_sizes, offset + index * self.strides[dim], dim)


def region_reads(
    path: str,
    payload: int,
    dtype: torch.dtype,
    chunk: Sequence[int],
    offsets: Sequence[int],
    target: torch.Tensor,
    *,
    limit: int,
    check: Check | None,
) -> Iterator[Read]:
    """Yield the reads that fill `target` with the region of the same shape that starts at `offsets` of a stored chunk.

    The bytes go straight into `target` where it is contiguous CPU memory of the stored dtype. Otherwise they go through
    buffers of at most `limit` bytes each, and are copied, cast and moved to the device from there.

    Args:
        path: the blob's name in the container.
        payload: where in the blob the chunk's raw bytes start.
        dtype: of the stored chunk.
        chunk: the stored chunk's sizes.
        check: for a region that is the whole chunk.
    """
    in_place = target.dtype == dtype and own_bytes(target) is not None
    itemsize = dtype.itemsize
    for one in region_ranges(chunk, offsets, target.shape, itemsize, limit=limit, gap=GAP, split_dense=not in_place):
        part = target
        for dim, (start, size) in enumerate(zip(one.start, one.sizes, strict=True)):
            if size != part.shape[dim]:
                part = part.narrow(dim, start, size)
        if in_place and one.dense:
            yield Read(path, payload + one.offset, one.length, writable(part), None, check)
        else:
            strides = row_major(one.sizes if one.dense else chunk)
            copy = functools.partial(_copy_into, part, dtype, one.sizes, strides)
            yield Read(path, payload + one.offset, one.length, None, copy, check)


def _copy_into(
    part: torch.Tensor, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], received: memoryview
) -> None:
    write_elements(torch.frombuffer(received, dtype=dtype).as_strided(sizes, strides), part, "A tensor")
