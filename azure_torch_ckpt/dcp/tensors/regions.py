"""Which bytes of a stored chunk hold a rectangular region of it.

A chunk lies in its blob row-major, without gaps. A region that spans whole rows is one run of bytes; a region of
columns is one run per row. Where the runs lie close together they are fetched as the smallest range that encloses them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Band", "bands", "row_major"]


@dataclass(frozen=True, slots=True)
class Band:
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


def row_major(sizes: Sequence[int]) -> list[int]:
    """Strides, in elements, of a contiguous tensor."""
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * sizes[dim + 1]
    return strides


def bands(
    chunk: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    itemsize: int,
    *,
    limit: int,
    gap: int,
    split_dense: bool,
) -> Iterator[Band]:
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
    yield from cut.parts([0] * len(sizes), list(sizes), first, 0)


@dataclass(frozen=True, slots=True)
class _Cut:
    strides: list[int]  # in bytes
    itemsize: int
    limit: int
    gap: int
    split_dense: bool

    def parts(self, start: list[int], sizes: list[int], offset: int, dim: int) -> Iterator[Band]:
        while dim < len(sizes) and sizes[dim] == 1:
            dim += 1
        wanted = math.prod(sizes) * self.itemsize
        length = sum((size - 1) * stride for size, stride in zip(sizes, self.strides, strict=True)) + self.itemsize
        dense = length == wanted
        fits = length <= self.limit or (dense and not self.split_dense)
        if dim == len(sizes):
            yield Band(tuple(start), tuple(sizes), offset, length, True)
            return
        inner = length - (sizes[dim] - 1) * self.strides[dim]  # encloses one index of `dim`
        close = self.strides[dim] - inner <= self.gap
        if fits and (dense or close):
            yield Band(tuple(start), tuple(sizes), offset, length, dense)
            return
        step = 1
        if close and inner <= self.limit:
            step = (self.limit - inner) // self.strides[dim] + 1
        for index in range(0, sizes[dim], step):
            part_start, part_sizes = list(start), list(sizes)
            part_start[dim] += index
            part_sizes[dim] = min(step, sizes[dim] - index)
            yield from self.parts(part_start, part_sizes, offset + index * self.strides[dim], dim)
