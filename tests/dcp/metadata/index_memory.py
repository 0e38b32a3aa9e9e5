"""A process that reads metadata that was made to take much memory, and prints how much it took.

Run as ``python -m tests.dcp.metadata.index_memory SIZE``. Prints one line of JSON: bytes by the name of the attack.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Iterator

from azure_torch_ckpt.dcp.metadata.front import open_metadata
from azure_torch_ckpt.errors import AzureCheckpointError
from tests.dcp.memory_growth import measured, settle
from tests.dcp.metadata.index_parts import IndexParts, SectionParts
from tests.dcp.metadata.pickles import WHERE
from tests.dcp.metadata.virtual_saves import rows, save_of


def attacks(size: int) -> Iterator[tuple[str, bytes]]:
    """Metadata of about `size` bytes, or of fewer if more would be refused at once."""

    def made(parts: IndexParts) -> bytes:
        # What is behind the sections is not looked at.
        return parts.data().ljust(size, b"\0")

    blob = save_of({"w": rows((4, 3), 2)}, 2).dump()
    allowed = 4 * size
    bomb = zlib.compress(bytes(512 * size), level=1)

    parts = IndexParts.of(blob)
    parts.index, parts.raw_length = bomb, allowed
    yield "an index that is a zip bomb", made(parts)

    for name, text in (("lists", b"[]"), ("dicts", b"{}"), ("numbers", b"1.5"), ("texts", b'"ab"')):
        parts = IndexParts.of(blob)
        many = b'{"names":[' + b",".join([text] * ((allowed - 100) // (len(text) + 1))) + b"]}"
        raw = struct.pack("<Q", len(many)) + many
        parts.index, parts.raw_length = zlib.compress(raw), len(raw)
        yield f"an index of many {name}", made(parts)

    parts = IndexParts.of(blob)
    parts.document["layouts"].append([size // 4 - 4, 2])
    parts.document["widths"][1] = 0
    parts.columns = parts.columns[:2]
    yield "chunks that take no bytes", made(parts)

    many_items = size // 32 - 2
    parts = IndexParts.of(blob)
    parts.document |= {"sizes": [[]], "layouts": [[many_items, 0]], "widths": [0, 0], "blobs": ["a"]}
    parts.columns = b""
    section = SectionParts(many_items, False, [0, 0, 0], b"", b"")
    parts.sections = [(section.data(), b"")]
    yield "items that take no bytes", made(parts)

    parts = IndexParts.of(blob)
    parts.document |= {"sizes": [[]], "layouts": [[16 * size, 0]], "widths": [0, 0], "blobs": ["a"]}
    parts.columns = b""
    parts.sections = [(SectionParts(16 * size, False, [0, 0, 0], b"", b"").data(), b"")]
    yield "more items than there can be", made(parts)

    parts = IndexParts.of(blob)
    section = SectionParts.of(parts.sections[0][0])
    section.packed = bomb
    parts.sections[0] = section.data(), b""
    yield "a section that is a zip bomb", made(parts)

    parts = IndexParts.of(blob)
    parts.sections[0] = parts.sections[0][0], bomb
    yield "an order that is a zip bomb", made(parts)

    parts = IndexParts.of(blob)
    section = SectionParts.of(parts.sections[0][0])
    section.count = (1 << 32) - 1
    parts.sections[0] = section.data(), b""
    yield "a section of 2**32 items", made(parts)


def read(data: bytes) -> str | None:
    try:
        dict(open_metadata(data, WHERE).storage_data)
    except AzureCheckpointError as error:
        return type(error).__name__
    return None


def main(size: int) -> None:
    settle()
    read(save_of({"w": rows((4, 3), 2)}, 2).dump())  # what a first read leaves behind once
    print(json.dumps({name: measured(read, data) for name, data in attacks(size)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
