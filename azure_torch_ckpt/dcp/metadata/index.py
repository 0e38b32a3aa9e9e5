"""`Index`: the metadata of a checkpoint in columns, as bytes that lie at the front of ``.metadata``.

The index says what ``Metadata.state_dict_metadata`` says, and which data blob has which item. Where an item lies in its
blob is in the blob's section (`sections.py`), so a rank reads the index and the sections of the blobs that it loads
from. `front.py` says where all of that lies in ``.metadata``.

An encoded index is compressed: a JSON document, then two columns of numbers: the blob of each item, and the offsets and
sizes of the chunks of each layout.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.dcp.metadata.columns import Entry, Layout, column, count_items, is_plain_size, to_bytes
from azure_torch_ckpt.dcp.metadata.schema import is_plain_path
from azure_torch_ckpt.dcp.metadata.sections import Section, inflate, narrow, widen, width_of
from azure_torch_ckpt.dcp.metadata.vocabulary import quote
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError

__all__ = [
    "Index",
    "SectionPlace",
    "StoredColumns",
    "decode_index",
    "decode_order",
    "describe_properties",
    "encode_index",
    "encode_order",
    "make_properties",
    "place_sections",
]

# Bytes that `.metadata` has at least for each item, beside the index (`pickled_items.py`).
_LEAST_PER_ITEM = 32

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is torch.layout}
_FORMATS = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is torch.memory_format
}


@dataclass(frozen=True, slots=True)
class SectionPlace:
    """Where the section of a data blob lies among all sections: bytes, and the CRC64 of them.

    Attributes:
        order: bytes behind the section that say in which order the items lie in the blob; 0: in that of their numbers.
    """

    start: int
    length: int
    order: int
    crc64: int


@dataclass(slots=True, eq=False)
class Index:
    """What is saved, and in which data blob.

    Attributes:
        entries: in the order of the state dict.
        blobs: names of the data blobs, below the checkpoint's URL.
        blob_of: the blob of each item, an int32 position in `blobs`.
        places: of the sections of the blobs.
    """

    entries: list[Entry]
    blobs: list[str]
    blob_of: torch.Tensor
    places: list[SectionPlace]
    _by_name: dict[str, Entry] = field(default_factory=dict)
    _by_blob: torch.Tensor | None = None
    _in_blob: torch.Tensor | None = None

    @property
    def by_name(self) -> dict[str, Entry]:
        if not self._by_name:
            self._by_name = {entry.name: entry for entry in self.entries}
        return self._by_name

    @property
    def by_blob(self) -> torch.Tensor:
        """The numbers of all items, those of one blob together."""
        if self._by_blob is None:
            self._by_blob = torch.argsort(self.blob_of, stable=True)
        return self._by_blob

    @property
    def in_blob(self) -> torch.Tensor:
        """Of each item, how many items of the same blob have a lower number."""
        if self._in_blob is None:
            by_blob, counts = self.by_blob, self.counts()
            starts = torch.cumsum(counts, dim=0) - counts
            in_blob = torch.empty(len(by_blob), dtype=torch.int32, device="cpu")
            within = torch.arange(len(by_blob), device="cpu") - starts[self.blob_of[by_blob]]
            in_blob[by_blob] = within.to(torch.int32)
            self._in_blob = in_blob
        return self._in_blob

    def counts(self) -> torch.Tensor:
        """How many items each blob has."""
        return torch.bincount(self.blob_of, minlength=len(self.blobs))

    def volumes(self) -> torch.Tensor:
        """Bytes of the elements of each item; 0 for an object."""
        parts = [
            torch.zeros(1, dtype=torch.int64, device="cpu")
            if entry.layout is None or entry.properties is None
            else entry.layout.volumes() * entry.properties.dtype.itemsize
            for entry in self.entries
        ]
        return torch.cat(parts) if parts else column([])


@dataclass(frozen=True, slots=True)
class StoredColumns:
    """An index and all of its sections.

    Attributes:
        encoded: of each blob of the index, its section and what says in which order its items are (`encode_order`).
        sections: the same, decoded.
        orders: of each blob; None where the items lie in the order of their numbers.
    """

    index: Index
    encoded: list[bytes]
    sections: list[Section]
    orders: list[torch.Tensor | None]


def place_sections(sections: Sequence[bytes], orders: Sequence[bytes]) -> list[SectionPlace]:
    """Lay sections out back to back, each with the order of its items behind it."""
    places = []
    start = 0
    for section, order in zip(sections, orders, strict=True):
        places.append(SectionPlace(start, len(section), len(order), crc64(order, crc64(section))))
        start += len(section) + len(order)
    return places


def encode_order(positions: torch.Tensor) -> bytes:
    """Encode in which order the items lie in a blob: of each, how many of the others have a lower number."""
    return zlib.compress(to_bytes(positions.to(torch.int32)), level=1)


def decode_order(data: bytes, count: int) -> torch.Tensor:
    """The inverse of `encode_order`. Raises `ValueError` for anything but an order of `count` items."""
    positions = widen(inflate(data, 4 * count), 4, count)
    if not torch.equal(torch.sort(positions).values, torch.arange(count, device="cpu")):
        raise ValueError("an order that names an item twice, or not at all")
    return positions


def encode_index(index: Index) -> tuple[bytes, int]:
    """Encode an index; return it with the number of bytes before compression."""
    numbers: dict[Any, int] = {}
    properties: list[Any] = []
    sizes: list[list[int]] = []
    layouts: list[Layout] = []

    def number(key: Any, values: list[Any], make: Callable[[], Any]) -> int:
        known = numbers.get(key)
        if known is None:
            known = numbers[key] = len(values)
            values.append(make())
        return known

    kinds: list[list[int]] = []
    for entry in index.entries:
        if entry.layout is None or entry.properties is None or entry.size is None:
            kinds.append([])
            continue
        described = describe_properties(entry.properties)
        size, layout = entry.size, entry.layout
        kinds.append(
            [
                number(described, properties, lambda described=described: described),  # type: ignore[misc]
                number(size, sizes, lambda size=size: list(size)),  # type: ignore[misc]
                number(id(layout), layouts, lambda layout=layout: layout),  # type: ignore[misc]
            ]
        )
    cuts = [part.flatten() for layout in layouts for part in (layout.offsets, layout.sizes)]
    cut = torch.cat(cuts) if cuts else column([])
    widths = [width_of(index.blob_of), width_of(cut)]
    document = {
        "names": [entry.name for entry in index.entries],
        "entries": kinds,
        "properties": properties,
        "sizes": sizes,
        "layouts": [list(layout.offsets.shape) for layout in layouts],
        "blobs": index.blobs,
        "sections": [[place.length, place.order, place.crc64] for place in index.places],
        "widths": widths,
    }
    # Two lone surrogates that JSON escapes could come back as one character.
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    raw = b"".join((len(text).to_bytes(8, "little"), text, narrow(index.blob_of, widths[0]), narrow(cut, widths[1])))
    return zlib.compress(raw, level=1), len(raw)


def decode_index(data: bytes, raw_length: int, blob_size: int, where: str) -> Index:
    """Read what `encode_index` made, without trusting it.

    Args:
        raw_length: bytes before compression.
        blob_size: bytes of all of ``.metadata``, which bounds what the index may describe: it repeats what lies there.
        where: names the blob in messages.

    Raises:
        CorruptCheckpointError: it contradicts itself.
        UnsafeMetadataError: it names a path outside the checkpoint, or describes far more than the blob contains.
        UnsupportedCheckpointError: a newer torch wrote it.
    """
    if raw_length > 65536 + 4 * blob_size:
        raise UnsafeMetadataError(
            f"{where} is refused: its index of {blob_size} bytes at most is said to be {raw_length} bytes long. It is "
            "damaged or was made to do harm; nothing was fetched. Use another checkpoint."
        )
    decoder = _Decoder(where, blob_size)
    try:
        return decoder.decode(inflate(data, raw_length))
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, RuntimeError) as error:
        decoder.corrupt(f"{type(error).__name__}: {error}", error)


class _Decoder:
    def __init__(self, where: str, blob_size: int) -> None:
        self._where = where
        self._blob_size = blob_size
        self._checked: set[tuple[int, int]] = set()

    def corrupt(self, reason: str, error: Exception | None = None) -> NoReturn:
        raise CorruptCheckpointError(
            f"The index of {self._where} contradicts itself: {reason}. It is damaged; restore it or use another "
            "checkpoint."
        ) from error

    def decode(self, raw: bytes) -> Index:
        end = 8 + int.from_bytes(raw[:8], "little")
        document = json.loads(raw[8:end])
        cut_width, blob_width = document["widths"][1], document["widths"][0]
        names, blobs = document["names"], document["blobs"]
        if not {type(part) for part in document.values()} <= {list}:
            self.corrupt("a part of it is not a list")
        properties = [self._properties(described) for described in document["properties"]]
        sizes = [self._size(size) for size in document["sizes"]]
        shapes = [self._shape(shape) for shape in document["layouts"]]
        if not all(type(name) is str for name in names) or len(set(names)) != len(names):
            self.corrupt("a name is not a string, or occurs twice")
        if len(document["entries"]) != len(names):
            self.corrupt("not every name has an entry")
        for blob in blobs:
            if type(blob) is not str:
                self.corrupt("the path of a data blob is not a string")
            if not is_plain_path(blob):
                raise UnsafeMetadataError(
                    f"{self._where} is refused: it names the data blob {quote(blob)}, which is not a plain path below "
                    "the checkpoint. It is damaged or was made to do harm; nothing was fetched. Use another checkpoint."
                )
        total = sum(shapes[kind[2]][0] if kind else 1 for kind in document["entries"])
        if total > self._blob_size // _LEAST_PER_ITEM:
            self.corrupt(f"it describes {total} items")
        blob_end = end + blob_width * total
        blob_of = widen(raw[end:blob_end], blob_width, total)
        if total and int(blob_of.max()) >= len(blobs):
            self.corrupt("an item lies in a blob that is not named")
        layouts = self._layouts(raw[blob_end:], cut_width, shapes)
        entries = [
            self._entry(name, kind, properties, sizes, layouts)
            for name, kind in zip(names, document["entries"], strict=True)
        ]
        count_items(entries)
        return Index(entries, blobs, blob_of.to(torch.int32), self._places(document["sections"], len(blobs)))

    def _entry(
        self,
        name: str,
        kind: list[int],
        properties: list[TensorProperties],
        sizes: list[torch.Size],
        layouts: list[Layout],
    ) -> Entry:
        if not kind:
            return Entry(name)
        if not all(type(number) is int and number >= 0 for number in kind):
            self.corrupt(f"the entry of {quote(name)} has no numbers")
        size, layout = sizes[kind[1]], layouts[kind[2]]
        if (kind[1], kind[2]) not in self._checked:
            if layout.offsets.shape[1] != len(size):
                self.corrupt(f"{quote(name)} has {len(size)} dimensions, and its chunks {layout.offsets.shape[1]}")
            if not layout.is_inside(size):
                self.corrupt(f"a chunk of {quote(name)} lies outside of the tensor, whose size is {tuple(size)}")
            self._checked.add((kind[1], kind[2]))
        return Entry(name, properties[kind[0]], size, layout)

    def _properties(self, described: list[Any]) -> TensorProperties:
        for known, name in ((_DTYPES, described[0]), (_LAYOUTS, described[1]), (_FORMATS, described[3])):
            if name not in known:
                raise UnsupportedCheckpointError(
                    f"{self._where} names torch.{quote(name)}, which torch {torch.__version__} does not have. A newer "
                    "torch wrote this checkpoint; upgrade torch."
                )
        if type(described[2]) is not bool or type(described[4]) is not bool:
            self.corrupt("a property of a tensor is not a boolean")
        if described[5] is not None:
            self._naturals(described[5])
        return make_properties(described)

    def _naturals(self, numbers: list[Any]) -> list[int]:
        if type(numbers) is not list or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            self.corrupt("a size is not a list of natural numbers")
        return numbers

    def _size(self, size: list[Any]) -> torch.Size:
        if not is_plain_size(self._naturals(size)):
            self.corrupt(f"a tensor has the size {size[:64]}")
        return torch.Size(size)

    def _shape(self, shape: list[Any]) -> tuple[int, int]:
        chunks, dims = self._naturals(shape)
        if not chunks:
            self.corrupt("a tensor has no chunks")
        return chunks, dims

    def _layouts(self, raw: bytes, width: int, shapes: list[tuple[int, int]]) -> list[Layout]:
        numbers = [2 * chunks * dims for chunks, dims in shapes]
        if not shapes:
            return []
        cut = widen(raw, width, sum(numbers)) if width or sum(numbers) <= self._blob_size else None
        if cut is None:
            self.corrupt("it describes more chunks than it has bytes")
        parts = torch.split(cut, [count // 2 for count in numbers for _ in range(2)])
        return [
            Layout(parts[2 * number].reshape(shape), parts[2 * number + 1].reshape(shape))
            for number, shape in enumerate(shapes)
        ]

    def _places(self, sections: list[list[int]], blobs: int) -> list[SectionPlace]:
        if len(sections) != blobs:
            self.corrupt("not every data blob has a section")
        places = []
        start = 0
        for length, order, checksum in sections:
            if not all(type(number) is int and number >= 0 for number in (length, order, checksum)):
                self.corrupt("the place of a section is not a number")
            places.append(SectionPlace(start, length, order, checksum))
            start += length + order
        if start > self._blob_size:
            self.corrupt("its sections are longer than the blob")
        return places


def describe_properties(properties: TensorProperties) -> tuple[Any, ...]:
    """Values that JSON knows, which are equal for equal properties."""
    return (
        str(properties.dtype).removeprefix("torch."),
        str(properties.layout).removeprefix("torch."),
        properties.requires_grad,
        str(properties.memory_format).removeprefix("torch."),
        properties.pin_memory,
        None if (strides := getattr(properties, "strides", None)) is None else tuple(strides),
    )


def make_properties(described: Sequence[Any]) -> TensorProperties:
    """The inverse of `describe_properties`. Strides are left out where torch has no room for them."""
    dtype, layout, gradient, memory_format, pinned, strides = described
    made: Any = TensorProperties(_DTYPES[dtype], _LAYOUTS[layout], gradient, _FORMATS[memory_format], pinned)
    if strides is not None and hasattr(TensorProperties, "strides"):  # since torch 2.15
        made.strides = tuple(strides)
    return made  # type: ignore[no-any-return]
