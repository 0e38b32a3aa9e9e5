"""From blobs to samples: fetched ahead, transformed, tried again, and what becomes of those that fail."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from azure_torch_ckpt.datasets.ahead import ahead
from azure_torch_ckpt.datasets.blob import Blob
from azure_torch_ckpt.datasets.listing import ListedBlob
from azure_torch_ckpt.datasets.reading import Reading

__all__ = ["Failure", "Samples"]

_T = TypeVar("_T")

# What a blob is taken for whose size nobody knows: one request of `BlobIO`.
_UNKNOWN = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Failure:
    """In the place of a sample."""

    error: Exception


class Samples(Generic[_T]):
    """Turns blobs into samples by one transform."""

    def __init__(self, reading: Reading, transform: Callable[[Blob], _T] | None) -> None:
        self._reading = reading
        self._transform = transform or cast("Callable[[Blob], _T]", _url_and_data)

    @property
    def skipped(self) -> int:
        return self._reading.skipped

    def one(self, blob: ListedBlob) -> _T:
        """The sample of one blob.

        Raises:
            what reading or the transform raises, also where others are skipped.
        """
        outcome = self._attempt(blob, None)
        if isinstance(outcome, Failure):
            raise outcome.error
        return outcome

    def many(self, blobs: Iterable[ListedBlob]) -> Iterator[_T | Failure]:
        """The samples, in order; a `Failure` for each that is to be skipped, which is counted and logged already.

        Raises:
            what reading or the transform raises, unless it is to be skipped.
        """
        entered: deque[ListedBlob] = deque()  # handed to `ahead`, which runs ahead of us
        jobs = (self._job(blob, entered) for blob in blobs)
        for future in ahead(jobs, self._reading.concurrency, self._reading.prefetch_bytes):
            blob = entered.popleft()
            error = future.exception()
            if error is None:
                outcome = self._attempt(blob, future.result())
            elif isinstance(error, Exception):
                outcome = self._attempt(blob, None, error)
            else:
                raise error
            if isinstance(outcome, Failure):
                self._reading.skip_or_raise(outcome.error, blob.location)
            yield outcome

    def _job(self, blob: ListedBlob, entered: deque[ListedBlob]) -> tuple[int, Callable[[], bytes | None]]:
        entered.append(blob)
        size = _UNKNOWN if blob.size is None else blob.size
        if size > self._reading.prefetch_bytes:
            return 0, _nothing
        return size, functools.partial(self._reading.access.read, blob)

    def _attempt(self, blob: ListedBlob, data: bytes | None, error: Exception | None = None) -> _T | Failure:
        """Transform what was fetched, or, after the `error` of fetching it, what is fetched now."""
        for _ in range(self._reading.retries + (error is None)):
            try:
                return self._transform(Blob(blob, self._reading.access, data))
            except Exception as newer:
                error, data = newer, None
        assert error is not None
        return Failure(error)


def _url_and_data(blob: Blob) -> dict[str, Any]:
    return {"url": blob.url, "data": blob.read()}


def _nothing() -> None:
    return None
