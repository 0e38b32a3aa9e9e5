"""`Archive`: a tar file that is read forwards, member by member, and what its links point to."""

from __future__ import annotations

import contextlib
import gzip
import math
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from azure_torch_ckpt.datasets.listing import ListedBlob
from azure_torch_ckpt.datasets.shards import Shard
from azure_torch_ckpt.errors import AzureCheckpointError, TarShardError

__all__ = ["Archive", "begin_in"]

_CHUNK = 1024 * 1024
_LINKS = 40  # that point to each other, as Linux allows them
# How a file begins that is compressed: https://en.wikipedia.org/wiki/List_of_file_signatures
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}


class Archive:
    """The members of a tar file, or of several that were concatenated (as ``tar --ignore-zeros`` reads them).

    Args:
        begin: an offset that iterating gave, or 0; in a compressed file, of what it decompresses to.
    """

    def __init__(self, shard: Shard, begin: int) -> None:
        self._shard = shard
        self._begin = begin
        self._file: _Forward | None = None
        self._index: dict[str, list[_Known]] | None = None

    def __iter__(self) -> Iterator[tuple[tarfile.TarInfo, int]]:
        """Each member, of any type, with the offset behind it.

        Raises:
            TarShardError: the file is damaged or not complete.
            StoreError: it cannot be read.
        """
        with self._named():
            file = self._file = _opened(self._shard, self._begin)
            while True:
                # Not this machine's encoding: names shall be the same in all workers.
                with tarfile.TarFile(
                    fileobj=cast("BinaryIO", file), mode="r", encoding="utf-8", errors="surrogateescape"
                ) as tar:
                    for member in tar:
                        cast("Any", tar).members.clear()  # where tarfile keeps all that it has read
                        yield member, cast("Any", tar).offset
                # tarfile takes a damaged header, unless it is the first one, and the end of the blob for the end.
                if not file.last:
                    raise tarfile.ReadError("the blocks of zeros are missing that end a tar file")
                if file.last.strip(b"\0"):
                    raise tarfile.ReadError("damaged header")
                if not file.skip_zeros():
                    return

    def data(self, member: tarfile.TarInfo) -> bytes | TarShardError | None:
        """The content of the member that iterating gave last; of a link, that of the file it points to.

        Returns:
            None for what is no file: a directory, a device. An error for a member that has no content, though it is
            a file: the others can be read all the same.

        Raises:
            TarShardError: the tar file is damaged or not complete.
            StoreError: it cannot be read.
        """
        with self._named():
            if member.issparse():
                return self._error(f"{member.name!r} is a sparse file. Pack it without --sparse")
            if member.isreg():
                assert self._file is not None
                self._file.seek(member.offset_data)
                return _exactly(self._file.read, member.size)
            if not member.islnk() and not member.issym():
                return None
            try:
                target = self._target(member)
            except KeyError:
                return self._error(f"{member.name!r} is a link to {member.linkname!r}, which is not in the tar file")
            if target is None:
                return None
            if target.sparse:
                return self._error(f"{member.name!r} is a link to a sparse file. Pack it without --sparse")
            if _is_compressed(self._shard.blob):
                return _exactly(_opened(self._shard.again(0), target.data).read, target.size)
            return _exactly(self._shard.again(target.data, max(target.size, 1)).read, target.size)

    def _target(self, link: tarfile.TarInfo) -> _Known | None:
        """The file that a link points to, through other links; None for what is no file.

        Raises:
            KeyError: it is not there.
        """
        if self._index is None:
            # The target of a symbolic link may follow, and a pass that goes on in the middle has not seen those before.
            self._index = {}
            for member, _ in Archive(self._shard.again(0), 0):
                self._index.setdefault(posixpath.normpath(member.name), []).append(_Known.of(member))
        name, known = link.name, _Known.of(link)
        for _ in range(_LINKS):
            limit = math.inf
            if known.kind == tarfile.LNKTYPE:
                name, limit = posixpath.normpath(known.link), known.begin  # tar links to what it has packed already
            else:
                name = posixpath.normpath(posixpath.join(posixpath.dirname(name), known.link))
            found = [other for other in self._index.get(name, ()) if other.begin < limit]
            if not found:
                if name == "." or any(other.startswith(name + "/") for other in self._index):
                    return None
                raise KeyError(name)
            known = found[-1]
            if known.kind not in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                return known if known.kind in tarfile.REGULAR_TYPES else None
        raise KeyError(name)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Raise what tarfile, gzip and zlib raise of damaged bytes, of any type, with the URL."""
        try:
            yield
        except (AzureCheckpointError, MemoryError):
            raise
        except Exception as error:
            raise self._error(self._reason(error)) from error

    def _reason(self, error: Exception) -> str:
        first = b"" if self._file is None else self._file.first
        compressed = _is_compressed(self._shard.blob)
        for begin, name in _COMPRESSED.items():
            if first.startswith(begin):
                once = name == "gzip" and not compressed
                advice = "Let its name end in .tar.gz" if once else "Compress it once, with gzip, or not at all"
                return f"it is compressed with {name}. {advice}"
        if self._shard.blob.size == 0:
            return "it is empty, without the two blocks of zeros that end a tar file. Write it again"
        if isinstance(error, gzip.BadGzipFile) and not first:
            return f"{error}. Let its name end in .tar if it is not compressed"
        offset = 0 if self._file is None else self._file.tell()
        return f"it is damaged or not complete, before offset {offset}: {error}. Write it again"

    def _error(self, reason: str) -> TarShardError:
        return TarShardError(f"{self._shard.blob.url}: {reason}")


def begin_in(blob: ListedBlob, offset: int) -> int:
    """From where on the blob has to be read, to get what lies from `offset` on; see `Archive`."""
    return 0 if _is_compressed(blob) else offset


@dataclass(frozen=True, slots=True)
class _Known:
    """What is kept of a member, for those that link to it. `begin` and `data` are offsets."""

    begin: int
    kind: bytes
    data: int
    size: int
    sparse: bool
    link: str

    @classmethod
    def of(cls, member: tarfile.TarInfo) -> _Known:
        kind = tarfile.REGTYPE if member.isreg() else member.type
        return cls(member.offset, kind, member.offset_data, member.size, member.issparse(), member.linkname)


class _Forward:
    """All that `tarfile` uses of a file that is read forwards.

    Attributes:
        first: how the file begins, from where on it is read.
        last: the block that was read last.
    """

    def __init__(self, read: Callable[[int], bytes], begin: int) -> None:
        self._read = read
        self._position = begin
        self._waiting = b""
        self.first = b""
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        if len(data) < size:
            data += self._read(size - len(data))
        self._position += len(data)
        self.first = self.first or data[: tarfile.BLOCKSIZE]
        self.last = data[-tarfile.BLOCKSIZE :]
        return data

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.StreamError(f"cannot go back from {self._position} to {position}")
        while self._position < position and self.read(min(position - self._position, _CHUNK)):
            pass

    def skip_zeros(self) -> bool:
        """Go on to a block that is not zero; tell whether there is one. gzip compares its checksum at the end."""
        while chunk := self.read(_CHUNK):
            zeros = len(chunk) - len(chunk.lstrip(b"\0"))
            if zeros < len(chunk):
                zeros -= zeros % tarfile.BLOCKSIZE
                self._waiting = chunk[zeros:] + self._waiting
                self._position -= len(chunk) - zeros
                return True
        return False


def _opened(shard: Shard, begin: int) -> _Forward:
    if not _is_compressed(shard.blob):
        return _Forward(shard.read, begin)
    unpacked = gzip.GzipFile(fileobj=cast("BinaryIO", shard), mode="rb")
    unpacked.seek(begin)
    return _Forward(unpacked.read, begin)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    if size < 0:
        raise tarfile.ReadError(f"a member of {size} bytes")
    data = read(size)
    if len(data) != size:
        raise tarfile.ReadError("it ends in the middle of a member")
    return data


def _is_compressed(blob: ListedBlob) -> bool:
    return blob.location.path.endswith((".gz", ".tgz"))
