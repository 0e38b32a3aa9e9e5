"""`BlockStager`: stages one rank's bytes of several files as blocks, which the coordinator commits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from azure_torch_ckpt.blobs.staging import block_id
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.upload import Item, Segment, stage_segments
from azure_torch_ckpt.blobs.workers import Workers
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["BlockStager", "StagedBlock", "rank_block_id"]


@dataclass(frozen=True, slots=True)
class StagedBlock:
    """A block that was staged, and where its bytes belong in a file.

    Attributes:
        path: of the file in the container.
        offset: from the end of the file's header.
        length: bytes.
        id: of the block.
    """

    path: str
    offset: int
    length: int
    id: str


def rank_block_id(save_id: str, rank: int, number: int) -> str:
    """The id of a rank's block. No two ranks have the same ids, for they stage blocks of the same file."""
    return block_id(save_id, rank * 10**6 + number)


class BlockStager:
    """Stages bytes in blocks that hold neighbouring bytes of one file each.

    At most ``options.concurrency + 4`` blocks are held at a time. A context manager: an exception inside stops the
    workers.

    Args:
        block_size: largest block.
        moved: called by a worker with the bytes of each block that has arrived.
    """

    def __init__(
        self, store: BlobStore, save_id: str, rank: int, block_size: int, moved: Callable[[int], None]
    ) -> None:
        self._store = store
        self._save_id = save_id
        self._rank = rank
        self._block_size = block_size
        self._moved = moved
        self._cancel = Cancel()
        self._workers = Workers(store.options.concurrency, "blob-upload", self._cancel.cancel)
        self._path = ""
        self._start = 0
        self._length = 0
        self._segments: list[Segment] = []
        self.blocks: list[StagedBlock] = []

    def __enter__(self) -> BlockStager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._workers.__exit__(kind, error, traceback)

    def add(self, path: str, starts: Sequence[int], run: int, views: Iterable[memoryview]) -> list[Item]:
        """Add bytes of a file, the memory of which must not change before `finish` returns.

        Args:
            path: of the file in the container.
            starts: of each run of bytes, from the end of the file's header.
            run: bytes of each run.
            views: the bytes of all runs, one after the other.

        Returns:
            An item for each run, which has its CRC64 after `finish`.

        Raises:
            StoreError: a block could not be staged.
        """
        items = [Item(start) for start in starts]
        number, segment = 0, None
        for view in views:
            while view.nbytes:
                if items[number].length == run:
                    number += 1
                    segment = None
                item = items[number]
                offset = item.offset + item.length
                if (path, offset) != (self._path, self._start + self._length) or self._length == self._block_size:
                    self._flush()
                    self._path, self._start = path, offset
                    segment = None
                if segment is None:
                    segment = Segment()
                    item.segments.append(segment)
                    self._segments.append(segment)
                part = view[: min(self._block_size - self._length, run - item.length)]
                segment.views.append(part)
                segment.length += part.nbytes
                self._length += part.nbytes
                item.length += part.nbytes
                view = view[part.nbytes :]
        return items

    def finish(self) -> None:
        """Stage the last block, and wait for all of them."""
        self._flush()
        self._workers.finish()

    def _flush(self) -> None:
        if self._length:
            block = StagedBlock(
                self._path, self._start, self._length, rank_block_id(self._save_id, self._rank, len(self.blocks))
            )
            self.blocks.append(block)
            self._workers.submit(functools.partial(self._stage, block, self._segments))
        self._path, self._start, self._length, self._segments = "", 0, 0, []

    def _stage(self, block: StagedBlock, segments: list[Segment]) -> None:
        stage_segments(
            segments,
            self._store.options.checksums,
            lambda body, crc: self._store.stage_block(block.path, block.id, body, crc, cancel=self._cancel),
        )
        self._moved(block.length)
