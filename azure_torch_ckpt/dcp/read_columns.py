"""Load plans as columns: what torch gathers of them, and scatters again, is some KB instead of 200 bytes an item."""

from __future__ import annotations

import zlib
from array import array
from collections import UserList
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from azure_torch_ckpt.dcp.metadata.columns import column
from azure_torch_ckpt.dcp.metadata.names import pack_names, unpack_names
from azure_torch_ckpt.dcp.metadata.sections import narrow, widen, width_of

__all__ = ["PlannedReads"]

_FIELDS = 5  # of an item are numbers: two offsets in indices, two offsets, lengths
_ABSENT = -1  # of an offset or a hint


class PlannedReads(UserList[ReadItem]):
    """The items of a load plan, a list in all. They are made when they are asked for, on the rank that does."""

    def __init__(self, items: Sequence[ReadItem] | None = None, packed: bytes | None = None) -> None:
        self._packed = packed
        self._items: list[ReadItem] | None = None if packed is not None else list(items or ())

    @property
    def data(self) -> list[ReadItem]:  # type: ignore[override]
        if self._items is None:
            assert self._packed is not None
            self._items = list(_unpack(self._packed))
            self._packed = None  # the list may be changed
        return self._items

    def __reduce__(self) -> tuple[Any, ...]:
        packed = self._packed
        if packed is None:
            packed = _pack(self.data)
        return (PlannedReads, (self.data,)) if packed is None else (PlannedReads, (None, packed))


def _pack(items: list[ReadItem]) -> bytes | None:
    """Encode items; None if there is anything in them that columns cannot hold."""
    lengths: list[int] = []
    numbers = array("q")
    hints: list[int] = []
    types: list[bool] = []
    try:
        for item in items:
            dest, storage = item.dest_index, item.storage_index
            if type(item) is not ReadItem or {type(dest), type(storage)} != {MetadataIndex}:
                return None
            for part in (dest.offset, item.dest_offsets, storage.offset, item.storage_offsets, item.lengths):
                lengths.append(_ABSENT if part is None else len(part))
                numbers.extend(part or ())
            hints += (_ABSENT if hint is None else hint for hint in (dest.index, storage.index))
            types.append(item.type is LoadItemType.TENSOR)
        columns = [column(types), column(hints) + 1, column(lengths) + 1, column(numbers)]
    except (AttributeError, TypeError, OverflowError):
        return None
    if any(len(part) and int(part.min()) < 0 for part in columns):
        return None
    dest_names, storage_names = (
        (
            tuple(index.fqn for index in indices)
            for indices in zip(*((item.dest_index, item.storage_index) for item in items), strict=True)
        )
        if items
        else ((), ())
    )
    names = pack_names(dest_names), b"" if storage_names == dest_names else pack_names(storage_names)
    widths = [width_of(part) for part in columns]
    packed = zlib.compress(b"".join(narrow(part, width) for part, width in zip(columns, widths, strict=True)))
    sizes = (len(items), len(numbers), len(names[0]), len(names[1]))
    return b"".join((*(size.to_bytes(8, "little") for size in sizes), bytes(widths), *names, packed))


def _unpack(packed: bytes) -> Iterator[ReadItem]:
    count, total, *name_sizes = (int.from_bytes(packed[at : at + 8], "little") for at in range(0, 32, 8))
    widths, at = packed[32:36], 36
    names: list[tuple[str, ...]] = []
    for size in name_sizes:
        names.append(unpack_names(packed[at : at + size]) if size else names[0])
        at += size
    raw = zlib.decompress(packed[at:])
    columns = []
    at = 0
    for width, numbers in zip(widths, (count, 2 * count, _FIELDS * count, total), strict=True):
        columns.append(widen(raw[at : at + width * numbers], width, numbers).tolist())
        at += width * numbers
    types, hints, lengths, values = columns
    known: dict[tuple[int, ...], torch.Size] = {}
    at = 0
    for number, (dest_name, storage_name) in enumerate(zip(*names, strict=True)):
        parts: list[Any] = []
        for length in lengths[_FIELDS * number : _FIELDS * (number + 1)]:
            if not length:
                parts.append(None)
                continue
            key = tuple(values[at : at + length - 1])
            parts.append(known.setdefault(key, torch.Size(key)))
            at += length - 1
        dest_hint, storage_hint = (hint - 1 if hint else None for hint in hints[2 * number : 2 * number + 2])
        yield ReadItem(
            LoadItemType.TENSOR if types[number] else LoadItemType.BYTE_IO,
            MetadataIndex(dest_name, parts[0], dest_hint),
            parts[1],
            MetadataIndex(storage_name, parts[2], storage_hint),
            parts[3],
            parts[4],
        )
