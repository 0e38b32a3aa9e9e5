"""`diff`: compares the keys, shapes and dtypes of two checkpoints, and on request the bits of every tensor."""

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

from azure_torch_ckpt.catalog.contents import dtype_name
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.metadata.schema import stored_item
from azure_torch_ckpt.dcp.open_checkpoint import OpenCheckpoint, open_checkpoint
from azure_torch_ckpt.dcp.report import job_rank
from azure_torch_ckpt.dcp.tensor_stream import StreamedChunk, ahead, object_bytes, stored_tensors, stream_chunks
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import Meter, Progress, ProgressOption, check_progress

__all__ = ["Change", "CheckpointDiff", "diff"]

_MIB = 1 << 20
_SLICE = 1 << 18  # elements that are compared at a time, in float64
_LONGEST_REPR = 80  # characters
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Change:
    """A difference under a key that both checkpoints have.

    Attributes:
        key: key in the flattened state dict.
        what: ``"kind"`` (tensor or object), ``"shape"``, ``"dtype"`` or ``"value"``.
        a: the first checkpoint's side of the difference, for people; None for the value of a tensor.
        b: the second checkpoint's side.
        elements: number of a tensor's elements with different bits; None for other differences.
        max_abs_difference: largest difference of these elements, as float64; nan if one of them is nan or infinities
            differ. None for other differences, and for dtypes that are not numbers.
    """

    key: str
    what: Literal["kind", "shape", "dtype", "value"]
    a: str | None = None
    b: str | None = None
    elements: int | None = None
    max_abs_difference: float | None = None


@dataclass(frozen=True, slots=True)
class CheckpointDiff:
    """The result of `diff`.

    Attributes:
        a: URL of the first checkpoint.
        b: URL of the second checkpoint.
        only_a: keys that only the first checkpoint has, in order.
        only_b: keys that only the second checkpoint has, in order.
        changed: differences under keys that both have, in the order of the keys.
        unchanged: number of keys that both have without a difference.
    """

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]
    changed: list[Change]
    unchanged: int

    @property
    def same(self) -> bool:
        """Whether the checkpoints have no difference."""
        return not (self.only_a or self.only_b or self.changed)


def diff(
    a: str | os.PathLike[str] | BlobLocation,
    b: str | os.PathLike[str] | BlobLocation,
    *,
    values: bool = False,
    progress: ProgressOption = None,
    credential: Credential = None,
    b_credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> CheckpointDiff:
    """Compare two checkpoints: keys, and under the same keys kinds, shapes and dtypes, whatever their sharding.

    Reads only the metadata of both, unless `values`.

    Args:
        a: the first checkpoint. b: the second checkpoint. values: also compare the values, bit for bit, reading both
        checkpoints within ``options.memory_budget``. A tensor
            is equal without being read if both checkpoints stored it in the same chunks, and every item has the same
            CRC64 and length; `verify` checks whether the data still has that checksum. Objects are compared by their
            pickles, and if these differ by their values after ``torch.load(weights_only=True)``.
        progress: as for `AzureBlobReader`; counts the bytes read from both. Nothing is reported without `values`.
        credential: for both.
        b_credential: for the second checkpoint, if it needs another one.

    Raises:
        CheckpointNotFoundError: one of the URLs has no complete checkpoint.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: one of the checkpoints cannot be read.
        StoreError: a request failed.
    """
    check_progress(progress)
    options = options or TransferOptions()
    # A third for each reader, of which half is for windows, and a third for the comparison.
    third = dataclasses.replace(options, memory_budget=max(options.memory_budget // 3, _MIB))
    one = open_checkpoint(a, Access(credential, third, ca_file))
    other = open_checkpoint(b, Access(credential if b_credential is None else b_credential, third, ca_file))
    mine, theirs = one.metadata.state_dict_metadata, other.metadata.state_dict_metadata
    both = sorted(mine.keys() & theirs.keys())
    changes: dict[str, list[Change]] = {key: _compare_metadata(key, mine[key], theirs[key]) for key in both}
    if values:
        for change in _compare_values(one, other, [key for key in both if not changes[key]], third, progress):
            changes[change.key].append(change)
    return CheckpointDiff(
        one.url,
        other.url,
        sorted(mine.keys() - theirs.keys()),
        sorted(theirs.keys() - mine.keys()),
        [change for key in both for change in changes[key]],
        sum(not changes[key] for key in both),
    )


def _compare_metadata(key: str, one: object, other: object) -> list[Change]:
    if not isinstance(one, TensorStorageMetadata) or not isinstance(other, TensorStorageMetadata):
        kind, twin = ("tensor" if isinstance(entry, TensorStorageMetadata) else "object" for entry in (one, other))
        return [] if kind == twin else [Change(key, "kind", kind, twin)]
    changes = []
    if one.size != other.size:
        changes.append(Change(key, "shape", str(list(one.size)), str(list(other.size))))
    if one.properties.dtype != other.properties.dtype:
        changes.append(Change(key, "dtype", dtype_name(one.properties.dtype), dtype_name(other.properties.dtype)))
    return changes


def _compare_values(
    one: OpenCheckpoint,
    other: OpenCheckpoint,
    keys: list[str],
    options: TransferOptions,
    progress: ProgressOption,
) -> list[Change]:
    may_differ = {key for key in keys if not _same_checksums(one, other, key)}
    mine, theirs = stored_tensors(one, may_differ.__contains__), stored_tensors(other, may_differ.__contains__)
    tensors = [key for key in keys if key in mine]
    objects = [key for key in keys if key in may_differ and key not in mine]
    lengths = [_length(checkpoint, key) for checkpoint in (one, other) for key in objects]
    total = 2 * sum(math.prod(mine[key].size) * mine[key].properties.dtype.itemsize for key in tensors) + sum(lengths)
    with Meter(progress, Progress("diff", one.url, job_rank(), 0, total, 0.0)) as meter:
        changes = _compare_objects(one, other, objects, options.memory_budget // 2, meter)
        # Three windows of each may exist at a time.
        window = options.memory_budget // 8
        with (
            contextlib.closing(ahead(stream_chunks(one, [(key, mine[key]) for key in tensors], window))) as left,
            contextlib.closing(ahead(stream_chunks(other, [(key, theirs[key]) for key in tensors], window))) as right,
        ):
            differences: dict[str, _TensorDifference] = {}
            for part, twin in zip(
                itertools.chain.from_iterable(left), itertools.chain.from_iterable(right), strict=True
            ):
                differences.setdefault(part.key, _TensorDifference()).add(part, twin)
                meter.moved(part.elements.nbytes + twin.elements.nbytes)
    return changes + [
        Change(key, "value", None, None, difference.elements, difference.max_abs)
        for key, difference in differences.items()
        if difference.elements
    ]


def _same_checksums(one: OpenCheckpoint, other: OpenCheckpoint, key: str) -> bool:
    """Whether both checkpoints stored bytes with the same CRC64 and length under `key`.

    An item's bytes are the tensor's in an envelope that depends on dtype, shape and torch's version. So equal checksums
    mean equal tensors; different ones may be due to another torch.
    """
    items = []
    for checkpoint in (one, other):
        entry: Any = checkpoint.metadata.state_dict_metadata[key]
        chunks: list[Any] = [(None, None)]  # of an object
        if isinstance(entry, TensorStorageMetadata):
            chunks = sorted((chunk.offsets, chunk.sizes) for chunk in entry.chunks)
        of_checkpoint = []
        for offsets, sizes in chunks:
            item = stored_item(checkpoint.metadata.storage_data[MetadataIndex(key, offsets)])
            if item.crc64 is None or item.transforms:
                return False
            of_checkpoint.append((offsets, sizes, item.length, item.payload_offset, item.crc64))
        items.append(of_checkpoint)
    return items[0] == items[1]


def _length(checkpoint: OpenCheckpoint, key: str) -> int:
    return stored_item(checkpoint.metadata.storage_data[MetadataIndex(key)]).length


class _TensorDifference:
    """Accumulates the difference of two tensors, whose parts come one after the other."""

    def __init__(self) -> None:
        self.elements = 0
        self.max_abs: float | None = None

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
        if difference is not None and not (self.max_abs is not None and math.isnan(self.max_abs)):
            larger = self.max_abs is None or math.isnan(difference) or difference > self.max_abs
            self.max_abs = difference if larger else self.max_abs


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
        return float((left.to(kind)[where] - right.to(kind)[where]).abs().amax())  # nan if any is nan
    except RuntimeError:  # the elements are not numbers but bits packed in bytes
        return None


def _compare_objects(
    one: OpenCheckpoint, other: OpenCheckpoint, keys: list[str], budget: int, meter: Meter
) -> list[Change]:
    changes = []
    for (key, left), (_, right) in zip(object_bytes(one, keys, budget), object_bytes(other, keys, budget), strict=True):
        meter.moved(_length(one, key) + _length(other, key))
        if left.getbuffer() == right.getbuffer():
            continue
        value, twin = _load_object(left), _load_object(right)
        if value is _UNTRUSTED or twin is _UNTRUSTED or not _equal(value, twin):
            changes.append(Change(key, "value", _short_repr(value), _short_repr(twin)))
    return changes


_UNTRUSTED = object()


def _load_object(stream: io.BytesIO) -> object:
    """Return the object, or `_UNTRUSTED` if torch does not trust its class; then only its bytes can be compared."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception:
        return _UNTRUSTED


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape and one.layout == other.layout
        return same_kind and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def _short_repr(value: object) -> str:
    if value is _UNTRUSTED:
        return "an object of a class that torch.load does not trust"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_REPR else text[: _LONGEST_REPR - 3] + "..."
