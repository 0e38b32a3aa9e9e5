"""`TarArchive`: a tar file that is read forwards, member by member, with its links; and the samples in it."""

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
from azure_torch_ckpt.datasets.tar_shards import TarShard
from azure_torch_ckpt.errors import AzureCheckpointError, TarShardError

__all__ = ["Record", "Sample", "TarArchive", "first_offset", "read_members", "read_samples"]

_CHUNK = 1024 * 1024
_LINKS = 40  # the length of a chain of links, as in Linux
# The first bytes of compressed files: https://en.wikipedia.org/wiki/List_of_file_signatures
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}


class TarArchive:
    """The members of a tar file, or of several concatenated ones (as ``tar --ignore-zeros`` reads them).

    Args:
        begin: an offset that the iteration yielded, or 0; in a compressed file, an offset in the decompressed data.
    """

    def __init__(self, shard: TarShard, begin: int) -> None:
        self._shard = shard
        self._begin = begin
        self._file: _ForwardReader | None = None
        self._index: dict[str, list[_Member]] | None = None

    def __iter__(self) -> Iterator[tuple[tarfile.TarInfo, int]]:
        """Yield each member, of any type, with the offset behind it.

        Raises:
            TarShardError: the file is damaged or incomplete.
            StoreError: it cannot be read.
        """
        with self._errors_with_url():
            file = self._file = _opened(self._shard, self._begin)
            while True:
                # Not this machine's encoding: all workers must get the same names.
                with tarfile.TarFile(
                    fileobj=cast("BinaryIO", file), mode="r", encoding="utf-8", errors="surrogateescape"
                ) as tar:
                    for member in tar:
                        cast("Any", tar).members.clear()  # tarfile keeps all members here
                        yield member, cast("Any", tar).offset
                # tarfile ends without an error at the end of the blob, and at any damaged header but the first one.
                if not file.last:
                    raise tarfile.ReadError("the blocks of zeros at its end are missing")
                if file.last.strip(b"\0"):
                    raise tarfile.ReadError("damaged header")
                if not file.skip_zeros():
                    return

    def data(self, member: tarfile.TarInfo) -> bytes | TarShardError | None:
        """Return the content of the member that the iteration yielded last; of a link, the content of its target.

        Returns:
            None for a member that is not a file, such as a directory or a device. An error for a file whose content
            cannot be read while the other members can.

        Raises:
            TarShardError: the tar file is damaged or incomplete.
            StoreError: it cannot be read.
        """
        with self._errors_with_url():
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
                return _exactly(_opened(self._shard.reopened(0), target.data).read, target.size)
            return _exactly(self._shard.reopened(target.data, max(target.size, 1)).read, target.size)

    def _target(self, link: tarfile.TarInfo) -> _Member | None:
        """Return the file that a link points to, through other links; None for another type. `KeyError`: missing."""
        if self._index is None:
            # A target may come after its symbolic link, and a resumed pass has not read the members before its start.
            self._index = {}
            for member, _ in TarArchive(self._shard.reopened(0), 0):
                self._index.setdefault(posixpath.normpath(member.name), []).append(_Member.of(member))
        name, known = link.name, _Member.of(link)
        for _ in range(_LINKS):
            limit = math.inf
            if known.kind == tarfile.LNKTYPE:
                name, limit = posixpath.normpath(known.link), known.begin  # hard links point to earlier members
            else:
                name = posixpath.normpath(posixpath.join(posixpath.dirname(name), known.link))
            candidates = [other for other in self._index.get(name, ()) if other.begin < limit]
            if not candidates:
                if name == "." or any(other.startswith(name + "/") for other in self._index):
                    return None
                raise KeyError(name)
            known = candidates[-1]
            if known.kind not in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                return known if known.kind in tarfile.REGULAR_TYPES else None
        raise KeyError(name)

    @contextlib.contextmanager
    def _errors_with_url(self) -> Iterator[None]:
        """Raise the errors of tarfile, gzip and zlib, which are of any type for damaged bytes, with the URL."""
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
            return "it is empty, without the two blocks of zeros at the end of a tar file. Write it again"
        if isinstance(error, gzip.BadGzipFile) and not first:
            return f"{error}. Let its name end in .tar if it is not compressed"
        offset = 0 if self._file is None else self._file.tell()
        return f"it is damaged or incomplete, before offset {offset}: {error}. Write it again"

    def _error(self, reason: str) -> TarShardError:
        return TarShardError(f"{self._shard.blob.url}: {reason}")


def first_offset(blob: ListedBlob, begin: int) -> int:
    """Return the offset in the blob from which a `TarArchive` that begins at `begin` reads."""
    return 0 if _is_compressed(blob) else begin


@dataclass(frozen=True, slots=True)
class _Member:
    """The properties of a member that links to it need. `begin` and `data` are offsets."""

    begin: int
    kind: bytes
    data: int
    size: int
    sparse: bool
    link: str

    @classmethod
    def of(cls, member: tarfile.TarInfo) -> _Member:
        kind = tarfile.REGTYPE if member.isreg() else member.type
        return cls(member.offset, kind, member.offset_data, member.size, member.issparse(), member.linkname)


class _ForwardReader:
    """The methods of a file that `tarfile` uses to read it forwards.

    `first` holds the first bytes that were read, `last` the last block.
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
        """Skip blocks of zeros, and return whether another block follows. gzip checks its checksum at the end."""
        while chunk := self.read(_CHUNK):
            zeros = len(chunk) - len(chunk.lstrip(b"\0"))
            if zeros < len(chunk):
                zeros -= zeros % tarfile.BLOCKSIZE
                self._waiting = chunk[zeros:] + self._waiting
                self._position -= len(chunk) - zeros
                return True
        return False


def _opened(shard: TarShard, begin: int) -> _ForwardReader:
    if not _is_compressed(shard.blob):
        return _ForwardReader(shard.read, begin)
    unpacked = gzip.GzipFile(fileobj=cast("BinaryIO", shard), mode="rb")
    unpacked.seek(begin)
    return _ForwardReader(unpacked.read, begin)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    if size < 0:
        raise tarfile.ReadError(f"a member of {size} bytes")
    data = read(size)
    if len(data) != size:
        raise tarfile.ReadError("it ends in the middle of a member")
    return data


def _is_compressed(blob: ListedBlob) -> bool:
    return blob.location.path.endswith((".gz", ".tgz"))


Sample = dict[str, Any]
Record = Sample | TarShardError
"""A sample, or the error of a sample that cannot be made while those after it can."""

_KEY, _URL = "__key__", "__url__"


def read_members(shard: TarShard, begin: int) -> Iterator[tuple[int, Record]]:
    """Yield the files, ``{"url": of the tar file, "name": path in it, "data": bytes}``, each with the offset behind it.

    Args:
        begin: an offset that this function yielded, or 0; in a compressed file, an offset in the decompressed data.

    Raises:
        TarShardError: the tar file is damaged or incomplete.
        StoreError: it cannot be read.
    """
    archive = TarArchive(shard, begin)
    for member, end in archive:
        data = archive.data(member)
        if isinstance(data, TarShardError):
            yield end, data
        elif data is not None:
            yield end, {"url": shard.blob.url, "name": member.name, "data": data}


def read_samples(shard: TarShard, begin: int) -> Iterator[tuple[int, Record]]:
    """Yield one sample for consecutive members with the same path up to the name's first dot; see `read_members`."""
    archive = TarArchive(shard, begin)
    sample: Sample = {}
    error: TarShardError | None = None
    end = begin
    for member, following in archive:
        key, field = _split(member.name)
        data = None if field is None else archive.data(member)
        if field is not None and data is not None:
            if sample and sample[_KEY] != key:
                yield end, error or sample
                sample, error = {}, None
            sample = sample or {_KEY: key, _URL: shard.blob.url}
            if isinstance(data, TarShardError):
                error = error or data
            elif field in sample:
                why = (
                    "which the sample's own entry has. Rename it"
                    if field in (_KEY, _URL)
                    else "regardless of case. Pack each extension once, and another sample under another name"
                )
                error = error or TarShardError(
                    f"{shard.blob.url}: the sample {key!r} has a second member with the extension {field!r}, {why}"
                )
            else:
                sample[field] = data
        end = following
    if sample:
        yield end, error or sample


def _split(name: str) -> tuple[str, str | None]:
    """Return the key and the field of a member; None as the field of a member that WebDataset leaves out."""
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.partition(".")
    meta = not slash and name.startswith("__") and name.endswith("__")
    return folder + slash + stem, extension.lower() if stem and dot and not meta else None
