"""`BlobFile`: a `BlobIO` with the interface of fsspec's files, as text and for appending; how each mode opens one."""

from __future__ import annotations

import copy
import functools
import io
import os
from collections.abc import Mapping
from typing import Any, Final, Literal

from azure_torch_ckpt.blobs.blob_copy import copied_settings
from azure_torch_ckpt.blobs.blob_info import APPEND_BLOB, BLOCK_BLOB, BlobInfo, CopiedSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.errors import BlobChangedError, BlobNotFoundError, RequestRefusedError
from azure_torch_ckpt.filesystem.paths import Stores
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.location import BlobLocation

__all__ = ["COPY_BUFFER", "AppendWriter", "BlobFile", "BlobText", "open_blob"]

_BLOCK: Final = 4 * 1024 * 1024  # every version of the service accepts this size


class AppendWriter:
    """Collects written data in memory, and appends it to an append blob on commit.

    `BlobIO` uses it in place of a `BlockWriter`. Data of more than one block of 4 MiB is appended block by block, each
    on the condition that no other writer has appended since `blob` was read
    (https://learn.microsoft.com/rest/api/storageservices/append-block).
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
        """Append the data and return the ETag; raise `BlobChangedError` if another writer has appended meanwhile."""
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


COPY_BUFFER: Final = 32 * 1024 * 1024
"""Bytes that are read at a time where the content of one file is written to another."""


class BlobFile(BlobIO):
    """A blob that the filesystem has opened, with the modes and settings of `BlobIO`.

    Without `autocommit`, `close` only uploads the written data, and a transaction calls `commit` or `discard` later.

    Raises:
        BlobNotFoundError: mode is ``"rb"``, and there is no such blob.
    """

    def __init__(
        self,
        path: str,
        location: BlobLocation,
        mode: Literal["rb", "wb", "xb"],
        *,
        autocommit: bool,
        **settings: Any,
    ) -> None:
        self.path = path
        self._autocommit = autocommit
        self._pending = False
        super().__init__(location, mode, **settings)
        # One request more than BlobIO makes: callers expect this error, and the size, right after opening.
        if mode == "rb" and self._for_reading("open").info().is_folder:
            raise BlobNotFoundError(f"{location} is a folder, not a blob")

    def append_to(self, writer: AppendWriter) -> None:
        """Append the written data with `writer` instead of writing a new blob."""
        self._writer = writer  # type: ignore[assignment]  # it has the methods of BlockWriter that BlobIO calls

    def carry(self, old: CopiedSettings, given: Mapping[str, Any]) -> None:
        """Keep the settings of the replaced blob, except for those in `given`."""
        assert self._writer is not None
        content = copy.copy(old.content)
        if content is not None:
            content.content_md5 = None
            content.content_type = given.get("content_type") or content.content_type
        metadata, tags = given.get("metadata"), given.get("tags")
        self._writer.settings = CopiedSettings(
            content, old.metadata if metadata is None else metadata, old.tags if tags is None else tags
        )

    @property
    def size(self) -> int:
        """The blob's size in bytes or, when writing, the number of bytes written so far."""
        return self._position if self._reader is None else self._reader.info().size

    def close(self) -> None:
        """Finish reading; when writing, commit the data or, inside a transaction, only upload it."""
        if not self._autocommit and not self.closed and self._writer is not None:
            self._writer.flush()
            self._closed = self._pending = True
            return
        super().close()

    def abort(self) -> None:
        """Close without committing, also after the `close` of a transaction."""
        if self._pending and self._writer is not None:
            self._pending = False
            self._writer.abort()
        super().abort()

    def commit(self) -> None:
        """Create the blob from the written data, unless an exception inside ``with`` has discarded them."""
        if self._pending or not self.closed:
            self._closed, self._pending, self._autocommit = False, False, True
            self.close()

    def discard(self) -> None:
        """Discard the written data."""
        self.abort()


class BlobText(io.TextIOWrapper):
    """Text on a `BlobFile`. `close` commits it; an exception and the loss of the last reference do not."""

    def __init__(self, file: BlobFile, **settings: Any) -> None:
        self._file = file
        super().__init__(file, **settings)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._file.abort()  # discards the wrapper's buffer, too

    def __del__(self) -> None:
        # The base class would close the file, and so commit an incomplete text.
        if not self._file.closed:
            self._file.__del__()


def open_blob(stores: Stores, path: str, mode: str, *, autocommit: bool, **settings: Any) -> BlobFile:
    """Open a blob in a binary mode: those of `BlobIO`, and ``"ab"``.

    `settings` are ``if_etag``, ``content_type``, ``metadata`` and ``tags`` of `BlobIO`. Those that the mode cannot
    apply, and other modes, raise `ValueError`.
    """
    location, access = stores.locate(path), stores.access
    open_as = functools.partial(
        BlobFile,
        path,
        location,
        autocommit=autocommit,
        credential=access.credential,
        options=access.options,
        ca_file=access.ca_file,
    )
    if mode != "ab":
        return open_as(mode, **settings)  # type: ignore[arg-type]  # BlobIO refuses other modes
    store = stores.store(location)
    try:
        old = store.stat(location.path)
    except BlobNotFoundError:
        return open_as("xb", **settings)
    if old.kind != BLOCK_BLOB:
        return _open_append_blob(open_as("wb"), store, old, **settings)
    # A block blob is written again with its old content in front. Its checksum does not fit the new content.
    carried = copied_settings(store, old, strict=False)
    file = open_as("wb", **{"if_etag": old.etag, **settings})
    file.carry(carried, settings)
    try:
        with open_as("rb", if_etag=old.etag) as source:
            while data := source.read(COPY_BUFFER):
                file.write(data)
    except BaseException:
        file.abort()
        raise
    return file


def _open_append_blob(
    file: BlobFile, store: BlobStore, old: BlobInfo, *, if_etag: str | None = None, **settings: Any
) -> BlobFile:
    url = f"{store.location}/{old.path}"
    if old.kind != APPEND_BLOB:
        raise RequestRefusedError(f"{url} is a page blob, which cannot be appended to. Write a new blob")
    if settings:
        raise ValueError(f"Appending to {url}, an append blob, cannot change {', '.join(settings)}")
    if if_etag is not None and if_etag != old.etag:
        raise BlobChangedError(f"{url} has another ETag than if_etag={if_etag}. The blob was not changed")
    file.append_to(AppendWriter(store, old))
    return file
