"""`Upload`: items (lists of views) are gathered into the blocks of one blob, which bounded workers send."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from azure_torch_ckpt._internal.checksums import combine, crc64
from azure_torch_ckpt.blobs.staging import Staging
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import Workers
from azure_torch_ckpt.transport.buffers import Cancel, Gather

__all__ = ["Item", "Segment", "Upload", "stage_segments"]


@dataclass(slots=True)
class Segment:
    """The bytes of an item that are in one block. `crc64` is set once the block is staged."""

    views: list[memoryview] = field(default_factory=list)
    length: int = 0
    crc64: int = 0


@dataclass(slots=True)
class Item:
    """The result of one call of `Upload.add`: `length` bytes at `offset` of the blob."""

    offset: int
    length: int = 0
    segments: list[Segment] = field(default_factory=list)

    def crc64(self) -> int:
        """Return the CRC64-NVME of the item's bytes; valid after `Upload.finish`."""
        if len(self.segments) == 1:
            return self.segments[0].crc64
        crc = 0
        for segment in self.segments:
            crc = combine(crc, segment.crc64, segment.length)
        return crc


class Upload:
    """One blob, written as parallel blocks, visible only after `finish`.

    At most ``options.concurrency + 4`` blocks are in memory, so `add` waits when the network is slower than its caller.
    Use it as a context manager: an exception inside stops the workers, and nothing is committed.

    Args:
        total: the expected number of bytes, which determines the size of the blocks. None if unknown: the blocks grow
            with the blob.
        moved: called by a worker with the size of each block that has arrived.

    Raises (all methods but `abort`): `StoreError` if a block could not be staged, or the blob could not be committed.
    """

    def __init__(
        self, store: BlobStore, path: str, total: int | None, *, moved: Callable[[int], None] | None = None
    ) -> None:
        self._store = store
        self._path = path
        self._moved = moved
        self._checksums = store.options.checksums
        self._grows = total is None
        self.block_size = store.options.block_size_at(0) if total is None else store.options.part_size(total)
        self._cancel = Cancel()
        self._workers = Workers(store.options.concurrency, "blob-upload", self._cancel.cancel)
        self._blocks = 0
        self._staging = Staging(store, path)
        self._block: list[Segment] = []
        self._room = self.block_size
        self._flushed = 0
        self._offset = 0

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._workers.__exit__(kind, error, traceback)

    def add(self, views: Iterable[memoryview], *, copies: bool = False) -> Item:
        """Append an item: one-dimensional byte views, whose memory must not change before `finish` returns.

        Args:
            copies: whether only the upload holds the views' memory. Each view of up to a block is then put into one
                block, not two, so that staging a block frees all memory of its views.
        """
        item = Item(self._offset)
        if not copies:
            views = list(views)
            size = sum(view.nbytes for view in views)
            if size <= self._room:  # most items of a checkpoint with many small ones
                segment = Segment(views, size)
                self._block.append(segment)
                self._room -= size
                self._offset += size
                item.length = size
                item.segments.append(segment)
                return item
        segment = self._new_segment(item)
        for view in views:
            length = view.nbytes
            if copies and self._room < length <= self.block_size:
                self._flush()
                segment = self._new_segment(item)
            start = 0
            while length - start > self._room:
                cut = start + self._room
                segment.views.append(view[start:cut])
                segment.length += self._room
                self._flush()
                segment = self._new_segment(item)
                start = cut
            if length > start:
                segment.views.append(view[start:] if start else view)
                segment.length += length - start
                self._room -= length - start
            item.length += length
        self._offset += item.length
        return item

    def finish(self) -> None:
        """Wait for all blocks and commit the blob. Without any bytes, write nothing."""
        if block_ids := self.stage():
            self._store.commit_blocks(self._path, block_ids)

    def stage(self) -> list[str]:
        """Send the unfinished block, wait for all blocks, and return their ids. More can be added afterwards."""
        if self._room < self.block_size:
            self._flush()
        self._workers.finish()
        return self._staging.ids(range(self._blocks))

    def settle(self) -> None:
        """Release the memory that was given to `add` so far: wait for the full blocks, copy the unfinished one."""
        for segment in self._block:
            segment.views = [memoryview(b"".join(segment.views))]
        self._workers.finish()

    def abort(self, *, wait: bool = True) -> None:
        """Stop and commit nothing. With `wait`, no memory that was given to `add` is used afterwards."""
        self._workers.abort(wait=wait)

    def _new_segment(self, item: Item) -> Segment:
        segment = Segment()
        item.segments.append(segment)
        self._block.append(segment)
        return segment

    def _flush(self) -> None:
        block, self._block = self._block, []
        self._workers.submit(functools.partial(self._stage, self._blocks, block))
        self._blocks += 1
        self._flushed += sum(segment.length for segment in block)
        if self._grows:
            self.block_size = self._store.options.block_size_at(self._flushed)
        self._room = self.block_size

    def _stage(self, number: int, block: list[Segment]) -> None:
        size = stage_segments(
            block, self._checksums, lambda body, crc: self._staging.stage(number, body, crc, self._cancel)
        )
        if self._moved is not None:
            self._moved(size)


def stage_segments(segments: Sequence[Segment], checksums: bool, stage: Callable[[Gather, int | None], object]) -> int:
    """Stage the segments of one block, compute their checksums, and release their memory.

    Args:
        checksums: whether to compute them.
        stage: called with the block's body and its CRC64 (None without checksums).

    Returns:
        The bytes of the block.
    """
    crc = None
    if checksums:
        crc = 0
        for segment in segments:
            for view in segment.views:
                segment.crc64 = crc64(view, segment.crc64)
            crc = combine(crc, segment.crc64, segment.length)
    body = Gather([view for segment in segments for view in segment.views])
    stage(body, crc)
    for segment in segments:
        segment.views = []  # the item stays for its checksum, without its memory
    return len(body)
