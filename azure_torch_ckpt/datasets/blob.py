"""`Blob`, which a transform receives; `BlobFetcher`: how blobs are read, and errors handled; and `prefetch`."""

from __future__ import annotations

import functools
import io
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import BinaryIO, Literal, TypedDict, TypeVar, get_args

from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.datasets.cache import BlobCache
from azure_torch_ckpt.datasets.epoch_state import SharedCounter
from azure_torch_ckpt.datasets.listing import ListedBlob
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.options import TransferOptions

__all__ = ["Blob", "BlobFetcher", "SampleSettings", "prefetch"]

_log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]


class SampleSettings(TypedDict, total=False):
    """Arguments of all datasets: how blobs are read.

    Attributes:
        cache: keeps blobs on a local disk.
        options: limits; ``options.concurrency`` is the number of requests that a process has in flight.
        ca_file: PEM file with certificates to trust in addition to the platform's.
        prefetch_bytes: how many bytes of the next blobs a process fetches and holds while the transform runs; 0 turns
            that off. A larger blob is not prefetched: the transform reads it.
        on_error: what to do with a blob that cannot be read or transformed: ``"raise"`` the error, or ``"skip"`` the
            blob, log a warning and count it in `skipped`.
        retries: how often a blob is read and transformed again before that. (Requests are always retried.)
    """

    cache: BlobCache | None
    options: TransferOptions | None
    ca_file: str | None
    prefetch_bytes: int
    on_error: OnError
    retries: int


class BlobFetcher:
    """Reads the blobs of a dataset as `SampleSettings` say, and counts the skipped ones in all worker processes.

    A pickle contains the credential: treat it as a secret.

    Raises:
        ValueError: a number is negative, or `on_error` has another value.
        TypeError: there is no such setting.
    """

    def __init__(
        self,
        credential: Credential = None,
        *,
        cache: BlobCache | None = None,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
        prefetch_bytes: int = 64 * 1024 * 1024,
        on_error: OnError = "raise",
        retries: int = 0,
    ) -> None:
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {get_args(OnError)}, not {on_error!r}")
        if prefetch_bytes < 0 or retries < 0:
            raise ValueError(f"prefetch_bytes={prefetch_bytes} and retries={retries} must not be negative")
        self.prefetch_bytes = prefetch_bytes
        self.retries = retries
        self._access = Access(credential, options, ca_file)
        self._cache = cache
        self._on_error = on_error
        self._skipped = SharedCounter()

    @property
    def concurrency(self) -> int:
        """The number of requests that a process may have in flight."""
        return self._access.options.concurrency

    @property
    def skipped(self) -> int:
        """How many items all worker processes together have skipped."""
        return int(self._skipped)

    def is_cached_whole(self, blob: ListedBlob) -> bool:
        """Whether the blob is read as a whole, because the cache keeps it."""
        return self._cache is not None and blob.size is not None and self._cache.takes(blob.size)

    def open(self, blob: ListedBlob, if_etag: str | None = None) -> BlobIO:
        """Open the blob as a file, without the cache."""
        access = self._access
        return BlobIO(
            blob.location,
            "rb",
            credential=access.credential,
            if_etag=if_etag,
            options=access.options,
            ca_file=access.ca_file,
        )

    def read(self, blob: ListedBlob, if_etag: str | None = None) -> bytes:
        """Return the content, from the cache if it has the listed version or, for a bare URL, the current one."""
        with self.open(blob, if_etag) as file:
            if self._cache is None:
                return file.read()
            url = str(blob.location)
            data = self._cache.get(url, blob.etag or file.etag or "")
            if data is None:
                data = file.read()
                self._cache.put(url, file.etag or "", data)
            return data

    def skip_or_raise(self, error: Exception, what: object) -> None:
        """Handle an error that remains after all retries: raise it, or count and log that `what` is skipped."""
        if self._on_error == "raise":
            raise error
        self._skipped.add()
        _log.warning("skipped %s: %s", what, error)


class Blob:
    """A blob that a dataset passes to a `transform`. Use it while the transform runs."""

    __slots__ = ("_data", "_fetcher", "_listed")

    def __init__(self, listed: ListedBlob, fetcher: BlobFetcher, data: bytes | None = None) -> None:
        self._listed = listed
        self._fetcher = fetcher
        self._data = data

    def __repr__(self) -> str:
        return f"Blob({str(self._listed.location)!r})"

    @property
    def url(self) -> str:
        """The URL without its query: no SAS, snapshot or version."""
        return self._listed.url

    @property
    def blob_name(self) -> str:
        return self._listed.location.path

    @property
    def container_name(self) -> str:
        return self._listed.location.container

    def read(self) -> bytes:
        """Return the whole content.

        Raises:
            StoreError: the blob cannot be read.
        """
        if self._data is None:
            self._data = self._fetcher.read(self._listed)
        return self._data

    def reader(self) -> BinaryIO:
        """Open the content as a file: an `io.BytesIO` if it is in memory or in the cache already, else a `BlobIO`."""
        if self._data is not None or self._fetcher.is_cached_whole(self._listed):
            return io.BytesIO(self.read())
        return self._fetcher.open(self._listed)


_T = TypeVar("_T")
_Task = Callable[[], None]


def prefetch(
    jobs: Iterable[tuple[int, Callable[[], _T]]], threads: int, budget: int
) -> Generator[Future[_T], None, None]:
    """Run jobs on threads and yield their futures, finished or not, in the order of the jobs.

    A future counts as used when the next one is requested.

    Args:
        jobs: each job, with the number of bytes that its result will hold. They are taken when there is room for them.
        threads: the number of threads. They are daemons, so that a hanging request does not keep the process alive.
        budget: bytes of all jobs that are running, or finished and not used. One job may always run.
    """
    tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
    waiting: deque[tuple[int, Future[_T]]] = deque()
    source = iter(jobs)
    started = held = 0
    following = next(source, None)
    try:
        while following is not None or waiting:
            while (
                following is not None and (not waiting or held + following[0] <= budget) and len(waiting) < 2 * threads
            ):
                cost, job = following
                future: Future[_T] = Future()
                tasks.put(functools.partial(_run, future, job))
                if started < threads:
                    threading.Thread(target=_work, args=(tasks,), name="blob-prefetch", daemon=True).start()
                    started += 1
                waiting.append((cost, future))
                held += cost
                following = next(source, None)
            cost, future = waiting.popleft()
            yield future
            held -= cost
    finally:
        for _, future in waiting:
            future.cancel()
        tasks.put(None)


def _run(future: Future[_T], job: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)


def _work(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
    tasks.put(None)  # for the next thread
