"""`BlockWriter`: a blob that is written in any number of steps. Small writes are gathered into blocks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from azure_torch_ckpt.blobs import outcome
from azure_torch_ckpt.blobs.blob_info import BlobSettings, CopiedSettings
from azure_torch_ckpt.blobs.outcome import Outcome
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.upload import Upload
from azure_torch_ckpt.errors import BlobChangedError, BlobExistsError, StoreError

__all__ = ["BlockWriter"]

# A write of this size keeps several connections busy, so the caller can wait until it is sent. A smaller one is copied,
# which costs little compared with sending it, so that several can be in flight at once.
_DIRECT = 64 * 1024 * 1024
# A `flush` sends a block that is not full, and a blob has 50,000 blocks at most. After this many flushes, an unfinished
# block stays here until it is full.
_SHORT_BLOCKS = 4_000


class BlockWriter:
    """Stages blocks in parallel. The blob appears, or is replaced, with `commit`.

    Attributes:
        settings: what the commit stores with the blob.

    Raises (all methods but `abort`): `StoreError`. After one, every further call fails and nothing is committed.
    """

    def __init__(
        self,
        store: BlobStore,
        path: str,
        settings: BlobSettings | CopiedSettings,
        *,
        if_etag: str | None = None,
        if_missing: bool = False,
    ) -> None:
        self._store = store
        self._path = path
        self.settings = settings
        self._if_etag = if_etag
        self._if_missing = if_missing
        self._upload = Upload(store, path, None)
        self._gathered = bytearray()
        self._handed_over = 0
        self._short_blocks = 0
        self._failure: BaseException | None = None
        self._pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child's copy of its parent's writer."""
        return self._pid != os.getpid()

    def write(self, view: memoryview) -> None:
        """Append a byte view. Its memory may change when this returns."""
        with self._failing():
            if view.nbytes >= _DIRECT:
                self._hand_over()
                self._upload.add([view])
                self._upload.settle()
                return
            while view.nbytes:
                room = self._upload.block_size - len(self._gathered)
                self._gathered += view[:room]
                view = view[room:]
                if len(self._gathered) == self._upload.block_size:
                    self._hand_over()

    def flush(self) -> None:
        """Wait until everything that was written is staged."""
        with self._failing():
            if self._short_blocks < _SHORT_BLOCKS:
                self._short_blocks += 1
                self._hand_over()
                self._upload.stage()
            else:
                self._upload.settle()

    def commit(self) -> str:
        """Commit the blocks, and return the blob's ETag.

        Raises:
            BlobExistsError: `if_missing`, and another writer made the blob meanwhile.
            BlobChangedError: `if_etag`, and the blob has another ETag.
            CommitUnknownError: `if_missing` or `if_etag`, and the answer was lost: the blob may have been written.
        """
        with self._failing():
            self._hand_over()
            block_ids = self._upload.stage()
            if self._if_etag is None and not self._if_missing:
                return self._store.commit_blocks(self._path, block_ids, self.settings)
            result = outcome.commit_blocks(
                self._store,
                self._path,
                block_ids,
                self.settings,
                if_etag=self._if_etag,
                if_missing=self._if_missing,
            )
            if result.outcome is Outcome.DONE:
                return result.etag
            where = f"{self._store.location}/{self._path}"
            error = result.error
            # A credential for writing only cannot read the blob back, so the answer has to suffice.
            refused = isinstance(error, BlobChangedError) and not error.may_be_done
            if result.outcome is Outcome.UNKNOWN and not refused:
                raise result.unknown(
                    f"It is unknown whether {where} was written. It is complete in either case, old or new; read it to "
                    "see which"
                )
            if self._if_missing:
                raise BlobExistsError(f"{where} exists: another writer made it meanwhile. It was left alone") from error
            raise BlobChangedError(
                f"{where} has another ETag than if_etag={self._if_etag}; it was left alone. Read it again"
            ) from error

    def abort(self, *, wait: bool = True) -> None:
        """Stop the requests in flight. The service removes the staged blocks after a week."""
        if not self.is_inherited:
            self._upload.abort(wait=wait)
        self._gathered = bytearray()

    def _hand_over(self) -> None:
        if not self._gathered:
            return
        block, self._gathered = memoryview(self._gathered), bytearray()
        options = self._store.options
        if self._upload.block_size * (options.concurrency + 2) > options.memory_budget:
            # Blocks of this size in all connections would exceed the budget.
            self._handed_over += block.nbytes
            if self._handed_over + self._upload.block_size > options.memory_budget:
                self._upload.settle()
                self._handed_over = 0
        self._upload.add([block])

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        where = f"{self._store.location}/{self._path}"
        if self.is_inherited:
            raise StoreError(f"{where} was opened in another process; a forked child cannot write to it")
        if self._failure is not None:
            raise StoreError(
                f"an earlier write to {where} failed, so nothing of it is committed. Open the blob again and write all "
                "of it"
            ) from self._failure
        try:
            yield
        except BaseException as error:
            self._failure = error
            self.abort()
            raise
