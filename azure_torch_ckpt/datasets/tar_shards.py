"""`TarShard`: the bytes of a tar file, prefetched in ranges together with those of the next tar files."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from azure_torch_ckpt.datasets.blob import BlobFetcher, prefetch
from azure_torch_ckpt.datasets.listing import ListedBlob

__all__ = ["SMALLEST_RANGE", "TarShard", "open_shards"]

_MIB = 1024 * 1024
# The default budget holds 16 of these, one for each connection. In smaller ones, the request costs more than the bytes.
_RANGE = 4 * _MIB
SMALLEST_RANGE = 256 * 1024
"""Bytes of a range with a small ``prefetch_bytes``."""


@dataclass(frozen=True, slots=True)
class _RangeData:
    """The bytes of a range, and the blob as it was when they were read."""

    data: bytes
    blob: ListedBlob


_Job = tuple[int, Callable[[], _RangeData]]


class TarShard:
    """One tar file, which is read forwards from where it was opened.

    Attributes:
        blob: the blob as it was listed; after the first read, with the size and ETag that are read.
    """

    def __init__(self, blob: ListedBlob, fetcher: BlobFetcher, next_range: Callable[[], _RangeData | None]) -> None:
        self.blob = blob
        self._fetcher = fetcher
        self._next_range = next_range
        self._ready = memoryview(b"")

    def reopened(self, begin: int, length: int = _RANGE) -> TarShard:
        """Return the same version of the file from `begin` on. Ranges of `length` bytes are fetched on demand."""
        jobs = _jobs([self.blob], begin, length, self._fetcher, deque())
        return TarShard(self.blob, self._fetcher, lambda: next((job() for _, job in jobs), None))

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, fewer only at the end.

        Raises:
            BlobChangedError: the blob is no longer in the version that was listed, or that was read before.
            StoreError: it cannot be read.
        """
        views: list[memoryview] = []
        missing = math.inf if size < 0 else size
        while missing and (self._ready or self._fetch()):
            view = self._ready[: int(min(missing, self._ready.nbytes))]
            self._ready = self._ready[view.nbytes :]
            missing -= view.nbytes
            views.append(view)
        return b"".join(views)

    def _fetch(self) -> bool:
        fetched = self._next_range()
        if fetched is None:
            return False
        self.blob, self._ready = fetched.blob, memoryview(fetched.data)
        return True


def open_shards(blobs: Iterable[ListedBlob], begin: int, fetcher: BlobFetcher) -> Generator[TarShard, None, None]:
    """Yield the tar files in order, the first one opened at `begin`.

    Threads fetch the next ranges while the caller does other work. Close the generator to end them. After the error of
    one shard, the generator cannot be used any more.

    Args:
        fetcher: with ``prefetch_bytes=0``, a range is fetched on demand. A shard that the cache keeps is fetched as one
            range.
    """
    budget = fetcher.prefetch_bytes
    length = min(_RANGE, max(budget // 4, SMALLEST_RANGE)) if budget else _RANGE
    entered: deque[int] = deque()  # for each job that `prefetch` has taken, the number of its shard
    to_fetch, to_read = itertools.tee(blobs)
    futures = prefetch(_jobs(to_fetch, begin, length, fetcher, entered), fetcher.concurrency, budget)

    def next_range(number: int) -> _RangeData | None:
        # `prefetch` has always taken one job more than it has yielded, so the next job is known here if there is one.
        while not entered or entered[0] <= number:
            future = next(futures, None)
            if future is None:
                return None
            if entered.popleft() == number:
                return future.result()
            future.cancel()  # belongs to a shard that was not read to its end
        return None

    try:
        for number, blob in enumerate(to_read):
            yield TarShard(blob, fetcher, functools.partial(next_range, number))
    finally:
        futures.close()


def _jobs(
    blobs: Iterable[ListedBlob], begin: int, length: int, fetcher: BlobFetcher, entered: deque[int]
) -> Iterator[_Job]:
    for number, blob in enumerate(blobs):
        start, begin = begin, 0
        if fetcher.is_cached_whole(blob):
            assert blob.size is not None
            entered.append(number)
            yield blob.size, functools.partial(_read_all, fetcher, blob, start)
            continue
        if blob.size is None or blob.etag is None:
            # Only the URL is known. The answer to the first range has the size and the ETag.
            known: Future[ListedBlob | None] = Future()
            entered.append(number)
            yield length, functools.partial(_read_first, fetcher, blob, start, length, known)
            listed = known.result()
            if listed is None or listed.size is None:  # the reader of that range gets the error
                continue
            blob, start = listed, start + length
            offsets = range(start, listed.size, length)
        else:
            offsets = range(start, max(blob.size, start + 1), length)  # at least one request: does it still exist?
        assert blob.size is not None
        for offset in offsets:
            entered.append(number)
            yield min(length, max(blob.size - offset, 0)), functools.partial(_read, fetcher, blob, offset, length)


def _read(fetcher: BlobFetcher, blob: ListedBlob, start: int, length: int) -> _RangeData:
    with fetcher.open(blob, blob.etag) as file:
        file.seek(start)
        data = file.read(length)
        return _RangeData(data, dataclasses.replace(blob, size=file.seek(0, 2), etag=file.etag))


def _read_first(
    fetcher: BlobFetcher, blob: ListedBlob, start: int, length: int, known: Future[ListedBlob | None]
) -> _RangeData:
    try:
        fetched = _read(fetcher, blob, start, length)
    except BaseException:
        known.set_result(None)
        raise
    known.set_result(fetched.blob)
    return fetched


def _read_all(fetcher: BlobFetcher, blob: ListedBlob, start: int) -> _RangeData:
    data = fetcher.read(blob, blob.etag)
    return _RangeData(data[start:], dataclasses.replace(blob, size=len(data)))
