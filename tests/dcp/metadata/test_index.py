"""An index that was made to do harm, with checksums that are right: what it says is checked before anything is done."""

from __future__ import annotations

import copy
import pickle
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.dcp.metadata.front import open_metadata
from azure_torch_ckpt.dcp.metadata.schema import check_metadata
from azure_torch_ckpt.errors import (
    AzureCheckpointError,
    CorruptCheckpointError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
)
from tests.dcp.memory_growth import child_result
from tests.dcp.metadata.index_parts import IndexParts, changed
from tests.dcp.metadata.pickles import WHERE, small_metadata
from tests.dcp.metadata.virtual_saves import rows, save_of, tensor_entry

Change = Callable[[Any], object]

# Every item of it has a place of its own: the order of rank 1's is not that of the state dict.
BLOB = save_of(
    {
        "w": rows((5, 3), 2),
        "v": rows((6, 3), 2, torch.bfloat16),
        "s": tensor_entry((), [((), ())]),
        "o": BytesStorageMetadata(),
    },
    2,
).dump()


def read(data: bytes) -> Metadata:
    """All that there is in metadata, as torch's own objects."""
    views = open_metadata(data, WHERE)
    entries = {
        name: TensorStorageMetadata(entry.properties, entry.size, list(entry.chunks))
        if isinstance(entry, TensorStorageMetadata)
        else entry
        for name, entry in views.state_dict_metadata.items()
    }
    return Metadata(entries, storage_data=dict(views.storage_data))


def document(change: Change) -> Change:
    return lambda parts: change(parts.document)


def put(*path: Any, value: Any) -> Change:
    """Replace a part of the JSON."""

    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return lambda parts: change(parts.document)


def fixed_sections(parts: Any) -> None:
    parts.document["sections"] = [[len(one), len(two), crc64(one + two)] for one, two in parts.sections]
    parts.places = False


def places(change: Change) -> Change:
    def of_parts(parts: Any) -> None:
        fixed_sections(parts)
        change(parts.document["sections"])

    return of_parts


def parts_with(**fields: Any) -> Change:
    return lambda parts: parts.__dict__.update(fields)


CONTRADICTIONS: dict[str, Change] = {
    "a name twice": put("names", 1, value="w"),
    "a name that is a number": put("names", 0, value=7),
    "a name too few": document(lambda d: d["names"].pop()),
    "a name too many": document(lambda d: d["names"].append("x")),
    "an entry too many": document(lambda d: d["entries"].append([])),
    "names in a dict": put("names", value={"w": 1, "v": 2, "s": 3, "o": 4}),
    "blobs in a dict": put("blobs", value={"a": 1, "b": 2}),
    "blobs in a string": put("blobs", value="ab"),
    "no blobs": put("blobs", value=[]),
    "a blob that is a number": put("blobs", 0, value=1),
    "a blob too few": document(lambda d: d["blobs"].pop()),
    "a blob too many": document(lambda d: d["blobs"].append("x")),
    "an object with numbers of a tensor": put("entries", 3, value=[0, 0, 0]),
    "a tensor that is an object": put("entries", 0, value=[]),
    "an entry with two numbers": put("entries", 0, value=[0, 0]),
    "an entry that is a number": put("entries", 0, value=3),
    "an entry that is a string": put("entries", 0, value="abc"),
    "an entry that is a dict": put("entries", 0, value={"2": 0}),
    "a negative size": put("entries", 0, 1, value=-1),
    "a negative layout": put("entries", 0, 2, value=-1),
    "negative properties": put("entries", 0, 0, value=-1),
    "a size out of range": put("entries", 0, 1, value=9),
    "a layout out of range": put("entries", 0, 2, value=9),
    "properties out of range": put("entries", 0, 0, value=9),
    "a layout that is a boolean": put("entries", 0, 2, value=True),
    "a layout that is a float": put("entries", 0, 2, value=0.0),
    "the layout of another tensor": put("entries", 0, 2, value=1),
    "the layout of a scalar": put("entries", 0, 2, value=2),
    "the size of a scalar": put("entries", 0, 1, value=2),
    "a size of text": put("sizes", 0, value="53"),
    "a negative dimension": put("sizes", 0, value=[-5, 3]),
    "a dimension that is a float": put("sizes", 0, value=[5.0, 3]),
    "a dimension of 64 bits": put("sizes", 0, value=[1 << 63, 3]),
    "a tensor of 2**58 elements": put("sizes", 0, value=[1 << 57, 3]),
    "a tensor of 1025 dimensions": put("sizes", 0, value=[1] * 1025),
    "a smaller tensor": put("sizes", 0, value=[4, 3]),
    "one dimension more": put("sizes", 0, value=[5, 3, 1]),
    "a layout without chunks": put("layouts", 0, value=[0, 2]),
    "a layout of three numbers": put("layouts", 0, value=[2, 2, 2]),
    "a layout of floats": put("layouts", 0, value=[2.0, 2]),
    "a negative layout shape": put("layouts", 0, value=[-2, 2]),
    "a layout of more chunks": put("layouts", 0, value=[3, 2]),
    "a layout of fewer chunks": put("layouts", 0, value=[1, 2]),
    "a layout of other dimensions": put("layouts", 0, value=[1, 4]),
    "a scalar of many chunks": put("layouts", 2, value=[1 << 40, 0]),
    "a layout of 2**62 chunks": put("layouts", 0, value=[1 << 62, 1 << 62]),
    "properties with too few fields": document(lambda d: d["properties"][0].pop()),
    "properties with a list": put("properties", 0, 0, value=["float32"]),
    "requires_grad a number": put("properties", 0, 2, value=1),
    "pin_memory a string": put("properties", 0, 4, value="no"),
    "strides that are negative": put("properties", 0, 5, value=[-1]),
    "strides that are a string": put("properties", 0, 5, value="31"),
    "properties that are null": put("properties", 0, value=None),
    "a width of 3": put("widths", 0, value=3),
    "a negative width": put("widths", 1, value=-1),
    "a width of 16": put("widths", 1, value=16),
    "a width that is a string": put("widths", 1, value="1"),
    "a width too large": put("widths", 1, value=8),
    "no widths": put("widths", value=[]),
    "no numbers, all of them zero": put("widths", value=[0, 0]),
    "a missing part": document(lambda d: d.pop("layouts")),
    "a list": parts_with(document=[], places=False),
    "null": parts_with(document=None, places=False),
    "numbers cut short": lambda parts: setattr(parts, "columns", parts.columns[:-1]),
    "a number too many": lambda parts: setattr(parts, "columns", parts.columns + b"\0"),
    "a blob out of range": lambda parts: setattr(parts, "columns", b"\x02" + parts.columns[1:]),
    "a chunk outside": lambda parts: setattr(parts, "columns", parts.columns[:-16] + b"\x07" * 16),
    "a section of negative length": places(lambda sections: sections[0].__setitem__(0, -1)),
    "a section of a fraction": places(lambda sections: sections[0].__setitem__(0, 1.5)),
    "a checksum that is text": places(lambda sections: sections[0].__setitem__(2, "1")),
    "a checksum that is negative": places(lambda sections: sections[0].__setitem__(2, -1)),
    "a section without a checksum": places(lambda sections: sections[0].pop()),
    "a section of 2**60 bytes": places(lambda sections: sections[0].__setitem__(0, 1 << 60)),
    "a section longer than it is": places(lambda sections: sections[1].__setitem__(0, sections[1][0] + 1)),
    "a section that begins earlier": places(lambda sections: sections[0].__setitem__(0, sections[0][0] - 1)),
    "a section too few": places(lambda sections: sections.pop()),
    "the sections exchanged": places(lambda sections: sections.reverse()),
    "a zip bomb": parts_with(index=zlib.compress(bytes(1 << 24))),
    "an index that is longer than it says": parts_with(raw_length=100),
    "an index that is shorter than it says": parts_with(raw_length=9000),
    "an index of no length": parts_with(raw_length=0),
    "an index that is not compressed": lambda parts: setattr(parts, "index", parts.raw_index()),
    "an index that is cut short": lambda parts: setattr(parts, "index", zlib.compress(parts.raw_index())[:-3]),
    "bytes behind the index": lambda parts: setattr(parts, "index", zlib.compress(parts.raw_index()) + b"x"),
    "an index that is empty": parts_with(index=b""),
    "a metadata object with entries": parts_with(pickled=pickle.dumps(small_metadata(), 4)[2:-1]),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_itself(change: Change) -> None:
    with pytest.raises(CorruptCheckpointError) as raised:
        read(changed(BLOB, change))
    assert WHERE in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("longer", [-1, 1])
def test_sections_that_are_not_there_are_not_asked_for(longer: int) -> None:
    data = changed(BLOB, places(lambda sections: sections[1].__setitem__(0, sections[1][0] + longer)))
    with pytest.raises(CorruptCheckpointError, match="not the sections that its index names"):
        open_metadata(data, WHERE)


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a//b", "a\\b", "https://a.example/x", "C:x", "\ud800", "a\nb", ""]
)
def test_paths_that_leave_the_checkpoint(path: str) -> None:
    with pytest.raises(UnsafeMetadataError, match="plain path"):
        read(changed(BLOB, put("blobs", 0, value=path)))


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, 5 * len(BLOB) + 65536])
def test_an_index_that_says_to_be_huge(length: int) -> None:
    with pytest.raises(UnsafeMetadataError, match="refused"):
        read(changed(BLOB, parts_with(raw_length=length)))


@pytest.mark.parametrize(
    "change",
    [
        put("properties", 0, 0, value="float1"),
        put("properties", 0, 1, value="sparse_xyz"),
        put("properties", 0, 3, value="new_format"),
        put("properties", 0, 0, value="load"),
        parts_with(version=2),
    ],
)
def test_what_is_newer(change: Change) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="pgrade"):
        read(changed(BLOB, change))


def test_what_is_behind_the_constants_is_read_as_all_metadata_is() -> None:
    with pytest.raises(UnsafeMetadataError):
        read(changed(BLOB, lambda parts: setattr(parts, "pickled", b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R")))


# At random

PARTS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 8),
        st.sampled_from(
            [-(1 << 70), 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**400, 0.5, float("inf"), float("nan"), 2.0]
        ),
        st.sampled_from(["", "w", "float32", "strided", "a/b", "../x", "\ud800"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from("0ab"), inner, max_size=2)),
    max_leaves=6,
)


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all parts of a JSON document."""
    found = [path] if path else []
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in steps:
        found += spots(part, (*path, step))
    return found


@settings(max_examples=400)
@given(st.data())
def test_any_change_is_refused_or_makes_sense(data: st.DataObject) -> None:
    parts = IndexParts.of(BLOB)
    if data.draw(st.booleans()):
        fixed_sections(parts)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(spots(parts.document)))
        holder = parts.document
        for step in path:
            holder = holder[step]
        how = data.draw(st.sampled_from(["put", "put", "copy", "pop", "double", "number"]))
        if how == "put":
            holder[last] = data.draw(PARTS)
        elif how == "copy":
            *other, end = data.draw(st.sampled_from(spots(parts.document)))
            source = parts.document
            for step in other:
                source = source[step]
            holder[last] = copy.deepcopy(source[end])
        elif how == "pop":
            holder.pop(last)
        elif how == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif how == "number" and len(parts.columns):
            spot = data.draw(st.integers(0, len(parts.columns) - 1))
            parts.columns = parts.columns[:spot] + bytes([data.draw(st.integers(0, 255))]) + parts.columns[spot + 1 :]
        if not spots(parts.document):
            break
    parts.places = parts.places and isinstance(parts.document, dict)
    try:
        metadata = read(parts.data())
    except AzureCheckpointError as error:
        assert WHERE in str(error) and len(str(error)) < 2000
        return
    check_metadata(metadata, WHERE)  # what is checked in columns is all that is checked in a pickle


def test_texts_that_are_not_json() -> None:
    texts = [
        b"",
        b"{",
        b'{"a":',
        b"\xff\xfe",
        b"[" * 60_000,
        b"nan",
        b"1" * 5000,
        bytes(50),
        '{"a":1}'.encode("utf-16"),
    ]
    for text in texts:
        parts = IndexParts.of(BLOB)
        parts.index = zlib.compress(struct.pack("<Q", len(text)) + text)
        parts.raw_length = len(text) + 8
        with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
            read(parts.data())
        parts.index = zlib.compress(text[:7])
        parts.raw_length = len(text[:7])
        with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
            read(parts.data())


def test_memory_is_in_proportion_to_the_bytes() -> None:
    size = 1 << 19
    taken = child_result("tests.dcp.metadata.index_memory", size)
    for attack, (grown, error) in taken.items():
        assert grown < (32 if "bomb" in attack else 128) * size, attack
        assert error == (None if "take no bytes" in attack else "CorruptCheckpointError"), attack
