"""What lies in one tar file: its members, and samples in the layout of WebDataset."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from azure_torch_ckpt.datasets.listing import ListedBlob
from azure_torch_ckpt.datasets.shards import Shard

__all__ = ["Sample", "begin_in", "members", "samples"]

Sample = dict[str, Any]
_SKIP = 1024 * 1024


class _Forward:
    """All that `tarfile` uses of a file that is read forwards, with the block that was read last."""

    def __init__(self, read: Callable[[int], bytes], begin: int) -> None:
        self._read = read
        self._position = begin
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        data = self._read(size)
        self._position += len(data)
        self.last = data[-tarfile.BLOCKSIZE :]
        return data

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.StreamError(f"cannot go back from {self._position} to {position}")
        while self._position < position and self.read(min(position - self._position, _SKIP)):
            pass


def begin_in(blob: ListedBlob, offset: int) -> int:
    """From where on the blob has to be read, to get what lies from `offset` on; see `members`."""
    return 0 if _is_compressed(blob) else offset


def members(shard: Shard, begin: int) -> Iterator[tuple[int, Sample]]:
    """The regular files: ``{"url": of the tar file, "name": path in it, "data": bytes}``, each with the offset behind.

    Args:
        begin: an offset that this gave, or 0; in a compressed file, of what it decompresses to.

    Raises:
        tarfile.ReadError, EOFError, zlib.error, gzip.BadGzipFile: the file is damaged or ends too early.
        StoreError: it cannot be read.
    """
    for member, end, data in _regular_files(shard, begin):
        yield end, {"url": shard.blob.url, "name": member.name, "data": data}


def samples(shard: Shard, begin: int) -> Iterator[tuple[int, Sample]]:
    """Members that follow each other and have the same path up to the name's first dot, as one; else like `members`."""
    sample: Sample = {}
    end = begin
    for member, following, data in _regular_files(shard, begin):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if stem and dot:
            key = folder + slash + stem
            if sample and sample["__key__"] != key:
                yield end, sample
                sample = {}
            sample = sample or {"__key__": key, "__url__": shard.blob.url}
            sample[extension.lower()] = data
        end = following
    if sample:
        yield end, sample


def _regular_files(shard: Shard, begin: int) -> Iterator[tuple[tarfile.TarInfo, int, bytes]]:
    """Each with the offset behind it."""
    if _is_compressed(shard.blob):
        unpacked = gzip.GzipFile(fileobj=cast("BinaryIO", shard), mode="rb")
        unpacked.seek(begin)
        file = _Forward(unpacked.read, begin)
    else:
        file = _Forward(shard.read, begin)
    with tarfile.TarFile(fileobj=cast("BinaryIO", file), mode="r") as tar:
        for member in tar:
            if member.issparse():
                raise tarfile.ReadError(f"{shard.blob.url}: {member.name} is a sparse file. Pack it without --sparse")
            cast("Any", tar).members.clear()  # where tarfile keeps all that it has read
            if member.isreg():
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) != member.size:
                    raise tarfile.ReadError(f"{shard.blob.url} ends in the middle of {member.name}")
                yield member, member.offset_data - (-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, data
        # tarfile takes a damaged header, unless it is the first one, for the end.
        if file.last.strip(b"\0"):
            raise tarfile.ReadError(f"{shard.blob.url} is damaged at offset {file.tell() - len(file.last)}")
        while file.read(_SKIP):  # padding; gzip compares its checksum at the very end
            pass


def _is_compressed(blob: ListedBlob) -> bool:
    return blob.location.path.endswith((".gz", ".tgz"))
