"""`diff`: what two checkpoints have in common and what not; on request down to the bits of every tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.bytemeter import ByteProgress, byte_meter
from azure_torch_ckpt.catalog.contents import dtype_name
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.metadata.schema import stored_item
from azure_torch_ckpt.dcp.open_checkpoint import OpenCheckpoint, open_checkpoint
from azure_torch_ckpt.dcp.tensor_stream import StreamedChunk, ahead, object_bytes, stored_tensors, stream_chunks
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import Meter

__all__ = ["Change", "CheckpointDiff", "diff"]

_MIB = 1 << 20
_SLICE = 1 << 18  # elements whose difference is computed at a time, in float64
_SHOWN = 80  # characters of an object
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Change:
    """A difference under a key that both checkpoints have.

    Attributes:
        key: in the flattened state dict.
        what: ``"kind"`` (tensor or object), ``"shape"``, ``"dtype"`` or ``"value"``.
        a: what the first checkpoint has, for people; None for the value of a tensor.
        b: the same of the second one.
        elements: how many of a tensor's elements have other bits; None for anything else.
        max_abs_difference: the largest difference of these, as float64; nan where one of the two is no number, or where
            infinities differ. None for anything else, and for dtypes without numbers.
    """

    key: str
    what: Literal["kind", "shape", "dtype", "value"]
    a: str | None = None
    b: str | None = None
    elements: int | None = None
    max_abs_difference: float | None = None


@dataclass(frozen=True, slots=True)
class CheckpointDiff:
    """What `diff` found.

    Attributes:
        a: URL of the first checkpoint.
        b: URL of the second one.
        only_a: keys that only the first one has, in order.
        only_b: keys that only the second one has, in order.
        changed: differences under keys that both have, in the order of the keys.
        unchanged: keys that both have, without a difference that was looked for.
    """

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]
    changed: list[Change]
    unchanged: int

    @property
    def same(self) -> bool:
        """Whether there is no difference."""
        return not (self.only_a or self.only_b or self.changed)


def diff(
    a: str | os.PathLike[str] | BlobLocation,
    b: str | os.PathLike[str] | BlobLocation,
    *,
    values: bool = False,
    progress: ByteProgress | None = None,
    credential: Credential = None,
    b_credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> CheckpointDiff:
    """Compare two checkpoints: keys, and under the same keys kinds, shapes and dtypes, whatever their sharding.

    That fetches the metadata of both and nothing else.

    Args:
        values: compare the values as well, bit for bit, reading both checkpoints within ``options.memory_budget``. A
            tensor that both stored in the same chunks, with the same CRC64 and length of every item, counts as the same
            without being read; whether what is stored still has that checksum, `verify` tells. Objects are compared by
            their pickles, and where these differ after ``torch.load(weights_only=True)``.
        progress: called with the bytes that were read so far and those that will be, of both.
        credential: for both.
        b_credential: for the second one, if it needs another one.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint at one of the URLs.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: one of them cannot be read.
        StoreError: the service could not be asked.
    """
    whole = options or TransferOptions()
    # A third for each reader, of which half is for windows, and a third for the comparison.
    third = dataclasses.replace(whole, memory_budget=max(whole.memory_budget // 3, _MIB))
    one = open_checkpoint(a, Access(credential, third, ca_file))
    other = open_checkpoint(b, Access(credential if b_credential is None else b_credential, third, ca_file))
    mine, theirs = one.metadata.state_dict_metadata, other.metadata.state_dict_metadata
    both = sorted(mine.keys() & theirs.keys())
    changes: dict[str, list[Change]] = {key: _described(key, mine[key], theirs[key]) for key in both}
    if values:
        for change in _values(one, other, [key for key in both if not changes[key]], third, progress):
            changes[change.key].append(change)
    return CheckpointDiff(
        one.url,
        other.url,
        sorted(mine.keys() - theirs.keys()),
        sorted(theirs.keys() - mine.keys()),
        [change for key in both for change in changes[key]],
        sum(not changes[key] for key in both),
    )


def _described(key: str, one: object, other: object) -> list[Change]:
    if not isinstance(one, TensorStorageMetadata) or not isinstance(other, TensorStorageMetadata):
        kind, twin = ("tensor" if isinstance(entry, TensorStorageMetadata) else "object" for entry in (one, other))
        return [] if kind == twin else [Change(key, "kind", kind, twin)]
    found = []
    if one.size != other.size:
        found.append(Change(key, "shape", str(list(one.size)), str(list(other.size))))
    if one.properties.dtype != other.properties.dtype:
        found.append(Change(key, "dtype", dtype_name(one.properties.dtype), dtype_name(other.properties.dtype)))
    return found


def _values(
    one: OpenCheckpoint,
    other: OpenCheckpoint,
    keys: list[str],
    options: TransferOptions,
    progress: ByteProgress | None,
) -> list[Change]:
    doubtful = {key for key in keys if not _same_checksums(one, other, key)}
    mine, theirs = stored_tensors(one, doubtful.__contains__), stored_tensors(other, doubtful.__contains__)
    tensors = [key for key in keys if key in mine]
    objects = [key for key in keys if key in doubtful and key not in mine]
    lengths = [_length(checkpoint, key) for checkpoint in (one, other) for key in objects]
    total = 2 * sum(math.prod(mine[key].size) * mine[key].properties.dtype.itemsize for key in tensors) + sum(lengths)
    with byte_meter("diff", one.url, total, progress) as meter:
        found = _objects(one, other, objects, options.memory_budget // 2, meter)
        # Three windows of each may exist at a time.
        window = options.memory_budget // 8
        with (
            contextlib.closing(ahead(stream_chunks(one, [(key, mine[key]) for key in tensors], window))) as left,
            contextlib.closing(ahead(stream_chunks(other, [(key, theirs[key]) for key in tensors], window))) as right,
        ):
            tallies: dict[str, _Tally] = {}
            for part, twin in zip(
                itertools.chain.from_iterable(left), itertools.chain.from_iterable(right), strict=True
            ):
                tallies.setdefault(part.key, _Tally()).add(part, twin)
                meter.moved(part.elements.nbytes + twin.elements.nbytes)
    return found + [
        Change(key, "value", None, None, tally.elements, tally.difference)
        for key, tally in tallies.items()
        if tally.elements
    ]


def _same_checksums(one: OpenCheckpoint, other: OpenCheckpoint, key: str) -> bool:
    """Whether both stored the same bytes under `key`, as far as the CRC64 of 64 bits tells.

    An item's bytes are the tensor's with an envelope that follows from dtype, shape and torch's version. So the same
    checksums mean the same tensor; other ones may be due to another torch.
    """
    items = []
    for checkpoint in (one, other):
        entry: Any = checkpoint.metadata.state_dict_metadata[key]
        places = sorted((chunk.offsets, chunk.sizes) for chunk in entry.chunks) if _is_tensor(entry) else [(None, None)]
        found = []
        for offsets, sizes in places:
            item = stored_item(checkpoint.metadata.storage_data[MetadataIndex(key, offsets)])
            if item.crc64 is None or item.transforms:
                return False
            found.append((offsets, sizes, item.length, item.payload_offset, item.crc64))
        items.append(found)
    return items[0] == items[1]


def _is_tensor(entry: object) -> bool:
    return isinstance(entry, TensorStorageMetadata)


def _length(checkpoint: OpenCheckpoint, key: str) -> int:
    return stored_item(checkpoint.metadata.storage_data[MetadataIndex(key)]).length


class _Tally:
    """The differences of one tensor, of which the parts come one after the other."""

    def __init__(self) -> None:
        self.elements = 0
        self.difference: float | None = None

    def add(self, part: StreamedChunk, twin: StreamedChunk) -> None:
        left, right = part.elements.reshape(-1), twin.elements.reshape(-1)
        for start in range(0, left.numel(), _SLICE):
            self._compare(left[start : start + _SLICE], right[start : start + _SLICE])

    def _compare(self, left: torch.Tensor, right: torch.Tensor) -> None:
        differ = _bits(left) != _bits(right)
        if differ.dim() > 1:
            differ = differ.any(1)
        count = int(differ.sum())
        if count == 0:
            return
        self.elements += count
        difference = _largest_difference(left, right, differ)
        if difference is not None and not (self.difference is not None and math.isnan(self.difference)):
            larger = self.difference is None or math.isnan(difference) or difference > self.difference
            self.difference = difference if larger else self.difference


def _bits(elements: torch.Tensor) -> torch.Tensor:
    size = elements.element_size()
    if size in _INTEGERS:
        return elements.view(_INTEGERS[size])
    return elements.view(torch.uint8).reshape(-1, size)


def _largest_difference(left: torch.Tensor, right: torch.Tensor, where: torch.Tensor) -> float | None:
    if left.dtype is torch.bool:
        return None
    kind = torch.complex128 if left.is_complex() else torch.float64
    try:
        return float((left.to(kind)[where] - right.to(kind)[where]).abs().amax())  # which a nan makes nan
    except (RuntimeError, NotImplementedError):  # no numbers: bits packed in bytes
        return None


def _objects(one: OpenCheckpoint, other: OpenCheckpoint, keys: list[str], budget: int, meter: Meter) -> list[Change]:
    found = []
    for (key, left), (_, right) in zip(object_bytes(one, keys, budget), object_bytes(other, keys, budget), strict=True):
        meter.moved(_length(one, key) + _length(other, key))
        if left.getbuffer() == right.getbuffer():
            continue
        value, twin = _loaded(left), _loaded(right)
        if value is _UNKNOWN or twin is _UNKNOWN or not _same(value, twin):
            found.append(Change(key, "value", _shown(value), _shown(twin)))
    return found


_UNKNOWN = object()


def _loaded(stream: io.BytesIO) -> object:
    """The object, or `_UNKNOWN` if torch takes its class for unsafe: then its bytes are all there is to compare."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception:
        return _UNKNOWN


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape and one.layout == other.layout
        return same_kind and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def _shown(value: object) -> str:
    if value is _UNKNOWN:
        return "an object that torch.load takes for unsafe"
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
