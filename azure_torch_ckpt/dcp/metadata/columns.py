"""Metadata as columns of numbers: how tensors are cut into chunks, and which blob has which item.

A checkpoint of 1,000 ranks has millions of chunks. An object for each takes minutes to make, to send and to read; a
column takes milliseconds. An **item** is a stored chunk or object. Items are numbered: the chunks of the first tensor,
then those of the next, in the order of the state dict.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, overload

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from azure_torch_ckpt.dcp.metadata.schema import is_row_major

__all__ = [
    "Chunks",
    "Entry",
    "Layout",
    "are_plain",
    "column",
    "count_items",
    "entries_of",
    "from_bytes",
    "is_plain_size",
    "place",
    "repeated",
    "to_bytes",
]

_MOST_DIMS = 1024
_MOST_ELEMENTS = 1 << 58  # so that their bytes are a number of 63 bits
# Pairs of chunks that are compared one by one where a layout is not a grid.
_MOST_COMPARED = 4096

_FIELDS = {TensorStorageMetadata: {"properties", "size", "chunks"}, ChunkStorageMetadata: {"offsets", "sizes"}}

_PROPERTIES = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "requires_grad": bool,
    "memory_format": torch.memory_format,
    "pin_memory": bool,
}


def column(numbers: Iterable[int]) -> torch.Tensor:
    """Make an int64 column. Raises `OverflowError` for a number that does not fit."""
    values = array("q", numbers)
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64, device="cpu")


def to_bytes(numbers: torch.Tensor) -> bytes:
    """The memory of a contiguous CPU tensor."""
    numbers = numbers.contiguous()
    return ctypes.string_at(numbers.data_ptr(), numbers.nbytes) if numbers.nbytes else b""


def from_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `to_bytes`, as one dimension."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")


def repeated(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Each value as often as its count says.

    ``torch.repeat_interleave`` wakes threads for a few numbers, which takes longer than a save of a small model.
    """
    ends = torch.cumsum(counts, dim=0)
    steps = torch.zeros(int(ends[-1]) + 1 if len(ends) else 1, dtype=torch.int64, device="cpu")
    steps.index_add_(0, ends, torch.ones(len(ends), dtype=torch.int64, device="cpu"))
    return values[torch.cumsum(steps[:-1], dim=0)]


@dataclass(slots=True, eq=False)
class Layout:
    """How a tensor is cut into chunks. Tensors that are cut alike share one.

    Attributes:
        offsets, sizes: int64, shape (chunks, dimensions).
    """

    offsets: torch.Tensor
    sizes: torch.Tensor
    _whole: dict[tuple[int, ...], bool] = field(default_factory=dict)
    _rows: tuple[list[torch.Size], list[torch.Size]] | None = None
    _numbers: dict[torch.Size, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def key(self) -> tuple[torch.Size, bytes, bytes]:
        """Equal for equal layouts."""
        return self.offsets.shape, to_bytes(self.offsets), to_bytes(self.sizes)

    @property
    def rows(self) -> tuple[list[torch.Size], list[torch.Size]]:
        """Offsets and sizes of each chunk as torch's metadata has them."""
        if self._rows is None:
            known: dict[tuple[int, ...], torch.Size] = {}
            offsets, sizes = (
                [known.setdefault(row, torch.Size(row)) for row in map(tuple, part.tolist())]
                for part in (self.offsets, self.sizes)
            )
            self._rows = offsets, sizes
        return self._rows

    def number_of(self, offsets: torch.Size) -> int | None:
        """The number of the chunk that begins there."""
        if not self._numbers:
            starts = self.rows[0]
            self._numbers = {starts[number]: number for number in reversed(range(len(starts)))}
        return self._numbers.get(offsets)

    def volumes(self) -> torch.Tensor:
        """Elements of each chunk."""
        return self.sizes.prod(dim=1)

    def is_inside(self, size: Sequence[int]) -> bool:
        """Whether all chunks lie inside a tensor of this size, which has as many dimensions."""
        whole = column(size)
        start, extent = self.offsets, self.sizes
        return bool(((start >= 0) & (extent >= 0) & (start <= whole) & (extent <= whole - start)).all())

    def is_whole(self, size: Sequence[int]) -> bool:
        """Whether the chunks, which lie inside a tensor of this size, are certain to hold each of its elements once."""
        key = tuple(size)
        known = self._whole.get(key)
        if known is None:
            known = self._whole[key] = int(self.volumes().sum()) == math.prod(key) and self._are_disjoint()
        return known

    def _are_disjoint(self) -> bool:
        filled = self.volumes() > 0
        starts, ends = self.offsets[filled], (self.offsets + self.sizes)[filled]
        if len(starts) < 2:
            return True
        if _is_grid(starts, ends):
            return True
        if len(starts) > _MOST_COMPARED:
            return False
        for row in range(len(starts) - 1):
            if bool(((starts[row] < ends[row + 1 :]) & (starts[row + 1 :] < ends[row])).all(dim=1).any()):
                return False
        return True

    def overlapping(self, start: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """The numbers of the chunks that have elements of a region."""
        first = column(start)
        end = first + column(sizes)
        shared = (self.offsets < end) & (self.offsets + self.sizes > first) & (self.sizes > 0)
        return torch.nonzero(shared.all(dim=1)).flatten().tolist()

    def places(self) -> torch.Tensor:
        """The `place` of the offsets of each chunk."""
        dims = self.offsets.shape[1]
        return (self.offsets * column(_weights(dims))).sum(dim=1) + dims  # modulo 2**64, as torch does it


def place(offsets: Sequence[int] | None) -> int:
    """One number for the offsets of a chunk, or of an object, which has none: hardly any others have the same."""
    if offsets is None:
        return -1
    number: int = (sum(map(operator.mul, offsets, _weights(len(offsets)))) + len(offsets)) % (1 << 64)
    return number - (1 << 64) if number >> 63 else number


@functools.cache
def _weights(dims: int) -> list[int]:
    weights = [pow(0x9E3779B97F4A7C15, dim + 1, 1 << 64) for dim in range(dims)]
    return [weight - (1 << 64) if weight >> 63 else weight for weight in weights]


def _is_grid(starts: torch.Tensor, ends: torch.Tensor) -> bool:
    """Whether no two chunks are the same cell of a grid, and all are cells of one."""
    for dim in range(starts.shape[1]):
        spans = torch.unique(torch.stack((starts[:, dim], ends[:, dim]), dim=1), dim=0)
        if bool((spans[1:, 0] < spans[:-1, 1]).any()):
            return False
    return len(torch.unique(starts, dim=0)) == len(starts)


class Chunks(Sequence[ChunkStorageMetadata]):
    """The chunks of a tensor, as a list of them. A pickle or copy is a list."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @overload
    def __getitem__(self, number: int) -> ChunkStorageMetadata: ...
    @overload
    def __getitem__(self, number: slice) -> list[ChunkStorageMetadata]: ...
    def __getitem__(self, number: int | slice) -> ChunkStorageMetadata | list[ChunkStorageMetadata]:
        offsets, sizes = self.layout.rows
        if isinstance(number, slice):
            return list(map(ChunkStorageMetadata, offsets[number], sizes[number]))
        return ChunkStorageMetadata(offsets[number], sizes[number])

    def __len__(self) -> int:
        return len(self.layout)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, Chunks)) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


@dataclass(slots=True, eq=False)
class Entry:
    """One key of the state dict: a tensor, or an object, which has no properties, size or layout.

    Attributes:
        first: the number of its first item.
    """

    name: str
    properties: TensorProperties | None = None
    size: torch.Size | None = None
    layout: Layout | None = None
    first: int = 0

    @property
    def count(self) -> int:
        """How many items it has."""
        return 1 if self.layout is None else len(self.layout)


def count_items(entries: Iterable[Entry]) -> int:
    """Number the items of all entries; return how many there are."""
    first = 0
    for entry in entries:
        entry.first = first
        first += entry.count
    return first


def entries_of(metadata: Metadata) -> list[Entry] | None:
    """Make columns of what a planner planned; None if there is anything in it that columns cannot hold."""
    items = metadata.state_dict_metadata
    if type(items) is not dict:
        return None
    entries: list[Entry] = []
    layouts: dict[Any, Layout] = {}
    sound: set[tuple[int, torch.Size]] = set()
    for name, item in items.items():
        if type(name) is not str:
            return None
        if type(item) is BytesStorageMetadata and not vars(item):
            entries.append(Entry(name))
            continue
        if type(item) is not TensorStorageMetadata or vars(item).keys() != _FIELDS[TensorStorageMetadata]:
            return None
        try:
            layout = _layout_of(item, layouts)
        except (AttributeError, OverflowError, TypeError, ValueError):
            return None
        if layout is None or not are_plain(item.properties) or type(item.size) is not torch.Size:
            return None
        if (id(layout), item.size) not in sound:
            if not is_plain_size(item.size) or not layout.is_inside(item.size):
                return None
            sound.add((id(layout), item.size))
        entries.append(Entry(name, _without_strides(item.properties, item.size, layout), item.size, layout))
    count_items(entries)
    return entries


def is_plain_size(size: Sequence[int]) -> bool:
    """Whether columns can hold the chunks of a tensor of this size."""
    return len(size) <= _MOST_DIMS and math.prod(size) < _MOST_ELEMENTS


def are_plain(properties: TensorProperties) -> bool:
    """Whether they are as torch makes them."""
    if type(properties) is not TensorProperties:
        return False
    values = dict(vars(properties))
    strides = values.pop("strides", None)
    return (strides is None or set(map(type, strides)) <= {int}) and {
        name: type(value) for name, value in values.items()
    } == _PROPERTIES


def _without_strides(properties: TensorProperties, size: torch.Size, layout: Layout) -> TensorProperties:
    """Leave out strides (of torch 2.15) that follow from the size, or from that of a shard."""
    strides = getattr(properties, "strides", None)
    if strides is None or not (is_row_major(strides, size) or is_row_major(strides, layout.sizes[0].tolist())):
        return properties
    plain = object.__new__(TensorProperties)
    vars(plain).update(vars(properties), strides=None)
    return plain


def _layout_of(item: TensorStorageMetadata, layouts: dict[Any, Layout]) -> Layout | None:
    chunks: Any = item.chunks
    dims = len(item.size)
    if isinstance(chunks, Chunks):
        return chunks.layout if chunks.layout.offsets.shape[1] == dims else None
    if type(chunks) is not list or not chunks or set(map(type, chunks)) != {ChunkStorageMetadata}:
        return None
    if set(map(len, map(vars, chunks))) != {2}:
        return None
    flat = []
    for part in ("offsets", "sizes"):
        rows = list(map(operator.attrgetter(part), chunks))
        if set(map(type, rows)) != {torch.Size} or set(map(len, rows)) != {dims}:
            return None
        flat.append(array("q", chain.from_iterable(rows)))
    key = len(chunks), flat[0].tobytes(), flat[1].tobytes()
    layout = layouts.get(key)
    if layout is None:
        shape = len(chunks), dims
        layout = layouts[key] = Layout(column(flat[0]).reshape(shape), column(flat[1]).reshape(shape))
    return layout
