"""`BlobSamples`: makes a sample of each blob, with prefetching, retries and skipped blobs."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from azure_torch_ckpt.datasets.blob import Blob, BlobFetcher
from azure_torch_ckpt.datasets.listing import ListedBlob
from azure_torch_ckpt.datasets.prefetch import prefetch

__all__ = ["BlobSamples", "FailedSample"]

_T = TypeVar("_T")

# The assumed size of a blob whose size is not known: one request of `BlobIO`.
_UNKNOWN_SIZE = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FailedSample:
    """Takes the place of a sample that cannot be made."""

    error: Exception


class BlobSamples(Generic[_T]):
    """Makes samples of blobs with one transform."""

    def __init__(self, fetcher: BlobFetcher, transform: Callable[[Blob], _T] | None) -> None:
        self._fetcher = fetcher
        self._transform = transform or cast("Callable[[Blob], _T]", _url_and_data)

    def one(self, blob: ListedBlob) -> _T:
        """Return the sample of one blob.

        Raises:
            the error of reading or of the transform, even if other blobs are skipped.
        """
        outcome = self._attempt(blob, None)
        if isinstance(outcome, FailedSample):
            raise outcome.error
        return outcome

    def many(self, blobs: Iterable[ListedBlob]) -> Iterator[_T | FailedSample]:
        """Yield the samples in order, and a `FailedSample`, counted and logged, for each skipped blob.

        Raises:
            the error of reading or of the transform, unless the blob is skipped.
        """
        entered: deque[ListedBlob] = deque()  # blobs that `prefetch` has taken and not yielded yet
        jobs = (self._job(blob, entered) for blob in blobs)
        for future in prefetch(jobs, self._fetcher.concurrency, self._fetcher.prefetch_bytes):
            blob = entered.popleft()
            error = future.exception()
            if error is None:
                outcome = self._attempt(blob, future.result())
            elif isinstance(error, Exception):
                outcome = self._attempt(blob, None, error)
            else:
                raise error
            if isinstance(outcome, FailedSample):
                self._fetcher.skip_or_raise(outcome.error, blob.location)
            yield outcome

    def _job(self, blob: ListedBlob, entered: deque[ListedBlob]) -> tuple[int, Callable[[], bytes | None]]:
        entered.append(blob)
        size = _UNKNOWN_SIZE if blob.size is None else blob.size
        if size > self._fetcher.prefetch_bytes:
            return 0, _nothing
        return size, functools.partial(self._fetcher.read, blob)

    def _attempt(self, blob: ListedBlob, data: bytes | None, error: Exception | None = None) -> _T | FailedSample:
        """Transform the prefetched `data` or, after the `error` of prefetching, fetch and transform the blob."""
        for _ in range(self._fetcher.retries + (error is None)):
            try:
                return self._transform(Blob(blob, self._fetcher, data))
            except Exception as newer:
                error, data = newer, None
        assert error is not None
        return FailedSample(error)


def _url_and_data(blob: Blob) -> dict[str, Any]:
    return {"url": blob.url, "data": blob.read()}


def _nothing() -> None:
    return None
