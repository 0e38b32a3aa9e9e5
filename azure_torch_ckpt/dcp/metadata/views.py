"""torch's metadata objects as views of columns: each is made when it is asked for.

`ColumnMetadata` is a `Metadata` whose entries and items come from an `Index`. Code that expects torch's objects finds
them: ``state_dict_metadata`` is a dict whose tensors have a `Chunks` for a list, and ``storage_data`` is a
`StoredItems` for a dict.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt._internal.torch_private import StorageInfo
from azure_torch_ckpt.dcp.metadata.columns import Chunks, Entry, count_items, entries_of
from azure_torch_ckpt.dcp.metadata.index import Index, SectionPlace, decode_index, decode_order, encode_index
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, storage_info
from azure_torch_ckpt.dcp.metadata.sections import decode_section
from azure_torch_ckpt.errors import CorruptCheckpointError

__all__ = [
    "ColumnMetadata",
    "ReadSections",
    "StoredItems",
    "column_metadata",
    "data_paths",
    "in_memory",
    "plain_metadata",
    "show_columns",
    "whole_tensors",
]

# Bytes between sections that are read with the sections beside them instead of by a request of their own.
_NEAR = 128 * 1024
ReadSections = Callable[[list[tuple[int, int]]], list[bytes]]
"""Reads parts of all sections: start and length of each."""


class StoredItems(Mapping[MetadataIndex, StorageInfo]):
    """Where items are stored, as the dict ``Metadata.storage_data``. A pickle or copy is a dict.

    Args:
        read: reads parts of all sections, with errors of its own.
        where: names the metadata in messages.
    """

    def __init__(self, index: Index, read: ReadSections, where: str) -> None:
        self.index = index
        self._read = read
        self._where = where
        self._lock = threading.Lock()
        # By blob: the items in the order of their numbers.
        self._items: dict[int, list[StoredItem]] = {}
        self._volumes: torch.Tensor | None = None

    def fetch(self, numbers: Sequence[int]) -> list[StoredItem]:
        """Return the items of these numbers. The sections that are not here yet are read, near ones together.

        Raises:
            CorruptCheckpointError: a section is damaged.
        """
        index = self.index
        chosen = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        blobs = index.blob_of[chosen]
        with self._lock:
            self._load(set(blobs.tolist()) - self._items.keys())
        return [self._items[blob][at] for blob, at in zip(blobs.tolist(), index.in_blob[chosen].tolist(), strict=True)]

    def _load(self, blobs: set[int]) -> None:
        places = self.index.places
        runs: list[list[int]] = []
        end = -_NEAR - 1
        for blob in sorted(blobs):
            place = places[blob]
            if place.start - end <= _NEAR:
                runs[-1].append(blob)
            else:
                runs.append([blob])
            end = place.start + place.length + place.order
        spans = [(places[run[0]].start, _end(places[run[-1]]) - places[run[0]].start) for run in runs]
        if not spans:
            return
        if self._volumes is None:
            self._volumes = self.index.volumes()
        numbers = self.index.by_blob.split(self.index.counts().tolist())
        for run, (start, _), data in zip(runs, spans, self._read(spans), strict=True):
            for blob in run:
                place = places[blob]
                mine = data[place.start - start : _end(place) - start]
                if crc64(mine) != place.crc64:
                    raise CorruptCheckpointError(
                        f"{self._where} was damaged in storage or in transit: its part on {self.index.blobs[blob]} "
                        "does not have the CRC64 that was stored with it. Try again to rule out the transfer, or use "
                        "another checkpoint"
                    )
                try:
                    self._items[blob] = self._decoded(blob, mine, place, self._volumes[numbers[blob]])
                except ValueError as error:
                    raise CorruptCheckpointError(
                        f"{self._where} contradicts itself: its part on {self.index.blobs[blob]} is {error}. It is "
                        "damaged; restore it or use another checkpoint."
                    ) from error

    def _decoded(self, blob: int, data: bytes, place: SectionPlace, volumes: torch.Tensor) -> list[StoredItem]:
        count = len(volumes)
        section = decode_section(data[: place.length], count)
        columns = [section.offsets, section.lengths, section.payloads]
        if section.crc64 is not None:
            columns.append(section.crc64)
        if place.order:
            at = torch.argsort(decode_order(data[place.length :], count))
            columns = [numbers[at] for numbers in columns]
        _, lengths, payloads, *_ = columns
        if bool(((payloads >= 0) & (payloads + volumes > lengths)).any()):
            raise ValueError("too short for an item in it")
        path = self.index.blobs[blob]
        crcs: list[int | None] = [None] * count
        if section.crc64 is not None:
            crcs = [value & 0xFFFFFFFFFFFFFFFF for value in columns[3].tolist()]
        return [
            StoredItem(path, offset, length, None if payload < 0 else payload, crc, ())
            for offset, length, payload, crc in zip(*(numbers.tolist() for numbers in columns[:3]), crcs, strict=True)
        ]

    def number_of(self, key: MetadataIndex) -> int | None:
        """The number of an item; None if there is no such item."""
        entry = self.index.by_name.get(key.fqn)
        if entry is None or (entry.layout is None) != (key.offset is None):
            return None
        if entry.layout is None:
            return entry.first
        chunk = entry.layout.number_of(cast(torch.Size, key.offset))
        return None if chunk is None else entry.first + chunk

    # What a dict has

    def __getitem__(self, key: MetadataIndex) -> StorageInfo:
        number = self.number_of(key)
        if number is None:
            raise KeyError(key)
        blob = int(self.index.blob_of[number])
        if blob not in self._items:
            self.fetch([number])
        return _info(self._items[blob][int(self.index.in_blob[number])])

    def items(self) -> ItemsView[MetadataIndex, StorageInfo]:
        return _AllItems(self)

    def values(self) -> ValuesView[StorageInfo]:
        return _AllValues(self)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, MetadataIndex) and self.number_of(key) is not None

    def __len__(self) -> int:
        return len(self.index.blob_of)

    def __iter__(self) -> Iterator[MetadataIndex]:
        for entry in self.index.entries:
            if entry.layout is None:
                yield MetadataIndex(entry.name)
            else:
                for number, offset in enumerate(entry.layout.rows[0]):
                    yield MetadataIndex(entry.name, offset, number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self.to_dict() == dict(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} stored items>"

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.to_dict(),)

    def to_dict(self) -> dict[MetadataIndex, StorageInfo]:
        """The same as a dict. Reads all sections, together."""
        return dict(iter(self.items()))

    def all_sections(self) -> bytes:
        """Read all sections, as they are stored."""
        places = self.index.places
        return self._read([(0, _end(places[-1]))])[0] if places else b""


class _AllItems(ItemsView[MetadataIndex, StorageInfo]):
    """One after the other, without a lookup for each."""

    _mapping: StoredItems

    def __iter__(self) -> Iterator[tuple[MetadataIndex, StorageInfo]]:
        yield from zip(self._mapping, self._mapping.values(), strict=True)


class _AllValues(ValuesView[StorageInfo]):
    """The same, of values."""

    _mapping: StoredItems

    def __iter__(self) -> Iterator[StorageInfo]:
        yield from map(_info, self._mapping.fetch(range(len(self._mapping))))


def _end(place: SectionPlace) -> int:
    return place.start + place.length + place.order


def _info(item: StoredItem) -> StorageInfo:
    return storage_info(
        item.relative_path, item.offset, item.length, payload_offset=item.payload_offset, crc64=item.crc64
    )


class ColumnMetadata(Metadata):
    """A `Metadata` of which the entries and items are views of an index.

    Its pickle is as small as the index and the sections, and becomes a `ColumnMetadata` again, as long as its
    ``storage_data`` is a `StoredItems` or None, and no entry was changed. Otherwise, as with storage that another
    writer sets, it is pickled as torch's own class with torch's own objects.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        items = self.storage_data
        rest = {
            name: value for name, value in vars(self).items() if name not in ("state_dict_metadata", "storage_data")
        }
        if isinstance(items, StoredItems) and _is_unchanged(self.state_dict_metadata, items.index):
            return _restored, (*encode_index(items.index), items.all_sections(), rest)
        if items is None and (entries := entries_of(self)) is not None:
            nowhere = torch.zeros(count_items(entries), dtype=torch.int32, device="cpu")
            return _restored, (*encode_index(Index(entries, ["-"], nowhere, [SectionPlace(0, 0, 0, 0)])), None, rest)
        plain = plain_metadata(self)
        return Metadata, (plain.state_dict_metadata,), {**rest, "storage_data": items}


def plain_metadata(metadata: Metadata) -> Metadata:
    """The same metadata of torch's own classes and lists alone, as far as this package has made it."""
    if not isinstance(metadata, ColumnMetadata):
        return metadata
    made = Metadata({})
    vars(made).update(vars(metadata))
    made.state_dict_metadata = {}
    items = metadata.storage_data
    stored = items.index.by_name if isinstance(items, StoredItems) else {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks: Sequence[ChunkStorageMetadata] = entry.chunks
            known = stored.get(name)
            if known is not None and known.layout is not None and _shows(entry, known):
                chunks = Chunks(known.layout)  # `whole_tensors` shows others
            if isinstance(chunks, Chunks):
                entry = TensorStorageMetadata(entry.properties, entry.size, list(chunks))
        made.state_dict_metadata[name] = entry
    return made


def _is_unchanged(shown: dict[str, Any], index: Index) -> bool:
    return list(shown) == [entry.name for entry in index.entries] and all(map(_shows, shown.values(), index.entries))


def _shows(shown: TensorStorageMetadata | BytesStorageMetadata, entry: Entry) -> bool:
    """Whether what metadata has for an entry is what this module has put there."""
    if entry.layout is None or entry.properties is None:
        return not isinstance(shown, TensorStorageMetadata)
    return (
        isinstance(shown, TensorStorageMetadata)
        and shown.size == entry.size
        and shown.properties.dtype is entry.properties.dtype
        and (isinstance(shown.chunks, Chunks) or len(shown.chunks) == 1)
    )


def _restored(packed: bytes, length: int, sections: bytes | None, rest: dict[str, Any]) -> ColumnMetadata:
    where = "the metadata of another rank"
    index = decode_index(packed, length, 1 << 62, where)  # from this job, so its size bounds nothing
    made = column_metadata(rest, StoredItems(index, in_memory(sections or b""), where))
    if sections is None:
        made.storage_data = None
    return made


def show_columns(metadata: Metadata, entries: Iterable[Entry]) -> None:
    """Let a planner's metadata be views of its entries, so that it is small where torch sends it to all ranks."""
    for entry in entries:
        tensor = metadata.state_dict_metadata[entry.name]
        if entry.layout is not None and isinstance(tensor, TensorStorageMetadata):
            tensor.chunks = cast("list[ChunkStorageMetadata]", Chunks(entry.layout))
    if type(metadata) is Metadata:
        metadata.__class__ = ColumnMetadata


def in_memory(sections: bytes) -> ReadSections:
    """Read sections that are in memory."""
    return lambda spans: [sections[start : start + length] for start, length in spans]


def column_metadata(rest: Mapping[str, Any], items: StoredItems) -> ColumnMetadata:
    """Make the metadata of an index and of the attributes that it does not have."""
    made = ColumnMetadata({entry.name: _entry(entry) for entry in items.index.entries}, storage_data=items)
    vars(made).update(_attributes(rest))
    return made


def _attributes(rest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rest.items() if name not in ("state_dict_metadata", "storage_data")}


def _entry(entry: Entry) -> TensorStorageMetadata | BytesStorageMetadata:
    if entry.layout is None or entry.properties is None or entry.size is None:
        return BytesStorageMetadata()
    return TensorStorageMetadata(entry.properties, entry.size, cast("list[ChunkStorageMetadata]", Chunks(entry.layout)))


def whole_tensors(metadata: ColumnMetadata) -> ColumnMetadata:
    """The same metadata for a load planner: each tensor that is stored whole appears as one chunk.

    torch's planner looks at all chunks of all tensors, on every rank. It need not: which chunks have a region is found
    in the columns once the region is known (`dcp.stored_pieces`).
    """
    made = ColumnMetadata(dict(metadata.state_dict_metadata), storage_data=metadata.storage_data)
    vars(made).update(_attributes(vars(metadata)))
    for entry in metadata.storage_data.index.entries:
        if entry.layout is not None and len(entry.layout) > 1 and entry.layout.is_whole(entry.size):
            chunk = ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size)
            made.state_dict_metadata[entry.name] = TensorStorageMetadata(entry.properties, entry.size, [chunk])
    return made


def data_paths(metadata: Metadata) -> set[str]:
    """Return every data blob that `metadata` names: below the checkpoint's URL, as it was checked."""
    items = metadata.storage_data
    if isinstance(items, StoredItems):
        return set(items.index.blobs)
    return {info.relative_path for info in items.values()}
