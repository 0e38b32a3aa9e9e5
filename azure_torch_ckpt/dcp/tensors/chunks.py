"""Boxes (rectangular parts) of a tensor: cut from it in row-major order, compared, put together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "are_apart", "boxes", "make_up"]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor: its first index and its extent, one number per dimension of each."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def overlap(self, offsets: Sequence[int], sizes: Sequence[int]) -> Box | None:
        """The part that lies in another box as well, or None."""
        first = tuple(map(max, self.offsets, offsets))
        ends = tuple(
            min(mine + size, theirs + extent)
            for mine, size, theirs, extent in zip(self.offsets, self.sizes, offsets, sizes, strict=True)
        )
        if any(start >= end for start, end in zip(first, ends, strict=True)):
            return None
        return Box(first, tuple(end - start for start, end in zip(first, ends, strict=True)))


def boxes(sizes: Sequence[int], limit: int) -> Iterator[Box]:
    """Boxes of at most `limit` elements (at least one) that make up a tensor, in row-major order.

    Each is one index of the first dimensions, a range of the next one, and all of the others. So the part of a box that
    lies in any chunk of the tensor is one run of that chunk's elements, which is what reading them once needs.
    """
    if math.prod(sizes) > 0:
        yield from _boxes((), tuple(sizes), max(limit, 1))


def are_apart(parts: Sequence[Box]) -> bool:
    """Whether no element lies in two of the boxes."""
    if len(parts) < 2:
        return True
    dims = range(len(parts[0].sizes))
    if not dims:
        return False
    # Most tensors are cut in one dimension: sorted by it, a box has few others to be compared with.
    dim = max(dims, key=lambda dim: len({part.offsets[dim] for part in parts}))
    near: list[Box] = []
    for part in sorted(parts, key=lambda part: part.offsets[dim]):
        near = [other for other in near if other.offsets[dim] + other.sizes[dim] > part.offsets[dim]]
        if any(part.overlap(other.offsets, other.sizes) is not None for other in near):
            return False
        near.append(part)
    return True


def make_up(sizes: Sequence[int], parts: Iterable[Box]) -> bool:
    """Whether the boxes, which lie inside a tensor of these sizes, hold each of its elements once."""
    filled = [part for part in parts if math.prod(part.sizes)]
    return sum(math.prod(part.sizes) for part in filled) == math.prod(sizes) and are_apart(filled)


def _boxes(before: tuple[int, ...], sizes: tuple[int, ...], limit: int) -> Iterator[Box]:
    ones = (1,) * len(before)
    if math.prod(sizes) <= limit:
        yield Box(before + (0,) * len(sizes), ones + sizes)
        return
    inner = math.prod(sizes[1:])
    rows = limit // inner
    if rows == 0:
        for index in range(sizes[0]):
            yield from _boxes((*before, index), sizes[1:], limit)
        return
    for start in range(0, sizes[0], rows):
        rest = sizes[1:]
        yield Box((*before, start, *(0 for _ in rest)), (*ones, min(rows, sizes[0] - start), *rest))
