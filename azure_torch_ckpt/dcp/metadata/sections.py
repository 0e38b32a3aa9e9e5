"""A section: where the items of one data blob lie in it, and their checksums, in a few bytes an item.

The rank that wrote the blob makes it, and the coordinator stores it in the metadata as it is (`index.py`).
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from azure_torch_ckpt.dcp.metadata.columns import column, from_bytes, to_bytes

__all__ = ["Section", "decode_section", "encode_section", "inflate", "narrow", "section_items", "widen", "width_of"]

_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Items; whether there are checksums; bytes of a number in each of three columns; bytes of these columns, compressed.
_HEAD = struct.Struct("<I?BBBI")


def width_of(numbers: torch.Tensor) -> int:
    """The fewest bytes that hold each of these natural numbers: 1, 2, 4 or 8; 0 if all are 0."""
    most = int(numbers.max()) if len(numbers) else 0
    return 0 if most == 0 else 1 if most < 1 << 8 else 2 if most < 1 << 15 else 4 if most < 1 << 31 else 8


def narrow(numbers: torch.Tensor, width: int) -> bytes:
    """The numbers with `width` bytes for each, the lowest first."""
    return to_bytes(numbers.to(_DTYPES[width])) if width else b""


def widen(data: bytes, width: int, count: int) -> torch.Tensor:
    """The inverse of `narrow`, as int64.

    Raises:
        ValueError: the bytes are not `count` natural numbers.
    """
    if not width:
        return torch.zeros(count, dtype=torch.int64, device="cpu")
    if len(data) != width * count:
        raise ValueError(f"{len(data)} bytes are not {count} numbers of {width} bytes")
    numbers = from_bytes(data, _DTYPES[width]).to(torch.int64)
    if count and int(numbers.min()) < 0:
        raise ValueError("a number is negative")
    return numbers


@dataclass(slots=True, eq=False)
class Section:
    """The items of one data blob, in the order in which they lie in it.

    Attributes:
        offsets, lengths: bytes, int64.
        payloads: where the raw bytes of a tensor begin in its item; -1: only ``torch.load`` can read the item.
        crc64: of each item, as an int64 with the same bits; None if no checksums were made.
    """

    offsets: torch.Tensor
    lengths: torch.Tensor
    payloads: torch.Tensor
    crc64: torch.Tensor | None


def encode_section(
    offsets: Sequence[int], lengths: Sequence[int], payloads: Sequence[int | None], crc64: Sequence[int] | None
) -> bytes:
    """Make a section. Items mostly lie back to back, so the gap before each is stored instead of its offset."""
    lengths_column = column(lengths)
    starts = column(offsets)
    gaps = starts.clone()
    gaps[1:] -= starts[:-1] + lengths_column[:-1]
    columns = gaps, lengths_column, column(0 if payload is None else payload + 1 for payload in payloads)
    widths = [width_of(numbers) for numbers in columns]
    packed = zlib.compress(
        b"".join(narrow(numbers, width) for numbers, width in zip(columns, widths, strict=True)), level=1
    )
    checksums = b"" if crc64 is None else array("Q", crc64).tobytes()
    return _HEAD.pack(len(offsets), crc64 is not None, *widths, len(packed)) + packed + checksums


def section_items(data: bytes) -> int:
    """How many items a section has. Raises `ValueError` for too few bytes."""
    if len(data) < _HEAD.size:
        raise ValueError(f"a section of {len(data)} bytes")
    return int(_HEAD.unpack_from(data)[0])


def decode_section(data: bytes, count: int) -> Section:
    """The inverse of `encode_section`. Takes memory for `count` items, whatever the bytes are.

    Raises:
        ValueError: the bytes are not a section of `count` items that lie in the order of their offsets.
    """
    if section_items(data) != count:
        raise ValueError(f"a section of {section_items(data)} items, not {count}")
    _, has_checksums, *widths, packed = _HEAD.unpack_from(data)
    end = _HEAD.size + packed
    if len(data) != end + (8 * count if has_checksums else 0) or not {0, *_DTYPES}.issuperset(widths):
        raise ValueError("a section of another length than it says")
    raw = inflate(data[_HEAD.size : end], count * sum(widths))
    columns = []
    for width in widths:
        columns.append(widen(raw[: width * count], width, count))
        raw = raw[width * count :]
    gaps, lengths, payloads = columns
    ends = torch.cumsum(gaps + lengths, dim=0)
    if count and (int(ends.min()) < 0 or int(gaps.max()) >> 62 or int(lengths.max()) >> 62):
        raise ValueError("an item lies beyond what a blob can hold")
    if count and bool((payloads - 1 > lengths).any()):
        raise ValueError("a payload begins behind the end of its item")
    crc64 = from_bytes(data[end:], torch.int64) if has_checksums else None
    return Section(ends - lengths, lengths, payloads - 1, crc64)


def inflate(data: bytes, length: int) -> bytes:
    """Decompress what must become exactly `length` bytes. Raises `ValueError` otherwise."""
    machine = zlib.decompressobj()
    try:
        made = machine.decompress(data, length + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(made) != length or not machine.eof or machine.unused_data:
        raise ValueError(f"compressed data that does not become {length} bytes")
    return made
