"""`TensorStream`: whole tensors of a checkpoint as a stream of parts, row-major, in bounded memory, with checksums."""

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
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.item_reader import ItemReader, batches, open_item, run_reads
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, stored_item
from azure_torch_ckpt.dcp.metadata_blob import replaced_error
from azure_torch_ckpt.dcp.open_checkpoint import OpenCheckpoint, is_replaced
from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk, cut, is_whole
from azure_torch_ckpt.dcp.tensors.copies import copy_elements
from azure_torch_ckpt.dcp.tensors.memory import is_plain
from azure_torch_ckpt.dcp.tensors.regions import region_reads
from azure_torch_ckpt.dcp.tensors.torch_file import load_tensor
from azure_torch_ckpt.errors import AzureCheckpointError, CorruptCheckpointError, UnsupportedCheckpointError

__all__ = [
    "StreamedChunk",
    "TensorStream",
    "ahead",
    "object_bytes",
    "stored_objects",
    "stored_tensors",
    "stream_chunks",
]

_T = TypeVar("_T")
_Chunk = tuple[str, torch.Size]


@dataclass(frozen=True, slots=True)
class StreamedChunk:
    """A part of a tensor: the elements of `chunk`, contiguous and on the CPU."""

    key: str
    chunk: TensorChunk
    elements: torch.Tensor


def stored_tensors(
    checkpoint: OpenCheckpoint, keys: Callable[[str], bool] | None = None
) -> dict[str, TensorStorageMetadata]:
    """Return the tensors of a checkpoint by their keys, as far as `keys` accepts them.

    Raises:
        CorruptCheckpointError: the stored chunks do not cover a tensor.
        UnsupportedCheckpointError: a tensor is of a dtype that has no raw form (a quantized one, say).
    """
    tensors = {}
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
        tensors[key] = entry
    return tensors


def _has_raw_form(dtype: torch.dtype) -> bool:
    try:
        return is_plain(torch.empty(0, dtype=dtype, device="cpu"))
    except (RuntimeError, TypeError):
        return False


def stored_objects(checkpoint: OpenCheckpoint, keys: Callable[[str], bool] | None = None) -> list[str]:
    """Return the keys of everything that is not a tensor, as far as `keys` accepts them."""
    entries = checkpoint.metadata.state_dict_metadata.items()
    return [key for key, entry in entries if isinstance(entry, BytesStorageMetadata) and (keys is None or keys(key))]


def object_bytes(checkpoint: OpenCheckpoint, keys: Iterable[str], budget: int) -> Iterator[tuple[str, io.BytesIO]]:
    """Yield what ``torch.save`` wrote of each object, as much at once as the budget allows. See `stream_chunks`."""
    stream = TensorStream(checkpoint)
    indexed = ((MetadataIndex(key), stored_item(checkpoint.metadata.storage_data[MetadataIndex(key)])) for key in keys)
    for batch in batches(indexed, lambda one: one[1].length, budget):
        for (index, _), opened in zip(batch, stream.fetch_whole(batch), strict=True):
            yield index.fqn, opened


def stream_chunks(
    checkpoint: OpenCheckpoint, tensors: Iterable[tuple[str, TensorStorageMetadata]], window: int
) -> Iterator[list[StreamedChunk]]:
    """Yield the tensors in turn, cut into lists of about `window` bytes at most that are fetched at once.

    The cuts follow from sizes, dtypes and `window` alone, so two checkpoints with the same tensors can be read side by
    side. A tensor that torch's own writer stored, or of a class of its own, can only be read chunk by chunk: its chunks
    are held whole.

    Raises:
        CorruptCheckpointError: a blob is missing or short, or a checksum does not match.
        CheckpointReplacedError: the checkpoint was replaced or removed meanwhile.
        StoreError: the service could not be asked.
    """
    stream = TensorStream(checkpoint)
    cuts = (
        (key, entry.properties.dtype, chunk)
        for key, entry in tensors
        for chunk in cut(entry.size, window // entry.properties.dtype.itemsize)
    )
    for batch in batches(cuts, lambda one: math.prod(one[2].sizes) * one[1].itemsize, window):
        chunks = [
            StreamedChunk(key, chunk, torch.empty(chunk.sizes, dtype=dtype, device="cpu"))
            for key, dtype, chunk in batch
        ]
        stream.fill(chunks)
        yield chunks
        del chunks  # before the next ones are made


def ahead(values: Iterator[_T]) -> Generator[_T, None, None]:
    """Yield the same values, each made while the caller works on the one before. Two exist at a time."""
    wanted, made = threading.Semaphore(1), threading.Semaphore(0)
    ended = threading.Event()  # not Thread.join: see workers.py
    handed: list[tuple[_T | None, BaseException | None]] = []
    stopped = False

    def make() -> None:
        try:
            while True:
                wanted.acquire()
                if stopped:
                    return
                try:
                    handed.append((next(values), None))
                except BaseException as error:
                    handed.append((None, error))
                    return
                finally:
                    made.release()
        finally:
            ended.set()

    # Not an executor: see workers.py. A caller that stops early waits for the value that is being made.
    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            while not made.acquire(timeout=WAIT_SECONDS):
                pass
            value, error = handed.pop()
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


class TensorStream:
    """Reads items of a checkpoint that are consumed from first to last byte, in any number of steps."""

    def __init__(self, checkpoint: OpenCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._items = ItemReader(checkpoint.store, checkpoint.location, self._run)
        self._checks: dict[_Chunk, Check | None] = {}
        self._loaded: dict[_Chunk, torch.Tensor] = {}

    def fill(self, chunks: list[StreamedChunk]) -> None:
        """Fetch the elements of `chunks`, which follow those of the call before. Raises as `stream_chunks`."""
        download = Download(self._checkpoint.store, sum(chunk.elements.nbytes for chunk in chunks))
        self._run(download, [read for chunk in chunks for read in self._reads(chunk, download.part_size)])

    def fetch_whole(self, indexed: list[tuple[MetadataIndex, StoredItem]]) -> list[io.BytesIO]:
        """Fetch whole items. Raises as `stream_chunks`."""
        fetched = [self._items.whole(item, index) for index, item in indexed]
        download = Download(self._checkpoint.store, sum(len(buffer) for buffer, _ in fetched))
        self._run(download, [read for _, read in fetched])
        return [
            open_item(buffer, item, self._items.name(index))
            for (index, item), (buffer, _) in zip(indexed, fetched, strict=True)
        ]

    def _run(self, download: Download, reads: Iterable[Read]) -> None:
        run_reads(download, reads, self._raise_if_replaced, lambda: replaced_error(self._checkpoint.location))

    def _raise_if_replaced(self, error: AzureCheckpointError) -> None:
        location = self._checkpoint.location
        etags = {metadata_name(part.rank): part.stored.etag for part in self._checkpoint.parts}
        if is_replaced(self._checkpoint.store, location, etags):
            raise replaced_error(location) from error

    def _reads(self, wanted: StreamedChunk, limit: int) -> Iterator[Read]:
        entry: Any = self._checkpoint.metadata.state_dict_metadata[wanted.key]
        for chunk in entry.chunks:
            common = wanted.chunk.overlap(chunk.offsets, chunk.sizes)
            if common is None:
                continue
            index = MetadataIndex(wanted.key, chunk.offsets)
            item = stored_item(self._checkpoint.metadata.storage_data[index])
            target = wanted.elements
            for dim, (start, size) in enumerate(zip(common.offsets, common.sizes, strict=True)):
                target = target.narrow(dim, start - wanted.chunk.offsets[dim], size)
            offsets = [start - first for start, first in zip(common.offsets, chunk.offsets, strict=True)]
            is_last = all(
                start + size == extent for start, size, extent in zip(offsets, common.sizes, chunk.sizes, strict=True)
            )
            if item.payload_offset is None or item.transforms:
                self._copy_loaded(index, chunk, item, offsets, target, is_last)
                continue
            dtype = entry.properties.dtype
            path = self._items.path(item)
            payload = item.offset + item.payload_offset
            after = payload + math.prod(chunk.sizes) * dtype.itemsize
            # The runs of a chunk come in order and make it up, so its checksum can be compared.
            key = index.fqn, chunk.offsets
            if not any(offsets):
                self._checks[key] = self._items.check(item, index)
            check = self._checks[key]
            if check is not None:
                around = [(item.offset, payload)] * (not any(offsets)) + [(after, item.offset + item.length)] * is_last
                for start, end in around:
                    yield Read(path, start, end - start, memoryview(bytearray(end - start)), None, check)
            if is_last:
                del self._checks[key]
            yield from region_reads(path, payload, dtype, chunk.sizes, offsets, target, limit=limit, check=check)

    def _copy_loaded(
        self,
        index: MetadataIndex,
        chunk: ChunkStorageMetadata,
        item: StoredItem,
        offsets: list[int],
        target: torch.Tensor,
        is_last: bool,
    ) -> None:
        """Copy a run of a chunk that only ``torch.load`` can read. The chunk is fetched for its first run."""
        key = index.fqn, chunk.offsets
        if key not in self._loaded:
            [opened] = self.fetch_whole([(index, item)])
            self._loaded[key] = load_tensor(opened, self._items.name(index))
        region = self._loaded[key]
        if region.shape != chunk.sizes:
            raise CorruptCheckpointError(
                f"{self._items.name(index)} has the shape {tuple(region.shape)} where its metadata says "
                f"{tuple(chunk.sizes)}. Use another checkpoint"
            )
        for dim, (start, size) in enumerate(zip(offsets, target.shape, strict=True)):
            region = region.narrow(dim, start, size)
        copy_elements(region, target, self._items.name(index))
        if is_last:
            del self._loaded[key]
