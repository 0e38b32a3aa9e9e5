"""Save plans as columns: what `AzureSavePlanner` sends instead of an object for every item."""

from __future__ import annotations

import dataclasses
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from azure_torch_ckpt.dcp.metadata.columns import are_plain, column, from_bytes, repeated
from azure_torch_ckpt.dcp.metadata.index import describe_properties, make_properties
from azure_torch_ckpt.dcp.metadata.names import pack_names, unpack_names
from azure_torch_ckpt.dcp.metadata.sections import narrow, widen, width_of

__all__ = ["ChosenItems", "LocalItems", "PlanStructure", "PlannedItems", "planned_items"]

_Structure = tuple[bytes, bytes]  # a `PlanStructure`, encoded: its names (`metadata.names`), and the rest
_TYPES = (WriteItemType.TENSOR, WriteItemType.SHARD, WriteItemType.BYTE_IO)
_SHARD = _TYPES.index(WriteItemType.SHARD)


@dataclass(frozen=True, slots=True)
class PlanStructure:
    """What a rank saves, but for where its chunks begin and how large they are: ranks have this in common.

    Attributes:
        names: keys, of the items in their order.
        types: of the items.
        properties, sizes: of the tensors; None for an object.
        dims: of the offsets; 0 for an object.
        is_shard: whether the item is a shard, not a plain tensor or an object.
        offsets_at, sizes_at: where offsets and sizes are in the numbers of `PlannedItems.cuts`.
    """

    names: tuple[str, ...]
    types: tuple[WriteItemType, ...]
    properties: tuple[TensorProperties | None, ...]
    sizes: tuple[torch.Size | None, ...]
    dims: torch.Tensor
    is_shard: torch.Tensor
    offsets_at: torch.Tensor
    sizes_at: torch.Tensor


class LocalItems(list[WriteItem]):
    """A rank's items. They are pickled as `PlannedItems`, if columns can hold them.

    Args:
        contents: of each item a CRC64 of its bytes, or None; see `PlannedItems.contents`.
    """

    def __init__(self, items: list[WriteItem], contents: Sequence[int | None] | None = None) -> None:
        super().__init__(items)
        self._contents = contents

    def planned(self) -> PlannedItems | None:
        """Encode items; None if there is anything in them that columns cannot hold."""
        names, types, described, sizes = [], [], [], []
        cuts = array("q")
        numbers: dict[Any, int] = {}
        values: list[Any] = []

        def number(value: Any) -> int:
            known = numbers.get(value)
            if known is None:
                known = numbers[value] = len(values)
                values.append(value)
            return known

        try:
            for item in self:
                index, data = item.index, item.tensor_data
                names.append(index.fqn)
                types.append(_TYPES.index(item.type))
                if type(index.fqn) is not str or index.index is not None or item.bytes_io_data is not None:
                    return None
                if item.type is WriteItemType.BYTE_IO:
                    if index.offset is not None or data is not None:
                        return None
                    described.append(-1)
                    sizes.append(-1)
                    continue
                if (
                    data is None
                    or not are_plain(data.properties)
                    or {type(data.size), type(data.chunk.offsets), type(data.chunk.sizes)} != {torch.Size}
                    or not len(data.size) == len(data.chunk.offsets) == len(data.chunk.sizes)
                    or index.offset != data.chunk.offsets
                ):
                    return None
                described.append(number(describe_properties(data.properties)))
                sizes.append(number(data.size))
                cuts.extend(data.chunk.offsets)
                cuts.extend(data.chunk.sizes)
        except (AttributeError, TypeError, ValueError, OverflowError):
            return None
        packed = pack_names(tuple(names))
        kinds = torch.cat([column(part) for part in (types, described, sizes)]) + 1
        widths = width_of(kinds)
        document = json.dumps(values).encode()
        rest = zlib.compress(len(document).to_bytes(8, "little") + document + narrow(kinds, widths))
        structure = packed, bytes((widths,)) + rest
        flat = column(cuts)
        if len(flat) and int(flat.min()) < 0:
            return None
        width = width_of(flat)
        packed_contents = None
        if self._contents is not None:
            known = bytes(crc is not None for crc in self._contents)
            packed_contents = zlib.compress(known + array("Q", (crc or 0 for crc in self._contents)).tobytes())
        return PlannedItems(structure, bytes((width,)) + zlib.compress(narrow(flat, width)), packed_contents)

    def __reduce__(self) -> tuple[Any, ...]:
        planned = self.planned()
        return (list, (list(self),)) if planned is None else (PlannedItems, planned.key)


@lru_cache(maxsize=64)
def _structure(data: _Structure) -> PlanStructure:
    names = unpack_names(data[0])
    rest = zlib.decompress(data[1][1:])
    split = 8 + int.from_bytes(rest[:8], "little")
    values: list[Any] = json.loads(rest[8:split])
    made = [make_properties(value) if value and isinstance(value[0], str) else torch.Size(value) for value in values]
    kinds = widen(rest[split:], data[1][0], 3 * len(names)) - 1
    types, described, sizes = kinds.reshape(3, len(names)).tolist()
    dims = column(0 if size < 0 else len(made[size]) for size in sizes)
    # In the cuts, the offsets of an item come first, then its sizes.
    owner = repeated(torch.arange(2 * len(dims), device="cpu"), torch.stack((dims, dims), dim=1).flatten())
    return PlanStructure(
        names,
        tuple(_TYPES[kind] for kind in types),
        tuple(None if number < 0 else made[number] for number in described),
        tuple(None if size < 0 else made[size] for size in sizes),
        dims,
        column(kind == _SHARD for kind in types) > 0,
        torch.nonzero(owner % 2 == 0).flatten(),
        torch.nonzero(owner % 2 == 1).flatten(),
    )


class PlannedItems(Sequence[WriteItem]):
    """A rank's items on the coordinator: a `WriteItem` is made when it is asked for.

    Args:
        hints: of each item, the number of its chunk among those of its tensor; -1: another rank writes it. None as
            long as nothing is decided. Once it is, they are all that is sent back: a pickle becomes `ChosenItems`.
    """

    def __init__(
        self, structure: _Structure, cuts: bytes, contents: bytes | None = None, hints: bytes | None = None
    ) -> None:
        self._structure = structure
        self._cuts = cuts
        self._contents = contents
        self._hints = hints

    @property
    def key(self) -> tuple[_Structure, bytes, bytes | None]:
        """Equal for equal plans. The first part is equal for equal structures."""
        return self._structure, self._cuts, self._contents

    @property
    def structure(self) -> PlanStructure:
        return _structure(self._structure)

    def cuts(self) -> torch.Tensor:
        """Offsets and sizes of all chunks, int64; `PlanStructure` says which is where."""
        return widen(zlib.decompress(self._cuts[1:]), self._cuts[0], 2 * len(self.structure.offsets_at))

    def contents(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of each item, whether its content is known, and its CRC64 as an int64 with the same bits.

        None: ranks that have the same chunk have the same content.
        """
        if self._contents is None:
            return None
        raw = zlib.decompress(self._contents)
        count = len(self.structure.names)
        return from_bytes(raw[:count], torch.bool), from_bytes(raw[count:], torch.int64)

    def with_hints(self, hints: bytes) -> PlannedItems:
        return PlannedItems(self._structure, self._cuts, self._contents, hints)

    def __len__(self) -> int:
        if self._hints is None:
            return len(self.structure.names)
        return sum(hint >= 0 for hint in ChosenItems(self._hints).hints())

    def __iter__(self) -> Iterator[WriteItem]:
        structure = self.structure
        cuts = self.cuts()
        offsets, sizes = cuts[structure.offsets_at].tolist(), cuts[structure.sizes_at].tolist()
        hints = ChosenItems(self._hints).hints() if self._hints is not None else None
        at = 0
        for number, (name, kind, properties, size) in enumerate(
            zip(structure.names, structure.types, structure.properties, structure.sizes, strict=True)
        ):
            hint = None if hints is None else hints[number]
            if properties is None or size is None:
                if hint is None or hint >= 0:
                    yield WriteItem(MetadataIndex(name), kind)
                continue
            chunk = ChunkStorageMetadata(
                torch.Size(offsets[at : at + len(size)]), torch.Size(sizes[at : at + len(size)])
            )
            at += len(size)
            if hint is None or hint >= 0:
                index = MetadataIndex(name, chunk.offsets, hint)
                yield WriteItem(index, kind, tensor_data=TensorWriteData(chunk, properties, size))

    @overload
    def __getitem__(self, number: int) -> WriteItem: ...
    @overload
    def __getitem__(self, number: slice) -> list[WriteItem]: ...
    def __getitem__(self, number: int | slice) -> WriteItem | list[WriteItem]:
        return list(self)[number]

    def __reduce__(self) -> tuple[Any, ...]:
        if self._hints is None:
            return PlannedItems, self.key
        return ChosenItems, (self._hints,)


@dataclass(frozen=True, slots=True)
class ChosenItems:
    """What the coordinator sends back of a plan; see `PlannedItems`."""

    packed: bytes

    @classmethod
    def of(cls, hints: torch.Tensor) -> bytes:
        shifted = hints + 1
        width = width_of(shifted)
        return bytes((width,)) + len(hints).to_bytes(4, "little") + zlib.compress(narrow(shifted, width), level=1)

    def hints(self) -> list[int]:
        count = int.from_bytes(self.packed[1:5], "little")
        return (widen(zlib.decompress(self.packed[5:]), self.packed[0], count) - 1).tolist()

    def choose(self, items: Sequence[WriteItem]) -> list[WriteItem]:
        """The items of the rank's own plan that it shall write."""
        return [
            item
            if item.index.offset is None
            else dataclasses.replace(item, index=MetadataIndex(item.index.fqn, item.index.offset, hint))
            for item, hint in zip(items, self.hints(), strict=True)
            if hint >= 0
        ]


def planned_items(items: Sequence[WriteItem]) -> PlannedItems | None:
    """The columns of a plan's items; None if they are not columns."""
    if isinstance(items, PlannedItems):
        return items
    if isinstance(items, LocalItems):
        return items.planned()
    return None
