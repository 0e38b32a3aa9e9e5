"""`BlobFile`: a `BlobIO` with the interface of fsspec's files, its text form, and how each mode opens one."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Mapping
from typing import Any, Final, Literal

from azure_torch_ckpt.blobs.blob_copy import copied_settings
from azure_torch_ckpt.blobs.blob_info import APPEND_BLOB, BLOCK_BLOB, BlobInfo, CopiedSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.errors import BlobChangedError, BlobNotFoundError, RequestRefusedError
from azure_torch_ckpt.filesystem.append_writer import AppendWriter
from azure_torch_ckpt.filesystem.stores import Stores
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.location import BlobLocation

__all__ = ["COPY_BUFFER", "BlobFile", "BlobText", "open_blob"]

COPY_BUFFER: Final = 32 * 1024 * 1024
"""Bytes that are read at a time where the content of one file is written to another."""


class BlobFile(BlobIO):
    """A blob that the filesystem has opened.

    Args:
        path: the blob's path in the filesystem.
        location: the same blob as a location.
        autocommit: whether `close` commits the written data. If False, `close` only uploads it, and a transaction calls
            `commit` or `discard` later.
        mode, settings: those of `BlobIO`.

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

    Args:
        path: a stripped path.
        settings: ``if_etag``, ``content_type``, ``metadata`` and ``tags`` of `BlobIO`.

    Raises:
        ValueError: another mode, or settings that this mode cannot apply.
        StoreError: the service cannot be reached or refuses.
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
