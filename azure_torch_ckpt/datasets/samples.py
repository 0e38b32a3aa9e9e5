"""From blobs to samples: fetched ahead, transformed, tried again, and what becomes of those that fail."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar, cast, get_args

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.ahead import ahead
from azure_torch_ckpt.datasets.blob import Access, Blob
from azure_torch_ckpt.datasets.cache import BlobCache
from azure_torch_ckpt.datasets.listing import ListedBlob
from azure_torch_ckpt.datasets.progress import Tally
from azure_torch_ckpt.options import TransferOptions

__all__ = ["AccessSettings", "Failure", "OnError", "SampleSettings", "Samples", "check_on_error"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

OnError = Literal["raise", "skip"]

# What a blob is taken for whose size nobody knows: one request of `BlobIO`.
_UNKNOWN = 4 * 1024 * 1024


class AccessSettings(TypedDict, total=False):
    """Arguments of all datasets about reading.

    Attributes:
        cache: keeps blobs on a local disk.
        options: limits; ``options.concurrency`` is the number of blobs that a process fetches at a time.
        ca_file: PEM file with further certificates to trust.
    """

    cache: BlobCache | None
    options: TransferOptions | None
    ca_file: str | None


class SampleSettings(AccessSettings, total=False):
    """Arguments of datasets whose samples are blobs.

    Attributes:
        prefetch_bytes: how many bytes of the next blobs a process fetches and holds while the transform runs; 0 for
            none. A larger blob is left to the transform.
        on_error: what becomes of a blob that cannot be read or transformed: ``"raise"``, or ``"skip"`` with a warning
            in the log and in the count `skipped`.
        retries: how often a blob is read and transformed again before that. (Requests are retried anyway.)
    """

    prefetch_bytes: int
    on_error: OnError
    retries: int


@dataclass(frozen=True, slots=True)
class Failure:
    """In the place of a sample."""

    error: Exception


class Samples(Generic[_T]):
    """Turns blobs into samples by one transform."""

    def __init__(
        self,
        access: Access,
        transform: Callable[[Blob], _T] | None,
        prefetch_bytes: int = 64 * 1024 * 1024,
        on_error: OnError = "raise",
        retries: int = 0,
    ) -> None:
        check_on_error(on_error)
        if prefetch_bytes < 0 or retries < 0:
            raise ValueError(f"prefetch_bytes={prefetch_bytes} and retries={retries} must not be negative")
        self._access = access
        self._transform = transform or cast("Callable[[Blob], _T]", _url_and_data)
        self._prefetch_bytes = prefetch_bytes
        self._on_error = on_error
        self._retries = retries
        self._skipped = Tally()

    @classmethod
    def make(
        cls, credential: Credential, transform: Callable[[Blob], _T] | None, settings: Mapping[str, Any]
    ) -> Samples[_T]:
        rest = dict(settings)
        access = Access(credential, *(rest.pop(name, None) for name in ("cache", "options", "ca_file")))
        return cls(access, transform, **rest)

    @property
    def skipped(self) -> int:
        return int(self._skipped)

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
        threads = (self._access.options or TransferOptions()).concurrency
        for future in ahead(jobs, threads, self._prefetch_bytes):
            blob = entered.popleft()
            error = future.exception()
            if error is None:
                outcome = self._attempt(blob, future.result())
            elif isinstance(error, Exception):
                outcome = self._attempt(blob, None, error)
            else:
                raise error
            if isinstance(outcome, Failure):
                if self._on_error == "raise":
                    raise outcome.error
                self._skipped.add()
                _log.warning("skipped %s: %s", blob.location, outcome.error)
            yield outcome

    def _job(self, blob: ListedBlob, entered: deque[ListedBlob]) -> tuple[int, Callable[[], bytes | None]]:
        entered.append(blob)
        size = _UNKNOWN if blob.size is None else blob.size
        if size > self._prefetch_bytes:
            return 0, _nothing
        return size, functools.partial(self._access.read, blob)

    def _attempt(self, blob: ListedBlob, data: bytes | None, error: Exception | None = None) -> _T | Failure:
        """Transform what was fetched, or, after the `error` of fetching it, what is fetched now."""
        for _ in range(self._retries + (error is None)):
            try:
                return self._transform(Blob(blob, self._access, data))
            except Exception as newer:
                error, data = newer, None
        assert error is not None
        return Failure(error)


def check_on_error(on_error: OnError) -> None:
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be one of {get_args(OnError)}, not {on_error!r}")


def _url_and_data(blob: Blob) -> dict[str, Any]:
    return {"url": blob.url, "data": blob.read()}


def _nothing() -> None:
    return None
