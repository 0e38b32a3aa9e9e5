"""Sections and orders: numbers come back as they were, and bytes that are none are refused."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from azure_torch_ckpt.dcp.metadata.front import open_metadata
from azure_torch_ckpt.dcp.metadata.index import decode_order, encode_order
from azure_torch_ckpt.dcp.metadata.sections import (
    decode_section,
    encode_section,
    narrow,
    section_items,
    widen,
    width_of,
)
from azure_torch_ckpt.errors import CorruptCheckpointError
from tests.dcp.metadata.index_parts import IndexParts, SectionParts
from tests.dcp.metadata.pickles import WHERE
from tests.dcp.metadata.virtual_saves import VirtualSave, rows, save_of

NUMBERS = st.one_of(
    st.integers(0, 300),
    st.sampled_from([2**7, 2**8 - 1, 2**8, 2**15 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**47, 2**50]),
)


@given(st.lists(st.integers(0, 2**63 - 1).map(lambda number: number >> (number % 63))))
def test_numbers_of_any_width(numbers: list[int]) -> None:
    column = torch.tensor(numbers, dtype=torch.int64)
    width = width_of(column)
    assert len(narrow(column, width)) == width * len(numbers)
    assert widen(narrow(column, width), width, len(numbers)).tolist() == numbers


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, st.one_of(st.none(), st.integers(0, 1).map(float)))),
    st.lists(st.integers(0, 2**64 - 1)),
    st.booleans(),
)
def test_sections_come_back(items: list[tuple[int, int, float | None]], checksums: list[int], checked: bool) -> None:
    lengths = [length for _, length, _ in items]
    ends = list(itertools.accumulate(gap + length for gap, length, _ in items))
    offsets = [end - length for end, length in zip(ends, lengths, strict=True)]
    payloads = [None if where is None else int(where * length) for _, length, where in items]
    crcs = [(checksums[number % len(checksums)] if checksums else 0) for number in range(len(items))]
    data = encode_section(offsets, lengths, payloads, crcs if checked else None)
    assert section_items(data) == len(items)
    section = decode_section(data, len(items))
    assert section.offsets.tolist() == offsets
    assert section.lengths.tolist() == lengths
    assert section.payloads.tolist() == [-1 if payload is None else payload for payload in payloads]
    if checked:
        assert section.crc64 is not None
        assert [value % (1 << 64) for value in section.crc64.tolist()] == crcs
    else:
        assert section.crc64 is None


def test_a_section_is_small() -> None:
    """Of one item: its checksum, and little more if the tensors of a model are alike."""
    count = 2000
    lengths = [4096 + 900 * (number % 7) for number in range(count)]
    offsets = [end - length for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]
    data = encode_section(offsets, lengths, [192] * count, range(count))
    assert len(data) < 9 * count


@given(st.permutations(range(40)))
def test_orders_come_back(positions: list[int]) -> None:
    column = torch.tensor(positions)
    assert decode_order(encode_order(column), len(positions)).tolist() == positions


@pytest.mark.parametrize(
    "positions", [[0, 0, 1], [0, 1, 3], [0, 1, -1], [1, 2, 3], [0, 1], [0, 1, 2, 3], [], [0, 1, 2**31 - 1]]
)
def test_orders_that_are_none(positions: list[int]) -> None:
    with pytest.raises(ValueError):
        decode_order(encode_order(torch.tensor(positions, dtype=torch.int64)), 3)


@pytest.mark.parametrize("data", [b"", b"x", zlib.compress(bytes(12))[:-1], zlib.compress(bytes(1 << 24)), bytes(12)])
def test_orders_of_other_bytes(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_order(data, 3)


# Of a checkpoint, with checksums that are right


def a_save() -> VirtualSave:
    return save_of({f"layers.{number}.w": rows((4, 3), 2) for number in range(3)}, 2)


SAVE = a_save()
BLOB = SAVE.dump()
LENGTH = 64 + 24 + 40  # of each item


def column(number: int, *values: int, width: int = 2) -> Callable[[SectionParts], None]:
    """Replace a column: the gaps, the lengths, or the payloads (shifted by one)."""

    def change(parts: SectionParts) -> None:
        columns, at = [], 0
        for of_column in parts.widths:
            columns.append(parts.columns[at : at + 3 * of_column])
            at += 3 * of_column
        columns[number] = b"".join((value % (1 << 8 * width)).to_bytes(width, "little") for value in values)
        parts.widths[number] = width
        parts.columns = b"".join(columns)

    return change


def field(**values: Any) -> Callable[[SectionParts], None]:
    return lambda parts: parts.__dict__.update(values)


def cut(name: str, *, end: int | None = None, more: bytes = b"") -> Callable[[SectionParts], None]:
    return lambda parts: setattr(parts, name, getattr(parts, name)[:end] + more)


DAMAGED: dict[str, Callable[[SectionParts], object]] = {
    "an item fewer": field(count=2),
    "an item more": field(count=4),
    "2**32 items": field(count=(1 << 32) - 1),
    "no items": field(count=0, columns=b"", checksums=b"", widths=[0, 0, 0]),
    "checksums cut short": cut("checksums", end=-1),
    "checksums that it does not say to have": field(has_checksums=False),
    "no checksums that it says to have": field(checksums=b""),
    "bytes behind it": cut("checksums", more=b"x"),
    "a width of 3": lambda parts: parts.widths.__setitem__(0, 3),
    "a width of 255": lambda parts: parts.widths.__setitem__(1, 255),
    "numbers cut short": cut("columns", end=-1),
    "numbers too many": cut("columns", more=b"\0"),
    "numbers that are not compressed": field(packed=b"numbers"),
    "no numbers": field(packed=b""),
    "a zip bomb": field(packed=zlib.compress(bytes(1 << 24))),
    "bytes behind the compressed ones": lambda parts: setattr(parts, "packed", zlib.compress(parts.columns) + b"x"),
    "a negative length": column(1, LENGTH, -LENGTH, LENGTH),
    "a negative gap": column(0, 0, -1, 0),
    "a negative payload": column(2, 65, -65, 65),
    "a gap of 2**62": column(0, 0, 1 << 62, 0, width=8),
    "a length of 2**62": column(1, LENGTH, 1 << 62, LENGTH, width=8),
    "offsets that wrap around": column(0, *[(1 << 62) - 1] * 3, width=8),
    "lengths that wrap around": column(1, *[(1 << 62) - 1] * 3, width=8),
    "a payload behind the end": column(2, 65, LENGTH + 2, 65),
    "a payload that reaches over the end": column(2, 65, LENGTH - 23 + 1, 65),
    "an item that is too short": column(1, LENGTH, 64 + 23, LENGTH),
    "an item without bytes": column(1, LENGTH, 0, LENGTH),
}


# Of these, more than the section must be known.
OF_TENSORS = "a payload that reaches over the end", "an item that is too short"


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_sections_that_contradict_themselves(change: Callable[[SectionParts], object]) -> None:
    parts = IndexParts.of(BLOB)
    section = SectionParts.of(parts.sections[1][0])
    change(section)
    parts.sections[1] = section.data(), b""
    metadata = open_metadata(parts.data(), WHERE)
    with pytest.raises(CorruptCheckpointError, match=r"its part on save-id/__1_0\.distcp is") as raised:
        dict(metadata.storage_data)
    assert WHERE in str(raised.value)
    # What is on another blob can be read.
    on_rank_0 = [index for index, info in SAVE.made.storage_data.items() if "__0_" in info.relative_path]
    assert [metadata.storage_data[index] for index in on_rank_0] == [SAVE.made.storage_data[i] for i in on_rank_0]


@pytest.mark.parametrize("name", [name for name in DAMAGED if name not in OF_TENSORS])
def test_sections_that_contradict_themselves_alone(name: str) -> None:
    section = SectionParts.of(IndexParts.of(BLOB).sections[1][0])
    DAMAGED[name](section)
    with pytest.raises(ValueError):
        decode_section(section.data(), 3)


@pytest.mark.parametrize("section", [b"", b"x", bytes(11)])
def test_sections_that_are_too_short(section: bytes) -> None:
    parts = IndexParts.of(BLOB)
    parts.sections[1] = section, b""
    with pytest.raises(CorruptCheckpointError, match="its part on"):
        dict(open_metadata(parts.data(), WHERE).storage_data)


@pytest.mark.parametrize("positions", [[0, 0, 1], [0, 1, 3], [0, 1], [0, 1, 2, 3], [-1, 0, 1]])
def test_orders_that_are_no_permutations(positions: list[int]) -> None:
    parts = IndexParts.of(BLOB)
    parts.sections[1] = parts.sections[1][0], encode_order(torch.tensor(positions))
    with pytest.raises(CorruptCheckpointError, match="its part on"):
        dict(open_metadata(parts.data(), WHERE).storage_data)


def test_every_changed_byte_of_a_section() -> None:
    """If only the checksum of the section were right: nothing but the checksums of items can change unnoticed."""
    section = IndexParts.of(BLOB).sections[1][0]
    true = decode_section(section, 3)
    for at in range(len(section)):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(section)
            damaged[at] ^= flip
            try:
                made = decode_section(bytes(damaged), 3)
            except ValueError:
                continue
            for name in ("offsets", "lengths", "payloads"):
                assert torch.equal(getattr(made, name), getattr(true, name))
