"""Whole tensors of a checkpoint as a stream of parts, in row-major order, in bounded memory, checksums compared."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from azure_torch_ckpt.blobs.download import Check, Download, Read
from azure_torch_ckpt.blobs.workers import WAIT_SECONDS
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, stored_item
from azure_torch_ckpt.dcp.open_checkpoint import StandingCheckpoint
from azure_torch_ckpt.dcp.tensors.chunks import Box, boxes
from azure_torch_ckpt.dcp.tensors.coverage import is_whole
from azure_torch_ckpt.dcp.tensors.memory import copy_elements, is_plain
from azure_torch_ckpt.dcp.tensors.reads import region_reads
from azure_torch_ckpt.dcp.tensors.torch_items import load_tensor, open_item
from azure_torch_ckpt.errors import (
    BlobNotFoundError,
    CorruptCheckpointError,
    RequestRefusedError,
    UnsupportedCheckpointError,
)

__all__ = ["Part", "ahead", "object_bytes", "objects_of", "parts_of", "tensors_of"]

_T = TypeVar("_T")
_Chunk = tuple[str, torch.Size]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor: the elements of `box`, contiguous and on the CPU."""

    key: str
    box: Box
    elements: torch.Tensor


def tensors_of(
    checkpoint: StandingCheckpoint, keys: Callable[[str], bool] | None = None
) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint by their keys, those that `keys` accepts.

    Raises:
        CorruptCheckpointError: the chunks of one do not make it up.
        UnsupportedCheckpointError: one is of a dtype that has no raw form (a quantized one, say).
    """
    found = {}
    for key, entry in checkpoint.metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or (keys is not None and not keys(key)):
            continue
        what = f"{key!r} of {checkpoint.url}"
        if not is_whole(entry):
            raise CorruptCheckpointError(f"The chunks of {what} do not make it up. Use another checkpoint")
        if not _has_raw_form(entry.properties.dtype):
            raise UnsupportedCheckpointError(
                f"{what} is of {entry.properties.dtype}, which has no raw form. Load it with dcp.load"
            )
        found[key] = entry
    return found


def objects_of(checkpoint: StandingCheckpoint, keys: Callable[[str], bool] | None = None) -> list[str]:
    """The keys of everything that is no tensor, those that `keys` accepts."""
    entries = checkpoint.metadata.state_dict_metadata.items()
    return [key for key, entry in entries if isinstance(entry, BytesStorageMetadata) and (keys is None or keys(key))]


def object_bytes(checkpoint: StandingCheckpoint, keys: Iterable[str], budget: int) -> Iterator[tuple[str, io.BytesIO]]:
    """What ``torch.save`` wrote for each of some objects, fetched as many at a time as the budget holds."""
    batch: list[tuple[str, StoredItem]] = []
    room = budget
    for key in keys:
        item = stored_item(checkpoint.metadata.storage_data[MetadataIndex(key)])
        if batch and item.length > room:
            yield from _fetched(checkpoint, batch)
            batch, room = [], budget
        batch.append((key, item))
        room -= item.length
    yield from _fetched(checkpoint, batch)


def parts_of(
    checkpoint: StandingCheckpoint, tensors: Iterable[tuple[str, TensorStorageMetadata]], window: int
) -> Iterator[list[Part]]:
    """The parts of the tensors in turn, as lists of about `window` bytes at most that are fetched at once.

    The cuts follow from sizes, dtypes and `window` alone, so two checkpoints with the same tensors can be read side by
    side. A tensor that torch's own writer stored, or of a class of its own, can only be read chunk by chunk: its chunks
    are held whole.

    Raises:
        CorruptCheckpointError: a blob is missing or short, or a checksum does not match.
        StoreError: the service could not be asked.
    """
    stream = _Stream(checkpoint)
    parts: list[Part] = []
    size = 0
    for key, entry in tensors:
        dtype = entry.properties.dtype
        for box in boxes(entry.size, window // dtype.itemsize):
            nbytes = math.prod(box.sizes) * dtype.itemsize
            if parts and size + nbytes > window:
                stream.fill(parts)
                yield parts
                parts, size = [], 0
            parts.append(Part(key, box, torch.empty(box.sizes, dtype=dtype, device="cpu")))
            size += nbytes
    if parts:
        stream.fill(parts)
        yield parts


def ahead(values: Iterator[_T]) -> Generator[_T, None, None]:
    """The same values, each made while the caller works on the one before. Two exist at a time."""
    wanted, made = threading.Semaphore(1), threading.Semaphore(0)
    ended = threading.Event()  # not Thread.join: see workers.py
    box: list[tuple[_T | None, BaseException | None]] = []
    stopped = False

    def make() -> None:
        try:
            while True:
                wanted.acquire()
                if stopped:
                    return
                try:
                    box.append((next(values), None))
                except BaseException as error:
                    box.append((None, error))
                    return
                finally:
                    made.release()
        finally:
            ended.set()

    # Not an executor: see workers.py. Whoever stops early waits for the value that is being made.
    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            while not made.acquire(timeout=WAIT_SECONDS):
                pass
            value, error = box.pop()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.release()
            yield value  # type: ignore[misc]
            del value
    finally:
        stopped = True
        wanted.release()
        while not ended.wait(WAIT_SECONDS):
            pass


class _Stream:
    def __init__(self, checkpoint: StandingCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._checks: dict[_Chunk, Check | None] = {}
        self._whole: dict[_Chunk, torch.Tensor] = {}

    def fill(self, parts: list[Part]) -> None:
        total = sum(part.elements.nbytes for part in parts)
        download = Download(self._checkpoint.store, total)
        _run(self._checkpoint, download, [read for part in parts for read in self._reads(part, download.part_size)])

    def _reads(self, part: Part, limit: int) -> Iterator[Read]:
        entry: Any = self._checkpoint.metadata.state_dict_metadata[part.key]
        for chunk in entry.chunks:
            common = part.box.overlap(chunk.offsets, chunk.sizes)
            if common is None:
                continue
            item = stored_item(self._checkpoint.metadata.storage_data[MetadataIndex(part.key, chunk.offsets)])
            target = part.elements
            for dim, (start, size) in enumerate(zip(common.offsets, common.sizes, strict=True)):
                target = target.narrow(dim, start - part.box.offsets[dim], size)
            offsets = [start - first for start, first in zip(common.offsets, chunk.offsets, strict=True)]
            ends = all(
                start + size == extent for start, size, extent in zip(offsets, common.sizes, chunk.sizes, strict=True)
            )
            if item.payload_offset is None or item.transforms:
                self._copy_whole(part.key, chunk, item, offsets, target, ends)
            else:
                yield from self._region(part.key, chunk, item, entry.properties.dtype, offsets, target, ends, limit)

    def _region(
        self,
        key: str,
        chunk: ChunkStorageMetadata,
        item: StoredItem,
        dtype: torch.dtype,
        offsets: list[int],
        target: torch.Tensor,
        ends: bool,
        limit: int,
    ) -> Iterator[Read]:
        """The reads of one run of a chunk, whose runs come in order and make it up: its checksum can be compared."""
        assert item.payload_offset is not None
        path = self._checkpoint.location.join(item.relative_path).path
        payload = item.offset + item.payload_offset
        after = payload + math.prod(chunk.sizes) * dtype.itemsize
        if not any(offsets):
            self._checks[key, chunk.offsets] = self._check(key, item)
        check = self._checks[key, chunk.offsets]
        if check is not None:
            around = [(item.offset, payload)] * (not any(offsets)) + [(after, item.offset + item.length)] * ends
            for start, end in around:
                yield Read(path, start, end - start, memoryview(bytearray(end - start)), None, check)
        if ends:
            del self._checks[key, chunk.offsets]
        yield from region_reads(path, payload, dtype, chunk.sizes, offsets, target, limit=limit, check=check)

    def _copy_whole(
        self,
        key: str,
        chunk: ChunkStorageMetadata,
        item: StoredItem,
        offsets: list[int],
        target: torch.Tensor,
        ends: bool,
    ) -> None:
        index = (key, chunk.offsets)
        if index not in self._whole:
            [(_, stream)] = _fetched(self._checkpoint, [(key, item)])
            self._whole[index] = load_tensor(stream, f"{key!r} at {list(chunk.offsets)} of {self._checkpoint.url}")
        region = self._whole[index]
        if region.shape != chunk.sizes:
            raise CorruptCheckpointError(
                f"{key!r} at {list(chunk.offsets)} of {self._checkpoint.url} has the shape {tuple(region.shape)} where "
                f"its metadata says {tuple(chunk.sizes)}. Use another checkpoint"
            )
        for dim, (start, size) in enumerate(zip(offsets, target.shape, strict=True)):
            region = region.narrow(dim, start, size)
        copy_elements(region, target, f"{key!r} of {self._checkpoint.url}")
        if ends:
            del self._whole[index]

    def _check(self, key: str, item: StoredItem) -> Check | None:
        return _check(self._checkpoint, key, item)


def _check(checkpoint: StandingCheckpoint, key: str, item: StoredItem) -> Check | None:
    if item.crc64 is None or not checkpoint.store.options.checksums:
        return None

    def mismatch(found: int) -> None:
        raise CorruptCheckpointError(
            f"{key!r} of {checkpoint.url}: the {item.length} bytes at offset {item.offset} of blob "
            f"{item.relative_path} have CRC64 {found:016x} where {item.crc64:016x} was saved. They were damaged in "
            "storage or on the way. Use another checkpoint, or try again to rule out the way"
        )

    return Check(item.crc64, item.length, mismatch)


def _fetched(checkpoint: StandingCheckpoint, items: list[tuple[str, StoredItem]]) -> list[tuple[str, io.BytesIO]]:
    buffers = [bytearray(item.length) for _, item in items]
    reads = [
        Read(
            checkpoint.location.join(item.relative_path).path,
            item.offset,
            item.length,
            memoryview(buffer),
            None,
            _check(checkpoint, key, item),
        )
        for (key, item), buffer in zip(items, buffers, strict=True)
    ]
    _run(checkpoint, Download(checkpoint.store, sum(map(len, buffers))), reads)
    return [
        (key, open_item(buffer, item.transforms, f"{key!r} of {checkpoint.url}"))
        for (key, item), buffer in zip(items, buffers, strict=True)
    ]


def _run(checkpoint: StandingCheckpoint, download: Download, reads: list[Read]) -> None:
    try:
        download.run(reads)
    except BlobNotFoundError as error:
        raise CorruptCheckpointError(
            f"A data blob of {checkpoint.url} is missing: {error}. Somebody deleted it, or replaced the checkpoint "
            "while it was being read"
        ) from error
    except RequestRefusedError as error:
        if error.status != 416:
            raise
        raise CorruptCheckpointError(
            f"A data blob of {checkpoint.url} is shorter than its metadata says: {error}. Use another checkpoint"
        ) from error


def _has_raw_form(dtype: torch.dtype) -> bool:
    try:
        return is_plain(torch.empty(0, dtype=dtype, device="cpu"))
    except (RuntimeError, TypeError):
        return False
