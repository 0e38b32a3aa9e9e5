"""`AppendWriter`: appends to append blobs (https://learn.microsoft.com/rest/api/storageservices/append-block)."""

from __future__ import annotations

import os
from typing import Final

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.errors import BlobChangedError

__all__ = ["AppendWriter"]

_BLOCK: Final = 4 * 1024 * 1024  # every version of the service accepts this size


class AppendWriter:
    """Collects written data in memory, and appends it on commit.

    `BlobIO` uses it in place of a `BlockWriter`. Data of more than one block of 4 MiB is appended block by block, each
    on the condition that no other writer has appended in the meantime.

    Args:
        blob: an append blob in its current state.
    """

    def __init__(self, store: BlobStore, blob: BlobInfo) -> None:
        self._store = store
        self._blob = blob
        self._buffer = bytearray()
        self._pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether this object is a forked child's copy of its parent's writer."""
        return self._pid != os.getpid()

    def write(self, view: memoryview) -> None:
        self._buffer += view

    def flush(self) -> None:
        """Do nothing: appended data is visible at once, and an exception may still discard the buffer."""

    def commit(self) -> str:
        """Append the data and return the blob's ETag.

        Raises:
            BlobChangedError: another writer has appended since the blob was opened.
        """
        position, etag = self._blob.size, self._blob.etag
        data, self._buffer = self._buffer, bytearray()
        for start in range(0, len(data), _BLOCK):
            block = bytes(data[start : start + _BLOCK])
            etag = self._append(block, position)
            position += len(block)
        return etag

    def abort(self, *, wait: bool = True) -> None:
        self._buffer = bytearray()

    def _append(self, block: bytes, position: int) -> str:
        path = self._blob.path
        try:
            return self._store.append(path, block, position)
        except BlobChangedError as error:
            # The service may have carried out the first attempt although its answer was lost.
            stored, info = self._store.read_some(path, position, len(block))
            if error.may_be_done and stored == block:
                return info.etag
            raise BlobChangedError(
                f"Another writer has changed {self._store.location}/{path} since it was opened for appending. Nothing "
                f"was appended from byte {position} on. Open the blob again and append the rest"
            ) from error
