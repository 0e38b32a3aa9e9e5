"""`StoredPiece`: the part of a load plan's request that lies in one stored item, found in the metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from azure_torch_ckpt.dcp.metadata.columns import Entry, Layout
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, stored_item
from azure_torch_ckpt.dcp.metadata.views import StoredItems
from azure_torch_ckpt.errors import CorruptCheckpointError

__all__ = ["StoredPiece", "find_pieces"]


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Elements of one stored chunk, or an object.

    Attributes:
        index: names the item.
        dtype, chunk: of the stored chunk: its dtype and sizes. An object has none.
        storage_offsets: of the elements in the chunk.
        offsets: of the elements in what is requested; None if they are all of it.
        lengths: of the elements.
    """

    index: MetadataIndex
    item: StoredItem
    dtype: torch.dtype | None
    chunk: torch.Size
    storage_offsets: torch.Size
    offsets: torch.Size | None
    lengths: torch.Size

    def part(self, region: torch.Tensor) -> torch.Tensor:
        """The part of what is requested that these elements are for."""
        if self.offsets is None:
            return region
        return region[tuple(slice(at, at + length) for at, length in zip(self.offsets, self.lengths, strict=True))]


_Cut = tuple[int, torch.Size, torch.Size, torch.Size]  # number of a chunk; offsets in it and in the request; lengths


def find_pieces(
    metadata: Metadata, requests: Iterable[ReadItem], name: Callable[[MetadataIndex], str]
) -> list[list[StoredPiece]]:
    """Find what is stored of each request, in one item or in several.

    A request names a stored chunk. Where the metadata shows a tensor as one chunk that is stored in many
    (`metadata.views.whole_tensors`), it is cut here.

    Args:
        name: names an item for a message.

    Raises:
        CorruptCheckpointError: the metadata does not have an item, or is damaged.
        CheckpointReplacedError: the checkpoint was replaced or removed meanwhile.
        StoreError: the service could not be asked.
    """
    if isinstance(metadata.storage_data, StoredItems):
        return _in_columns(metadata, metadata.storage_data, list(requests), name)
    sizes: dict[str, dict[torch.Size, torch.Size]] = {}
    found = []
    for request in requests:
        index = request.storage_index
        info = metadata.storage_data.get(index)
        if info is None:
            raise _missing(name(index))
        dtype, chunk = None, torch.Size()
        entry = metadata.state_dict_metadata[index.fqn]
        if request.type == LoadItemType.TENSOR and isinstance(entry, TensorStorageMetadata):
            dtype, hint = entry.properties.dtype, index.index
            if hint is not None and hint < len(entry.chunks) and entry.chunks[hint].offsets == index.offset:
                chunk = entry.chunks[hint].sizes
            else:
                chunks = sizes.setdefault(index.fqn, {chunk.offsets: chunk.sizes for chunk in entry.chunks})
                assert index.offset is not None
                chunk = chunks[index.offset]
        found.append(
            [StoredPiece(index, stored_item(info), dtype, chunk, request.storage_offsets, None, request.lengths)]
        )
    return found


def _in_columns(
    metadata: Metadata, stored: StoredItems, requests: list[ReadItem], name: Callable[[MetadataIndex], str]
) -> list[list[StoredPiece]]:
    cuts: dict[tuple[int, torch.Size, torch.Size], list[_Cut]] = {}
    chosen: list[tuple[ReadItem, Entry, list[_Cut]]] = []
    numbers: list[int] = []
    for request in requests:
        index = request.storage_index
        entry = stored.index.by_name.get(index.fqn)
        if entry is None:
            raise _missing(name(index))
        shown = metadata.state_dict_metadata.get(index.fqn)
        if (
            entry.layout is not None
            and len(entry.layout) > 1
            and isinstance(shown, TensorStorageMetadata)
            and len(shown.chunks) == 1
        ):
            key = id(entry.layout), request.storage_offsets, request.lengths
            pieces = cuts.get(key)
            if pieces is None:
                pieces = cuts[key] = _cut(entry.layout, request.storage_offsets, request.lengths)
        else:
            number = stored.number_of(index)
            if number is None:
                raise _missing(name(index))
            none = torch.Size()
            pieces = [(number - entry.first, request.storage_offsets, none, request.lengths)]
        chosen.append((request, entry, pieces))
        numbers += (entry.first + piece[0] for piece in pieces)
    items = iter(stored.fetch(numbers))
    return [[_piece(request, entry, piece, next(items)) for piece in pieces] for request, entry, pieces in chosen]


def _cut(layout: Layout, start: torch.Size, lengths: torch.Size) -> list[_Cut]:
    """Cut a region of a tensor at the borders of its stored chunks."""
    offsets, sizes = layout.rows
    cuts = []
    for number in layout.overlapping(start, lengths):
        first = torch.Size(map(max, start, offsets[number]))
        end = [
            min(one + length, other + size)
            for one, length, other, size in zip(start, lengths, offsets[number], sizes[number], strict=True)
        ]
        cuts.append(
            (
                number,
                torch.Size(at - offset for at, offset in zip(first, offsets[number], strict=True)),
                torch.Size(at - begin for at, begin in zip(first, start, strict=True)),
                torch.Size(stop - at for stop, at in zip(end, first, strict=True)),
            )
        )
    return cuts


def _piece(request: ReadItem, entry: Entry, cut: _Cut, item: StoredItem) -> StoredPiece:
    number, storage_offsets, offsets, lengths = cut
    if entry.layout is None or entry.properties is None:
        return StoredPiece(request.storage_index, item, None, torch.Size(), storage_offsets, None, lengths)
    starts, sizes = entry.layout.rows
    return StoredPiece(
        MetadataIndex(entry.name, starts[number], number),
        item,
        entry.properties.dtype,
        sizes[number],
        storage_offsets,
        None if lengths == request.lengths else offsets,
        lengths,
    )


def _missing(name: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"The metadata has no storage for {name}. Use another checkpoint")
