"""Appends to append blobs: https://learn.microsoft.com/rest/api/storageservices/append-block."""

from __future__ import annotations

import os
from typing import Final

from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
from azure_torch_ckpt.errors import BlobChangedError

__all__ = ["AppendWriter"]

_BLOCK: Final = 4 * 1024 * 1024  # what every version of the service takes


class AppendWriter:
    """Appends what is written, when it is committed; until then it is held in memory.

    For `BlobIO`, it does what a `BlockWriter` does. A blob of more than one block of 4 MiB is appended block by block,
    each only if nobody else has appended meanwhile.

    Args:
        blob: an append blob, as it is now.
    """

    def __init__(self, store: BlobStore, blob: BlobInfo) -> None:
        self._store = store
        self._blob = blob
        self._gathered = bytearray()
        self._pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child's copy of its parent's writer."""
        return self._pid != os.getpid()

    def write(self, view: memoryview) -> None:
        self._gathered += view

    def flush(self) -> None:
        """Nothing: what is appended is visible at once, and an exception may still drop it."""

    def commit(self) -> str:
        """Append, and return the blob's ETag.

        Raises:
            BlobChangedError: somebody else has appended since the blob was opened.
        """
        position, etag = self._blob.size, self._blob.etag
        gathered, self._gathered = self._gathered, bytearray()
        for start in range(0, len(gathered), _BLOCK):
            block = bytes(gathered[start : start + _BLOCK])
            etag = self._append(block, position)
            position += len(block)
        return etag

    def abort(self, *, wait: bool = True) -> None:
        self._gathered = bytearray()

    def _append(self, block: bytes, position: int) -> str:
        path = self._blob.path
        try:
            return self._store.append(path, block, position)
        except BlobChangedError as error:
            # The first attempt may have been carried out, and its answer lost.
            there, info = self._store.read_some(path, position, len(block))
            if error.may_be_done and there == block:
                return info.etag
            raise BlobChangedError(
                f"Somebody else has written to {self._store.location}/{path} since it was opened to append, and it was "
                f"left as it is from byte {position} on. Open it again and append the rest"
            ) from error
