"""`.metadata` with an index taken apart, and put together again after changes, with checksums that are right.

Written from the description of the format, not with the code that writes it.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from typing import Any

from azure_torch_ckpt._internal.checksums import crc64

_HEAD = struct.Struct("<8sQHQQQ")
_SECTION = struct.Struct("<I?BBBI")


@dataclasses.dataclass
class IndexParts:
    """The parts of a `.metadata` blob.

    Attributes:
        document: the JSON of the index; its "sections" are made anew, unless `places` is False.
        columns: the numbers behind it: the blob of each item, then the cuts of the layouts.
        pickled: the constants, and the `Metadata` without entries.
        sections: of each blob: the section, and the order of its items.
        rest: the opcodes behind the sections.
        raw_length: what the head says; None: the right number.
    """

    document: Any
    columns: bytes
    pickled: bytes
    sections: list[tuple[bytes, bytes]]
    rest: bytes
    version: int = 1
    raw_length: int | None = None
    index: bytes | None = None
    places: bool = True

    @classmethod
    def of(cls, data: bytes) -> IndexParts:
        (length,) = struct.unpack_from("<Q", data, 3)
        magic, _, version, pickled, raw_length, all_sections = _HEAD.unpack_from(data, 11)
        assert data[:3] == b"\x80\x04" + pickle.BINBYTES8 and magic == b"AzTCkIdx"
        raw = zlib.decompress(data[11 + _HEAD.size : 11 + length])
        assert len(raw) == raw_length
        end = 8 + int.from_bytes(raw[:8], "little")
        document = json.loads(raw[8:end])
        at = 11 + length + 1
        start = at + pickled + 9
        sections = []
        position = start
        for of_section, of_order, _ in document["sections"]:
            middle = position + of_section
            sections.append((data[position:middle], data[middle : middle + of_order]))
            position = middle + of_order
        assert position == start + all_sections
        return cls(document, raw[end:], data[at : at + pickled], sections, data[position:], version)

    def data(self) -> bytes:
        """The whole blob."""
        if self.places:
            self.document["sections"] = [
                [len(section), len(order), crc64(section + order)] for section, order in self.sections
            ]
        raw = self.raw_index()
        packed = zlib.compress(raw) if self.index is None else self.index
        raw_length = len(raw) if self.raw_length is None else self.raw_length
        all_sections = b"".join(section + order for section, order in self.sections)
        head = _HEAD.pack(b"AzTCkIdx", 0, self.version, len(self.pickled), raw_length, len(all_sections))[16:]
        behind = head + packed + pickle.POP + self.pickled
        head = b"AzTCkIdx" + struct.pack("<Q", crc64(behind)) + head
        index = pickle.BINBYTES8 + struct.pack("<Q", len(head) + len(packed)) + head + packed + pickle.POP
        sections = pickle.BINBYTES8 + struct.pack("<Q", len(all_sections)) + all_sections
        return b"\x80\x04" + index + self.pickled + sections + self.rest

    def raw_index(self) -> bytes:
        text = json.dumps(self.document, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + self.columns


@dataclasses.dataclass
class SectionParts:
    """A section: `columns` are its numbers as they are stored, before compression; `checksums` are 8 bytes an item."""

    count: int
    has_checksums: bool
    widths: list[int]
    columns: bytes
    checksums: bytes
    packed: bytes | None = None

    @classmethod
    def of(cls, section: bytes) -> SectionParts:
        count, has_checksums, *widths, packed = _SECTION.unpack_from(section)
        end = _SECTION.size + packed
        return cls(count, has_checksums, widths, zlib.decompress(section[_SECTION.size : end]), section[end:])

    def data(self) -> bytes:
        packed = zlib.compress(self.columns) if self.packed is None else self.packed
        return _SECTION.pack(self.count, self.has_checksums, *self.widths, len(packed)) + packed + self.checksums


def changed(data: bytes, change: Callable[[IndexParts], object]) -> bytes:
    parts = IndexParts.of(data)
    change(parts)
    return parts.data()
