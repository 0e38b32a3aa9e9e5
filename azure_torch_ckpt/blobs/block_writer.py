"""A blob that is written piece by piece: small pieces are gathered into blocks, large ones are sent as they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from azure_torch_ckpt.blobs import outcome
from azure_torch_ckpt.blobs.outcome import Outcome
from azure_torch_ckpt.blobs.settings import BlobSettings, CopiedSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.transfer import Upload
from azure_torch_ckpt.errors import BlobChangedError, BlobExistsError, StoreError

__all__ = ["BlockWriter"]

# A piece of this size keeps several connections busy by itself, so its writer can wait until it is sent. A smaller one
# is copied, which costs little beside sending it, and many of them are on their way at once.
_DIRECT = 64 * 1024 * 1024
# A `flush` sends a block that is not full, and a blob has 50,000 blocks at most. After so many flushes, what is not a
# full block stays here until there is more.
_SHORT_BLOCKS = 4_000


class BlockWriter:
    """Stages blocks in parallel; the blob is there after `commit`, and only then.

    Args:
        path: the blob's name in the container.
        if_etag: replace only the blob with this ETag.
        if_missing: write only if there is no such blob.

    Attributes:
        settings: what the blob carries, as of the commit.

    Raises (all methods but `abort`): `StoreError`. After one, nothing more can be written and nothing is committed.
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
        """Make the blob, and return its ETag.

        Raises:
            BlobExistsError: `if_missing`, and somebody made the blob meanwhile.
            BlobChangedError: `if_etag`, and the blob has another one.
            CommitUnknownError: `if_missing` or `if_etag`, and nobody knows whether the blob was written.
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
            # Where the credential is for writing only, the answer has to do.
            refused = isinstance(error, BlobChangedError) and not error.may_be_done
            if result.outcome is Outcome.UNKNOWN and not refused:
                raise result.unknown(
                    f"Whether {where} was written is unknown. It is what it was before or what was written here, whole "
                    "either way; read it to see which"
                )
            if self._if_missing:
                raise BlobExistsError(f"{where} exists; somebody wrote it meanwhile. It was left alone") from error
            raise BlobChangedError(
                f"{where} has another ETag than if_etag={self._if_etag}; it was left alone. Read it again"
            ) from error

    def abort(self, *, wait: bool = True) -> None:
        """Break off what is under way. The blocks that are staged vanish by themselves, after a week."""
        if not self.is_inherited:
            self._upload.abort(wait=wait)
        self._gathered = bytearray()

    def _hand_over(self) -> None:
        if not self._gathered:
            return
        block, self._gathered = memoryview(self._gathered), bytearray()
        options = self._store.options
        if self._upload.block_size * (options.concurrency + 2) > options.memory_budget:
            # Blocks of this size in all connections would be too much.
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
