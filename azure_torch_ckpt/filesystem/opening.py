"""The part of the filesystem that opens blobs as files."""

from __future__ import annotations

import functools
import io
from typing import Any, Final

from azure_torch_ckpt.blobs.blob_copy import copied_settings
from azure_torch_ckpt.blobs.blob_info import APPEND_BLOB, BLOCK_BLOB
from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
from azure_torch_ckpt.errors import BlobChangedError, BlobNotFoundError, RequestRefusedError
from azure_torch_ckpt.filesystem.appending import AppendWriter
from azure_torch_ckpt.filesystem.files import BlobFile, BlobText
from azure_torch_ckpt.filesystem.hints import refuse_unknown, without_hints
from azure_torch_ckpt.filesystem.looking import LookingFileSystem
from azure_torch_ckpt.filesystem.paths import refuse_folder

__all__ = ["OpeningFileSystem"]

_PIECE: Final = 32 * 1024 * 1024
_OF_TEXT: Final = ("encoding", "errors", "newline")
_OF_BLOBS: Final = frozenset({"content_type", "if_etag", "metadata", "tags"})


class OpeningFileSystem(LookingFileSystem):
    """Base of `AzureBlobFileSystem`, with `open`."""

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: dict[str, Any] | None = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A blob as a file: `BlobIO` for binary modes, a text file on one for others.

        ``r``, ``w`` and ``x`` are those of Python. ``a`` appends to an append blob; any other blob is read and written
        anew with what comes, and keeps what it carries, if nobody else has written meanwhile: it suits a small log.
        Other modes do not exist: a blob is written whole. ``w`` cannot replace an append or page blob.

        Args:
            block_size, cache_options: ignored, as are the other options of caches; see `TransferOptions`.
            kwargs: for a text, ``encoding``, ``errors``, ``newline``; when writing, ``content_type``, ``metadata`` and
                ``tags``; ``if_etag`` for either. All as for `BlobIO`.

        Raises:
            BlobNotFoundError: there is no such blob to read.
            BlobExistsError: there is one, and `mode` is ``"x"``.
            UnknownOptionError: another option.
            ValueError: another mode, an argument that is not for this mode, or `compression` while writing, whose files
                would not commit.
        """
        kwargs = without_hints(kwargs)
        refuse_folder(path)
        if compression is not None and not mode.startswith("r"):
            raise ValueError(
                "compression= works for reading only. To write, use fsspec.open(url, 'wb', compression=...), or "
                "gzip.open(file, 'wb') on a file of this filesystem"
            )
        if "b" in mode:
            for name in _OF_TEXT:
                if kwargs.pop(name, None) is not None:
                    raise ValueError(f"binary mode doesn't take an argument {name}=")
            return super().open(path, mode, compression=compression, **kwargs)
        text = {name: kwargs.pop(name) for name in _OF_TEXT if name in kwargs}
        file = self.open(path, mode.replace("t", "") + "b", compression=compression, **kwargs)
        if isinstance(file, BlobFile):
            return BlobText(file, **text)
        return io.TextIOWrapper(file, **text)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        cache_type: str | None = None,
        **settings: Any,
    ) -> BlobFile:
        settings = without_hints(settings)
        refuse_unknown("open", settings.keys() - _OF_BLOBS)
        location = self._stores.locate(path)
        opened = functools.partial(
            BlobFile,
            path,
            location,
            autocommit=autocommit,
            credential=self._stores.given,
            options=self._stores.options,
            ca_file=self._stores.ca_file,
        )
        if mode != "ab":
            return opened(mode, **settings)  # type: ignore[arg-type]  # BlobIO refuses what is none of its modes
        store, parts = self._at(path)[1:]
        try:
            old = store.stat(parts.name)
        except BlobNotFoundError:
            return opened("xb", **settings)
        if old.kind != BLOCK_BLOB:
            return self._open_append_blob(opened("wb"), store, old, **settings)
        # What the blob carries, but for the checksum of a content that it will not have.
        carried = copied_settings(store, old, strict=False)
        file = opened("wb", **{"if_etag": old.etag, **settings})
        file.carry(carried, settings)
        try:
            with opened("rb", if_etag=old.etag) as source:
                while piece := source.read(_PIECE):
                    file.write(piece)
        except BaseException:
            file.abort()
            raise
        return file

    def _open_append_blob(
        self, file: BlobFile, store: BlobStore, old: BlobInfo, *, if_etag: str | None = None, **settings: Any
    ) -> BlobFile:
        where = f"{store.location}/{old.path}"
        if old.kind != APPEND_BLOB:
            raise RequestRefusedError(f"{where} is a page blob, to which nothing can be appended. Write a new blob")
        if settings:
            raise ValueError(f"{', '.join(settings)} cannot be changed by appending to {where}, an append blob")
        if if_etag is not None and if_etag != old.etag:
            raise BlobChangedError(f"{where} has another ETag than if_etag={if_etag}; it was left alone")
        file.append_to(AppendWriter(store, old))
        return file
