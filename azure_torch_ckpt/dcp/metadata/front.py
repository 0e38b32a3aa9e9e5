"""``.metadata`` with an index: one pickle, which begins with what this package reads of it.

    PROTO 4
    BINBYTES8 <index>      POP       head of fixed size, then `index.encode_index`
    <constants>            POP       a tuple: classes, names of attributes, the properties of tensors
    <rest>                           a `Metadata` without entries: what else a save has, as `pickle` writes it
    BINBYTES8 <sections>   POP       `index.place_sections`
    <items>                          opcodes that fill its dicts (`pickled_items.py`)
    STOP

Python's unpickler, so torch's readers, makes the two byte strings and drops them at once. This package's reader reads
as far as the rest, and of the sections those that it needs. The rest goes through the same machine as all metadata.
"""

from __future__ import annotations

import copy
import io
import pickle
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt._internal.torch_private import StorageInfo
from azure_torch_ckpt.dcp.metadata.index import Index, StoredColumns, decode_index, describe_properties, encode_index
from azure_torch_ckpt.dcp.metadata.pickled_items import Memo, pickle_items
from azure_torch_ckpt.dcp.metadata.schema import check_metadata, load_metadata, metadata_pickler, refuse_to_save
from azure_torch_ckpt.dcp.metadata.unpickler import MetadataUnpickler
from azure_torch_ckpt.dcp.metadata.views import ColumnMetadata, ReadSections, StoredItems, column_metadata
from azure_torch_ckpt.dcp.metadata.vocabulary import Known
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsupportedCheckpointError

__all__ = ["Front", "dump_with_index", "open_metadata", "read_front"]

_MAGIC = b"AzTCkIdx"
_VERSION = 1
_PROTO = pickle.PROTO + b"\x04"
# Behind the magic: the CRC64 of what follows, up to the end of the rest; the version; bytes of constants and rest, of
# the index before compression, and of all sections.
_HEAD = struct.Struct("<8sQHQQQ")
_LENGTH = struct.Struct("<Q")
_INDEX_AT = len(_PROTO) + len(pickle.BINBYTES8) + _LENGTH.size
_CHECKED_FROM = 16  # bytes of the head

_CLASSES = BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata, StorageInfo, torch.Size
_FIELDS = (
    "offsets", "sizes", "fqn", "index", "offset", "relative_path", "length", "payload_offset", "crc64", "properties",
    "size", "chunks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Front:
    """Where the parts of ``.metadata`` with an index lie, in bytes.

    Attributes:
        end: of what must be read before anything else: index, constants and rest.
        sections: where the first section begins.
    """

    index: slice
    pickled: slice
    raw_length: int
    end: int
    sections: int
    sections_end: int


def read_front(data: bytes, where: str) -> Front | None:
    """Find the parts of a ``.metadata`` that begins with `data`; None if it has no index.

    Raises:
        UnsupportedCheckpointError: its index is of a later version of this package.
        CorruptCheckpointError: what `data` has of it is damaged.
    """
    begin = _PROTO + pickle.BINBYTES8
    if not data.startswith(begin) or data[_INDEX_AT : _INDEX_AT + len(_MAGIC)] != _MAGIC:
        return None
    if len(data) < _INDEX_AT + _HEAD.size:
        raise CorruptCheckpointError(f"{where} is cut short. Use another checkpoint.")
    _, _, version, pickled, raw_length, sections = _HEAD.unpack_from(data, _INDEX_AT)
    if version != _VERSION:
        raise UnsupportedCheckpointError(
            f"{where} has an index of version {version}; this reader knows {_VERSION}. Upgrade azure-torch-ckpt."
        )
    (length,) = _LENGTH.unpack_from(data, _INDEX_AT - _LENGTH.size)
    index_end = _INDEX_AT + length
    end = index_end + len(pickle.POP) + pickled
    first = end + len(pickle.BINBYTES8) + _LENGTH.size
    return Front(
        slice(_INDEX_AT + _HEAD.size, index_end),
        slice(index_end + len(pickle.POP), end),
        raw_length,
        end,
        first,
        first + sections,
    )


def open_metadata(data: bytes, where: str, size: int | None = None, fetch: ReadSections | None = None) -> Metadata:
    """Read and check the content of a ``.metadata`` blob, with an index or without.

    Args:
        data: all of it; or with `size` (bytes of all) and `fetch`, which reads parts of the blob, at least the front.
        where: names the blob in messages.

    Raises:
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: it cannot be trusted or read.
    """
    front = read_front(data, where)
    if front is None:
        metadata = load_metadata(data, where)
        check_metadata(metadata, where)
        return metadata
    first = front.sections
    size = len(data) if size is None else size
    rest, index = _load_front(data, front, size, where)

    def read(spans: list[tuple[int, int]]) -> list[bytes]:
        if len(data) == size or fetch is None:
            return [data[first + start : first + start + length] for start, length in spans]
        return fetch([(first + start, length) for start, length in spans])

    return column_metadata(vars(rest), StoredItems(index, read, where))


def _load_front(data: bytes, front: Front, blob_size: int, where: str) -> tuple[Metadata, Index]:
    """Read and check the front of ``.metadata``: a `Metadata` without entries, and the index.

    Args:
        data: as much as `Front.end` says, at least.
        blob_size: bytes of the whole blob.

    Raises:
        CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError: as `schema.load_metadata`.
    """
    if len(data) < front.end or front.sections_end > blob_size:
        raise CorruptCheckpointError(f"{where} is cut short. Use another checkpoint.")
    _, checksum, *_ = _HEAD.unpack_from(data, _INDEX_AT)
    if crc64(memoryview(data)[_INDEX_AT + _CHECKED_FROM : front.end]) != checksum:
        raise CorruptCheckpointError(
            f"{where} was damaged in storage or in transit: its index does not have the CRC64 that was stored with it. "
            "Try again to rule out the transfer, or use another checkpoint"
        )
    rest = load_metadata(_PROTO + data[front.pickled] + pickle.STOP, where)
    check_metadata(rest, where)
    if rest.state_dict_metadata or rest.storage_data:
        raise CorruptCheckpointError(f"{where} has entries beside its index. It is damaged; use another checkpoint.")
    index = decode_index(data[front.index], front.raw_length, blob_size, where)
    if sum(place.length + place.order for place in index.places) != front.sections_end - front.sections:
        raise CorruptCheckpointError(
            f"{where} contradicts itself: it has not the sections that its index names. It is damaged; use another "
            "checkpoint."
        )
    return rest, index


def dump_with_index(metadata: Metadata, stored: StoredColumns, where: str) -> bytes:
    """Make the content of ``.metadata`` of what `stored` says, and the other attributes of `metadata`.

    It can be read: the front has been read again with the reader's own code, and the rest is made of the same columns.

    `where` names the blob in messages.

    Raises:
        UnsafeMetadataError: an attribute cannot be pickled, or no load would accept it; it is named.
    """
    rest = Metadata({}) if isinstance(metadata, ColumnMetadata) else copy.copy(metadata)
    vars(rest).update(vars(metadata), state_dict_metadata={}, storage_data={})
    try:
        constants, properties = _constants(stored.index)
        buffer = io.BytesIO()
        pickler = metadata_pickler(
            buffer, {id(value) for value in constants if getattr(value, "strides", None) is None}
        )
        pickled = b""
        for value, after in ((constants, pickle.POP), (rest, b"")):
            pickler.dump(value)
            pickled += _body(buffer.getvalue()) + after
            buffer.seek(0)
            buffer.truncate()
        machine = MetadataUnpickler(_PROTO + pickled + pickle.STOP, where)
        made: Any = machine.run()
        memo = _memo(machine.memo, made, properties)
        machine.settle(made)
        check_metadata(made, where)
    except Exception as error:  # an object's own __reduce__ may raise anything
        raise refuse_to_save(rest, where, error) from error
    packed, raw_length = encode_index(stored.index)
    all_sections = b"".join(stored.encoded)
    tail = _HEAD.pack(_MAGIC, 0, _VERSION, len(pickled), raw_length, len(all_sections))[_CHECKED_FROM:] + packed
    checksum = crc64(pickled, crc64(tail + pickle.POP))
    items = pickle_items(stored, memo)
    return b"".join(
        (
            _PROTO,
            *_bytes(_MAGIC + _LENGTH.pack(checksum) + tail),
            pickled,
            *_bytes(all_sections),
            items,
            pickle.STOP,
        )
    )


def _bytes(data: bytes) -> tuple[bytes, ...]:
    return pickle.BINBYTES8, _LENGTH.pack(len(data)), data, pickle.POP


def _body(pickled: bytes) -> bytes:
    """The opcodes of a pickle without its beginning and its end.

    The last frame counts the STOP in. So a MARK takes its place, which is undone at once.
    """
    return pickled[len(_PROTO) : -1] + pickle.MARK + pickle.POP_MARK


def _constants(index: Index) -> tuple[tuple[Any, ...], dict[int, int]]:
    """What the items refer to, and which of the properties in it is that of which entry."""
    known: dict[Any, int] = {}
    values: list[TensorProperties] = []
    of_entry = {}
    for number, entry in enumerate(index.entries):
        if entry.properties is not None:
            key = describe_properties(entry.properties)
            if key not in known:
                known[key] = len(values)
                values.append(entry.properties)
            of_entry[number] = known[key]
    return (*_CLASSES, *_FIELDS, *values), of_entry


def _memo(memo: list[Any], rest: Metadata, properties: dict[int, int]) -> Memo:
    """Find the constants in the memo of the machine that has read them."""
    fields: dict[str, int] = {}
    of_properties: list[int] = []
    dicts: dict[int, int] = {}
    for at, value in enumerate(memo):
        if isinstance(value, Known):
            fields[value.name.rpartition(".")[2].lstrip("_")] = at  # after its name, which pickle memoizes as well
        elif isinstance(value, str):
            fields.setdefault(value, at)
        elif isinstance(value, TensorProperties):
            of_properties.append(at)
        elif isinstance(value, dict):
            dicts[id(value)] = at
    return Memo(
        fields,
        {entry: of_properties[number] for entry, number in properties.items()},
        dicts[id(rest.state_dict_metadata)],
        dicts[id(rest.storage_data)],
        len(memo),
    )
