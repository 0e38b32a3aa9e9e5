"""`Geometry`: where tensors lie in the memory that they share, and which of them must be stored to keep every byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from azure_torch_ckpt.dcp.tensors.regions import row_major

__all__ = ["Geometry", "carve", "positions_to_store"]

# The size of the largest element of any dtype, a complex128. Every dtype can have an offset that is a multiple of it.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Geometry:
    """A strided tensor's place in its storage.

    Attributes:
        offset: bytes from the storage's start to the first element.
        size: of each dimension, in elements.
        stride: of each dimension, in elements.

    Raises:
        ValueError: no tensor can have this geometry.
    """

    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or min(numbers) < 0 or self.offset % self.dtype.itemsize:
            raise ValueError(f"No tensor can have {self}")

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Geometry:
        offset = int(tensor.storage_offset()) * tensor.itemsize
        return cls(tensor.dtype, offset, tuple(tensor.shape), tuple(tensor.stride()))

    @property
    def end(self) -> int:
        """Bytes from the storage's start to behind the last element."""
        if 0 in self.size:
            return self.offset
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return self.offset + (last + 1) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        return self.stride == row_major(self.size)

    @property
    def is_dense(self) -> bool:
        """Whether the elements fill the memory from the first to the last, in any order."""
        return math.prod(self.size) * self.dtype.itemsize == self.end - self.offset

    def stored(self) -> Geometry:
        """The tensor to store for this one: it has the same bytes, and no two of its elements share memory.

        It differs from this one only if elements are repeated. What `expand` repeats is stored once; for any other
        overlap, everything from the first element to the last is stored, in one dimension.
        """
        dims = list(zip(self.size, self.stride, strict=True))
        once = tuple(1 if stride == 0 and size > 1 else size for size, stride in dims)
        reach = 1  # elements up to which the dimensions with smaller strides extend
        for stride, size in sorted((stride, size) for (_, stride), size in zip(dims, once, strict=True) if size > 1):
            if stride < reach:
                length = (self.end - self.offset) // self.dtype.itemsize
                return Geometry(self.dtype, self.offset, (length,), (1,))
            reach += (size - 1) * stride
        return Geometry(self.dtype, self.offset, once, self.stride)


def positions_to_store(geometries: Sequence[Geometry]) -> list[int]:
    """Which tensors of one storage must be stored (as `Geometry.stored`) to keep the bytes of all of them.

    A tensor that lies within a dense one need not be stored; of equal tensors the first is.

    Returns:
        Positions in `geometries`.
    """
    chosen: list[int] = []
    taken: set[Geometry] = set()
    dense_to = -1  # the farthest end of a dense tensor that starts no later than the current one
    stored = [geometry.stored() for geometry in geometries]
    for position in sorted(range(len(stored)), key=lambda at: (stored[at].offset, -stored[at].end, at)):
        geometry = stored[position]
        if geometry in taken or geometry.end <= dense_to:
            continue
        chosen.append(position)
        taken.add(geometry)
        if geometry.is_dense and geometry.end > geometry.offset:
            dense_to = max(dense_to, geometry.end)
    return sorted(chosen)


def carve(geometries: Sequence[Geometry], device: torch.device) -> list[torch.Tensor]:
    """New tensors in one new storage, at the relative positions of `geometries`. Their values are undefined."""
    start = min((geometry.offset for geometry in geometries), default=0) // _ALIGNMENT * _ALIGNMENT
    end = max((geometry.end for geometry in geometries), default=0)
    storage = torch.empty(max(end - start, 0), dtype=torch.uint8, device=device).untyped_storage()
    return [
        torch.empty(0, dtype=geometry.dtype, device=device).set_(
            storage, (geometry.offset - start) // geometry.dtype.itemsize, geometry.size, geometry.stride
        )
        for geometry in geometries
    ]
