"""How the blobs of a dataset are read, and what becomes of those that fail: tried again, raised, or skipped."""

from __future__ import annotations

import logging
from typing import Literal, TypedDict, get_args

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.blob import Access
from azure_torch_ckpt.datasets.cache import BlobCache
from azure_torch_ckpt.datasets.progress import Tally
from azure_torch_ckpt.options import TransferOptions

__all__ = ["OnError", "Reading", "SampleSettings"]

_log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]


class SampleSettings(TypedDict, total=False):
    """Arguments of all datasets about reading.

    Attributes:
        cache: keeps blobs on a local disk.
        options: limits; ``options.concurrency`` is the number of requests that a process has in flight.
        ca_file: PEM file with further certificates to trust.
        prefetch_bytes: how many bytes of the next blobs a process fetches and holds while the transform runs; 0 for
            none. A larger blob is left to the transform.
        on_error: what becomes of a blob that cannot be read or transformed: ``"raise"``, or ``"skip"`` with a warning
            in the log and in the count `skipped`.
        retries: how often a blob is read and transformed again before that. (Requests are retried anyway.)
    """

    cache: BlobCache | None
    options: TransferOptions | None
    ca_file: str | None
    prefetch_bytes: int
    on_error: OnError
    retries: int


class Reading:
    """`SampleSettings`, checked, with the count of what was skipped.

    Raises:
        ValueError: a number is negative, or `on_error` is something else.
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
        self.access = Access(credential, cache, options, ca_file)
        self.prefetch_bytes = prefetch_bytes
        self.retries = retries
        self._on_error = on_error
        self._skipped = Tally()

    @property
    def concurrency(self) -> int:
        return (self.access.options or TransferOptions()).concurrency

    @property
    def skipped(self) -> int:
        """Of all worker processes together."""
        return int(self._skipped)

    def skip_or_raise(self, error: Exception, what: object) -> None:
        """After all retries: raise the error, or count and log that `what` is left out."""
        if self._on_error == "raise":
            raise error
        self._skipped.add()
        _log.warning("skipped %s: %s", what, error)
