"""`BlobFile`: a `BlobIO` with what fsspec expects of a file, and its text form."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any, Literal

from azure_torch_ckpt.blobs.settings import CopiedSettings
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.errors import BlobNotFoundError
from azure_torch_ckpt.filesystem.appending import AppendWriter
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["BlobFile", "BlobText"]


class BlobFile(BlobIO):
    """A blob of the filesystem, opened.

    Args:
        path: its path in the filesystem.
        location: the same as a location.
        autocommit: whether `close` commits what was written. Otherwise it only sends it, and `commit` or `discard`
            decides: a transaction calls one of them.
        if_missing: of a file that is written: the blob must not be there at the commit.

    The rest is as for `BlobIO`.

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
        credential: Credential,
        options: TransferOptions | None,
        ca_file: str | None,
        **settings: Any,
    ) -> None:
        self.path = path
        self._autocommit = autocommit
        self._pending = False
        super().__init__(location, mode, credential=credential, options=options, ca_file=ca_file, **settings)
        # One request more than BlobIO, for those who look for the error, or the size, right after opening.
        if mode == "rb" and self._for_reading("open").info().is_folder:
            raise BlobNotFoundError(f"{location} is a folder, not a blob")

    def append_to(self, writer: AppendWriter) -> None:
        """Append what is written, instead of writing a blob anew."""
        self._writer = writer  # type: ignore[assignment]  # it does what BlobIO asks of a BlockWriter

    def carry(self, old: CopiedSettings, given: Mapping[str, Any]) -> None:
        """The blob keeps what it carried before, except for the settings that are given."""
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
        """Bytes: of the blob, or written so far."""
        return self._position if self._reader is None else self._reader.info().size

    def close(self) -> None:
        """End reading; commit what was written or, in a transaction, send it."""
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
        """Make the blob of what was written. After `abort`, do nothing: an exception inside ``with`` dropped it."""
        if self._pending or not self.closed:
            self._closed, self._pending, self._autocommit = False, False, True
            self.close()

    def discard(self) -> None:
        """Drop what was written."""
        self.abort()


class BlobText(io.TextIOWrapper):
    """Text on a `BlobFile`, which commits when it is closed, but not because of an exception or a lost reference."""

    def __init__(self, file: BlobFile, **settings: Any) -> None:
        self._file = file
        super().__init__(file, **settings)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._file.abort()  # what this wrapper still holds goes nowhere

    def __del__(self) -> None:
        # The base class would close it, and so commit half a text.
        if not self._file.closed:
            self._file.__del__()
