"""The bytes of one tar file after the other, fetched ahead in parts, also beyond the end of the one that is read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from azure_torch_ckpt.datasets.ahead import ahead
from azure_torch_ckpt.datasets.blob import Access
from azure_torch_ckpt.datasets.listing import ListedBlob
from azure_torch_ckpt.datasets.reading import Reading

__all__ = ["Shard", "shards"]

_MIB = 1024 * 1024
# 16 of these, in 16 connections, are the default budget. Smaller ones would cost more for the request than the bytes.
_PART = 4 * _MIB
_SMALLEST_PART = 256 * 1024


@dataclass(frozen=True, slots=True)
class _Part:
    """Some bytes, and the blob as it was when they were read."""

    data: bytes
    blob: ListedBlob


_Job = tuple[int, Callable[[], _Part]]


class Shard:
    """One tar file, to be read forwards from where it was opened.

    Attributes:
        blob: as it was listed; once something was read, with the size and ETag of what is read.
    """

    def __init__(self, blob: ListedBlob, access: Access, following: Callable[[], _Part | None]) -> None:
        self.blob = blob
        self._access = access
        self._following = following
        self._ready = memoryview(b"")

    def again(self, begin: int, part: int = _PART) -> Shard:
        """The same version of the file, from `begin` on, fetched in parts of so many bytes when they are asked for."""
        jobs = _jobs([self.blob], begin, part, self._access, deque())
        return Shard(self.blob, self._access, lambda: next((job() for _, job in jobs), None))

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end.

        Raises:
            BlobChangedError: the blob is not, or no longer, the one that was listed, or that was begun.
            StoreError: it cannot be read.
        """
        pieces: list[memoryview] = []
        wanted = math.inf if size < 0 else size
        while wanted and (self._ready or self._fetch()):
            piece = self._ready[: int(min(wanted, self._ready.nbytes))]
            self._ready = self._ready[piece.nbytes :]
            wanted -= piece.nbytes
            pieces.append(piece)
        return b"".join(pieces)

    def _fetch(self) -> bool:
        part = self._following()
        if part is None:
            return False
        self.blob, self._ready = part.blob, memoryview(part.data)
        return True


def shards(blobs: Iterable[ListedBlob], begin: int, reading: Reading) -> Generator[Shard, None, None]:
    """The tar files in order, of which the first is read from `begin` on.

    Threads fetch what comes next, whatever the reader does meanwhile. Close the iterator to end them. After an error
    of one shard the iterator is of no more use.

    Args:
        reading: with ``prefetch_bytes=0``, a part is fetched when it is asked for. Of a shard that is to be cached, the
            part is all of it.
    """
    budget = reading.prefetch_bytes
    part = min(_PART, max(budget // 4, _SMALLEST_PART)) if budget else _PART
    entered: deque[int] = deque()  # the numbers of the shards to which the jobs that `ahead` took belong
    to_fetch, to_read = itertools.tee(blobs)
    futures = ahead(_jobs(to_fetch, begin, part, reading.access, entered), reading.concurrency, budget)

    def following(number: int) -> _Part | None:
        # `ahead` has always taken one job more than it has given, so the next one shows here unless there is none.
        while not entered or entered[0] <= number:
            future = next(futures, None)
            if future is None:
                return None
            if entered.popleft() == number:
                return future.result()
            future.cancel()  # of a shard that was not read to its end
        return None

    try:
        for number, blob in enumerate(to_read):
            yield Shard(blob, reading.access, functools.partial(following, number))
    finally:
        futures.close()


def _jobs(blobs: Iterable[ListedBlob], begin: int, part: int, access: Access, entered: deque[int]) -> Iterator[_Job]:
    for number, blob in enumerate(blobs):
        start, begin = begin, 0
        if access.cache is not None and blob.size is not None and access.cache.takes(blob.size):
            entered.append(number)
            yield blob.size, functools.partial(_whole, access, blob, start)
            continue
        if blob.size is None or blob.etag is None:
            # Only the URL is known. Its first part tells the rest.
            found: Future[ListedBlob | None] = Future()
            entered.append(number)
            yield part, functools.partial(_first, access, blob, start, part, found)
            known = found.result()
            if known is None or known.size is None:  # who reads that part gets the error
                continue
            blob, start = known, start + part
            offsets = range(start, known.size, part)
        else:
            offsets = range(start, max(blob.size, start + 1), part)  # one request at least: is it still there?
        assert blob.size is not None
        for offset in offsets:
            entered.append(number)
            yield min(part, max(blob.size - offset, 0)), functools.partial(_read, access, blob, offset, part)


def _read(access: Access, blob: ListedBlob, start: int, length: int) -> _Part:
    with access.open(blob, blob.etag) as file:
        file.seek(start)
        data = file.read(length)
        return _Part(data, dataclasses.replace(blob, size=file.seek(0, 2), etag=file.etag))


def _first(access: Access, blob: ListedBlob, start: int, length: int, found: Future[ListedBlob | None]) -> _Part:
    try:
        part = _read(access, blob, start, length)
    except BaseException:
        found.set_result(None)
        raise
    found.set_result(part.blob)
    return part


def _whole(access: Access, blob: ListedBlob, start: int) -> _Part:
    data = access.read(blob, blob.etag)
    return _Part(data[start:], dataclasses.replace(blob, size=len(data)))
