"""`WrittenItems`: what a rank tells the coordinator of the items that it wrote, in columns; and those of all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from azure_torch_ckpt._internal.torch_private import StorageInfo
from azure_torch_ckpt.dcp.metadata.columns import Entry, column, from_bytes, place, to_bytes
from azure_torch_ckpt.dcp.metadata.index import Index, StoredColumns, encode_order, place_sections
from azure_torch_ckpt.dcp.metadata.names import pack_names, unpack_names
from azure_torch_ckpt.dcp.metadata.schema import storage_info
from azure_torch_ckpt.dcp.metadata.sections import Section, decode_section, encode_section, section_items

__all__ = ["PackedItems", "UploadedItem", "WrittenItems", "join_results"]


@dataclass(slots=True)
class UploadedItem:
    """An item that was written, and where it lies in the rank's blob; see `schema.StoredItem`."""

    planned: WriteItem
    offset: int
    length: int
    payload_offset: int | None
    crc64: int | None


@dataclass(slots=True)
class WrittenItems:
    """The items of one rank, in the order in which they lie in its blob. A pickle of them is `PackedItems`.

    Attributes:
        blob: its name, below the checkpoint's URL.
    """

    blob: str
    items: list[UploadedItem]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Of all items."""
        return sum(item.length for item in self.items)

    def storage_data(self) -> dict[MetadataIndex, StorageInfo]:
        """The items as torch's metadata has them."""
        return {
            item.planned.index: storage_info(
                self.blob, item.offset, item.length, payload_offset=item.payload_offset, crc64=item.crc64
            )
            for item in self.items
        }

    def packed(self) -> PackedItems:
        hints, places, dims = [], [], []
        offsets: list[int] = []
        for item in self.items:
            index = item.planned.index
            hints.append(-1 if index.index is None else index.index)
            dims.append(-1 if index.offset is None else len(index.offset))
            places.append(place(index.offset))
            offsets += index.offset or ()
        checksums = [item.crc64 for item in self.items if item.crc64 is not None]
        return PackedItems(
            self.blob,
            self.nbytes,
            pack_names(tuple(item.planned.index.fqn for item in self.items)),
            zlib.compress(to_bytes(torch.cat([column(part) for part in (hints, places, dims, offsets)]))),
            encode_section(
                [item.offset for item in self.items],
                [item.length for item in self.items],
                [item.payload_offset for item in self.items],
                checksums if len(checksums) == len(self.items) else None,
            ),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        packed = self.packed()
        return PackedItems, (packed.blob, packed.nbytes, packed.names, packed.chunks, packed.section)


@dataclass(frozen=True, slots=True)
class PackedItems:
    """`WrittenItems` in columns. What many ranks have in common, such as the names, is the same bytes.

    Attributes:
        names: their keys (`metadata.names`).
        chunks: which chunk of its tensor each item is: the number that the planner gave as a hint (-1: none), the
            `place` of its offsets, how many offsets it has (-1: it is an object), and the offsets.
        section: where they lie in the blob (`metadata.sections`).
    """

    blob: str
    nbytes: int
    names: bytes
    chunks: bytes
    section: bytes

    def __len__(self) -> int:
        return section_items(self.section)

    def packed(self) -> PackedItems:
        return self

    def decoded(self) -> Section:
        return decode_section(self.section, len(self))

    def hints_and_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        hints, places, *_ = self._chunks()
        return hints, places

    def storage_data(self) -> dict[MetadataIndex, StorageInfo]:
        """The items as torch's metadata has them."""
        names = unpack_names(self.names)
        hints, _, dims, offsets = (part.tolist() for part in self._chunks())
        section = self.decoded()
        crcs = [None] * len(names) if section.crc64 is None else section.crc64.tolist()
        items = {}
        at = 0
        for name, hint, count, start, length, payload, crc in zip(
            names, hints, dims, section.offsets.tolist(), section.lengths.tolist(), section.payloads.tolist(), crcs,
            strict=True,
        ):  # fmt: skip
            offset = None if count < 0 else offsets[at : at + count]
            at += max(count, 0)
            items[MetadataIndex(name, offset, None if hint < 0 else hint)] = storage_info(
                self.blob,
                start,
                length,
                payload_offset=None if payload < 0 else payload,
                crc64=None if crc is None else crc & 0xFFFFFFFFFFFFFFFF,
            )
        return items

    def _chunks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        every = from_bytes(zlib.decompress(self.chunks), torch.int64)
        count = len(self)
        return every[:count], every[count : 2 * count], every[2 * count : 3 * count], every[3 * count :]


def join_results(entries: list[Entry], results: Sequence[PackedItems]) -> StoredColumns | None:
    """Put the results of all ranks together.

    Returns:
        None if they are not just what was planned: something is missing, was written twice or was not planned.
    """
    total = entries[-1].first + entries[-1].count if entries else 0
    if sum(map(len, results)) != total:
        return None
    positions = {entry.name: number for number, entry in enumerate(entries)}
    first = column(entry.first for entry in entries)
    counts = column(entry.count for entry in entries)
    places = _all_places(entries)
    of_names: dict[bytes, torch.Tensor] = {}
    blob_of = torch.full((total,), -1, dtype=torch.int32, device="cpu")
    orders: list[torch.Tensor | None] = []
    encoded = []
    for blob, result in enumerate(results):
        if result.names not in of_names:
            names = unpack_names(result.names)
            if not positions.keys() >= set(names):
                return None
            of_names[result.names] = column(positions[name] for name in names)
        of = of_names[result.names]
        hints, at = result.hints_and_places()
        alone = counts[of] == 1
        numbers = torch.where(alone, 0, hints)
        if bool(((numbers < 0) | (numbers >= counts[of])).any()):
            return None
        numbers = numbers + first[of]
        if not torch.equal(places[numbers], at):
            return None
        blob_of[numbers] = blob
        if bool((numbers[1:] > numbers[:-1]).all()):
            orders.append(None)
        else:
            by_number = torch.argsort(numbers)
            order = torch.empty_like(by_number)
            order[by_number] = torch.arange(len(order), device="cpu")
            orders.append(order)
        encoded.append(b"" if orders[-1] is None else encode_order(orders[-1]))
    if bool((blob_of < 0).any()):
        return None
    sections = [result.section for result in results]
    index = Index(entries, [result.blob for result in results], blob_of, place_sections(sections, encoded))
    return StoredColumns(
        index,
        [section + order for section, order in zip(sections, encoded, strict=True)],
        [result.decoded() for result in results],
        orders,
    )


def _all_places(entries: list[Entry]) -> torch.Tensor:
    known: dict[int, torch.Tensor] = {}
    parts = []
    for entry in entries:
        layout = entry.layout
        if layout is None:
            parts.append(column([place(None)]))
            continue
        if id(layout) not in known:
            known[id(layout)] = layout.places()
        parts.append(known[id(layout)])
    return torch.cat(parts) if parts else column([])
