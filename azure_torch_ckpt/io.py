"""`BlobIO`: a blob as a binary file, for ``torch.save``, ``torch.load`` and every other user of a file object."""

from __future__ import annotations

import functools
import io
import operator
import os
import warnings
from collections.abc import Hashable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NoReturn, SupportsIndex, cast, get_args

from azure_torch_ckpt.blobs.blob_info import BlobSettings
from azure_torch_ckpt.blobs.block_writer import BlockWriter
from azure_torch_ckpt.blobs.range_reader import CACHED, RangeReader
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential, environment_values
from azure_torch_ckpt.errors import AccessDeniedError, BlobExistsError, BlobNotFoundError, LocationError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

if TYPE_CHECKING:
    from typing import BinaryIO

    from typing_extensions import Buffer, Self

    # Libraries declare files as IO[bytes], which the base classes of the io module are not.
    class _BinaryFile(io.BufferedIOBase, BinaryIO):
        pass

else:
    _BinaryFile = io.BufferedIOBase

__all__ = ["BlobIO"]

_Mode = Literal["rb", "wb", "xb"]
_PEEK = 64 * 1024
_NO_FILE = (
    "A blob is not a file on this machine, so it has no file descriptor and cannot be mapped into memory. Omit "
    "mmap=True: torch.load(BlobIO(url, 'rb')) reads every tensor directly into its own memory. To map it nevertheless, "
    "copy it first: `with open(path, 'wb') as file: shutil.copyfileobj(blob, file, 2**25)`, and load that path"
)
# torch.load(mmap=True) refuses every file object with a plain ValueError, "f must be a file path in order to use the
# mmap argument", before it uses the object in any way. So its words are the only sign of it; tests/io/test_formats.py
# fails when they change.
_WORDS_OF_TORCH = "mmap argument"


class BlobIO(_BinaryFile):
    """A blob, opened for reading or for writing.

        with BlobIO("https://account.blob.core.windows.net/models/weights.pt", "wb") as file:
            torch.save(model.state_dict(), file)
        with BlobIO("https://account.blob.core.windows.net/models/weights.pt", "rb") as file:
            model.load_state_dict(torch.load(file))

    **Reading** sends no request before the first read. From then on, one state of the blob is read: every request
    carries the ETag of the first answer, and a blob that is replaced meanwhile is an error, never a mixture. Small
    reads use ranges that are fetched ahead, at most 64 MiB of them; large ones go directly to the caller's memory.

    **Writing** sends blocks in parallel. The blob appears, or is replaced, when `close` returns, and not before. An
    existing blob stays untouched after an exception inside ``with``, after `abort`, and if the object is lost without
    `close` (with a `ResourceWarning`). A `write` of 64 MiB or more is sent from the caller's memory without a copy, and
    returns when it is sent. Smaller ones are copied, and at most ``options.memory_budget`` bytes of them are held.

    Not for several threads at once. A reader can be used in a forked child; a BlobIO cannot be pickled.

    Args:
        blob_url: the blob. A SAS, ``snapshot=``, ``versionid=`` and each slash of the blob's name are respected. A name
            that ends with a slash can be read, not written.
        mode: ``"rb"``, ``"wb"`` or ``"xb"`` (make the blob; it is an error if it exists).
        credential: see `azure_torch_ckpt.credentials.resolve`; a SAS in the URL wins.
        if_etag: read, or replace, only the blob with this ETag.
        content_type, metadata, tags: of a written blob; see `BlobSettings`.
        options: limits. ``options.block_size`` is the size of the first blocks.
        ca_file: PEM file with certificates to trust besides the platform's.

    Raises:
        ValueError: another mode, an argument that is not for this mode, or settings that the service would refuse.
        LocationError, CredentialError: `blob_url` or `credential` cannot be used.
        BlobExistsError: the blob exists, and `mode` is ``"xb"``. It is a `FileExistsError`.
        StoreError (all methods): the service cannot be reached or refuses. `BlobNotFoundError` is a
            `FileNotFoundError`, `AccessDeniedError` a `PermissionError`. After a failed write nothing is committed.
    """

    # The finaliser also runs if `__init__` has failed.
    _closed = True

    def __init__(
        self,
        blob_url: str | os.PathLike[str] | BlobLocation,
        mode: _Mode,
        *,
        credential: Credential = None,
        if_etag: str | None = None,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
    ) -> None:
        if mode not in get_args(_Mode):
            raise ValueError(f"Unsupported mode: {mode!r}. BlobIO is binary: 'rb', 'wb' or 'xb'")
        location = BlobLocation.parse_blob(blob_url)
        if not location.path:
            raise LocationError(f"{location} is a container. Append the name of a blob")
        if mode != "rb" and location.path.endswith("/"):
            raise LocationError(
                f"{location} ends with a slash. Many tools take such a blob for the mark of a folder and do not show "
                "its data. Append the name of a blob, or omit the slash"
            )
        settings = BlobSettings(content_type, metadata, tags)
        store = _shared_store(location.container_root(), Access(credential, options, ca_file))
        self._mode = mode
        self._name = str(location)
        self._etag: str | None = None
        self._reader: RangeReader | None = None
        self._writer: BlockWriter | None = None
        self._position = 0
        if mode == "rb":
            if settings != BlobSettings():
                raise ValueError("content_type, metadata and tags are for writing")
            self._reader = RangeReader(store, location, if_etag)
        else:
            if location.snapshot is not None or location.version_id is not None:
                raise LocationError(f"{location} is a snapshot or a version, which never changes. Write to the blob")
            if mode == "xb":
                if if_etag is not None:
                    raise ValueError("if_etag is a condition on a blob that exists, and 'xb' makes a new one")
                _refuse_existing(store, location)
            self._writer = BlockWriter(store, location.path, settings, if_etag=if_etag, if_missing=mode == "xb")
        self._closed = False

    def __repr__(self) -> str:
        return f"<BlobIO {self.name!r} mode={self.mode!r}{' closed' if self._closed else ''}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"cannot pickle or copy an open {self!r}: pass its URL, and open it there")

    # Either mode

    @property
    def mode(self) -> _Mode:
        return self._mode

    @property
    def name(self) -> str:
        """The URL without its SAS."""
        return self._name

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def etag(self) -> str | None:
        """The ETag of the blob that is read (by a HEAD request if nothing was read yet), or was written, once
        closed."""
        if self._reader is not None and self._etag is None:
            self._etag = self._reader.info().etag
        return self._etag

    def readable(self) -> bool:
        if self._reader is not None:
            self._check_open()
        return self._reader is not None

    def writable(self) -> bool:
        if self._writer is not None:
            self._check_open()
        return self._writer is not None

    def seekable(self) -> bool:
        """Whether `seek` works: in mode ``"rb"``."""
        return self.readable()

    def tell(self) -> int:
        self._check_open()
        return self._position

    def fileno(self) -> NoReturn:
        """Raise `io.UnsupportedOperation`: a blob has no file descriptor."""
        raise io.UnsupportedOperation(_NO_FILE)

    def flush(self) -> None:
        """Wait until all written data has arrived at the service; in mode ``"rb"``, do nothing.

        It only shows whether the service accepts the data: the blob appears with `close`. A flush sends an unfinished
        block as a small one. A blob has 50,000 blocks at most, so after 4,000 flushes an unfinished block stays in
        memory until it is full.
        """
        self._check_open()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """End reading, or commit the written data. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            self._etag = self._writer.commit()
        if self._reader is not None:
            self._reader.drop()

    def abort(self) -> None:
        """Close without committing: drop the written data, and leave an existing blob unchanged."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            self._writer.abort()
        if self._reader is not None:
            self._reader.drop()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self.abort()
        if isinstance(error, ValueError) and _WORDS_OF_TORCH in str(error):
            raise io.UnsupportedOperation(_NO_FILE) from error

    def __del__(self) -> None:
        writer = None if self._closed else self._writer
        self._closed = True
        if writer is not None and not writer.is_inherited:
            # Not waiting: this may run in any thread, also while the interpreter ends and the workers are gone.
            writer.abort(wait=False)
            warnings.warn(
                f"{self!r} was never closed, so nothing was written. Use `with`", ResourceWarning, 2, source=self
            )

    # Reading

    def read(self, size: int | None = -1, /) -> bytes:
        """Return `size` bytes, fewer only at the end; for -1 or None, all bytes up to the end."""
        reader = self._for_reading("read")
        length = None if size is None else operator.index(size)
        if length is not None and length < -1:
            raise ValueError(f"size must be greater than or equal to -1, not {length}")
        if length == 0:
            return b""
        length = None if length == -1 else length
        left = reader.begin(self._position, length) - self._position
        length = left if length is None else min(length, left)
        if length <= 0:
            return b""
        if length <= CACHED:
            ready = reader.at(self._position, length)
            if ready.nbytes >= length:
                self._position += length
                return bytes(ready[:length])
        # In the standard library, only this makes bytes that are written in place.
        memory = io.BytesIO()
        memory.seek(length - 1)
        memory.write(b"\0")
        with memory.getbuffer() as view:
            self._position += reader.read_into(self._position, view)
        return memory.getvalue()

    def readall(self) -> bytes:
        return self.read()

    def read1(self, size: int | None = -1, /) -> bytes:
        """Return at most `size` bytes, with at most one fetch."""
        reader = self._for_reading("read")
        ready = reader.at(self._position) if size != 0 else memoryview(b"")
        if size is not None and size >= 0:
            ready = ready[:size]
        self._position += ready.nbytes
        return bytes(ready)

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill a writable buffer, and return the number of bytes: its size, fewer only at the end of the blob."""
        reader = self._for_reading("read")
        view = _bytes_of(buffer)
        if view.readonly and view.nbytes:
            raise TypeError(f"readinto() needs a writable buffer, not a read-only {type(buffer).__name__}")
        count = reader.read_into(self._position, view)
        self._position += count
        return count

    def peek(self, size: int = 0, /) -> bytes:
        """Return bytes of the next read without moving: at least one before the end, whatever `size` is."""
        return bytes(self._for_reading("peek").at(self._position)[: max(size, _PEEK)])

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return the rest of the line with its ``b"\\n"``; at most `size` bytes, if that is not negative."""
        reader = self._for_reading("read")
        limit = -1 if size is None else operator.index(size)
        parts: list[bytes] = []
        while limit != 0:
            ready = reader.at(self._position)
            part = _line_in(ready if limit < 0 else ready[:limit])
            if not part:
                break
            parts.append(part)
            self._position += len(part)
            limit = max(limit - len(part), 0) if limit > 0 else limit
            if part.endswith(b"\n"):
                break
        return b"".join(parts)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move, also beyond the end, and return the new position. Only `SEEK_END` may send a request, for the size."""
        reader = self._for_reading("seek")
        offset, whence = operator.index(offset), operator.index(whence)
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += reader.info().size
        elif whence != os.SEEK_SET:
            raise ValueError(f"Unsupported whence: {whence}")
        if offset < 0:
            raise ValueError(f"Cannot seek to the negative position {offset}")
        self._position = offset
        return offset

    # Writing

    def write(self, data: Buffer, /) -> int:
        """Append any contiguous buffer; return its size in bytes. It may raise the error of an earlier write.

        Raises:
            TypeError: not a buffer (a str), or not contiguous.
        """
        if self._writer is None:
            raise io.UnsupportedOperation("write")
        self._check_open()
        view = _bytes_of(data)
        self._writer.write(view)
        self._position += view.nbytes
        return view.nbytes

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("I/O operation on closed file")

    def _for_reading(self, operation: str) -> RangeReader:
        if self._reader is None:
            raise io.UnsupportedOperation(operation)
        self._check_open()
        return self._reader


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # a view with a zero in its shape cannot be cast


def _line_in(view: memoryview) -> bytes:
    """Return the bytes up to and with the first line end, or all. Copies only the bytes that it searches."""
    step = 8 * 1024
    pieces = []
    for start in range(0, view.nbytes, step):
        piece = bytes(view[start : start + step])
        end = piece.find(b"\n") + 1
        if end:
            pieces.append(piece[:end])
            break
        pieces.append(piece)
    return b"".join(pieces)


def _refuse_existing(store: BlobStore, location: BlobLocation) -> None:
    try:
        store.stat(location.path)
    except BlobNotFoundError:
        return
    except AccessDeniedError:  # a credential for writing only; the commit is conditional in any case
        return
    raise BlobExistsError(f"{location} exists already. Choose another name, or open it with 'wb' to replace it")


@functools.lru_cache(maxsize=8, typed=True)
def _kept_store(
    location: BlobLocation, credential: Hashable, environment: tuple[str | None, ...], access: Access
) -> BlobStore:
    return BlobStore(location, access)


def _shared_store(location: BlobLocation, access: Access) -> BlobStore:
    """Return one store for all files of a container: a connection and a token cost more than a small blob."""
    environment = environment_values() if access.credential is None else ()  # a new SAS, perhaps
    try:
        # The credential counts with its type: False is a credential, 0 is none.
        return _kept_store(location, cast("Hashable", access.credential), environment, access)
    except TypeError:  # a credential that cannot be hashed
        return BlobStore(location, access)
