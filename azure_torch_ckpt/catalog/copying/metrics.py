"""`CopyMetrics`: counts what `copy` and `consolidate` do, and reports it as a log line and an event."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from typing import Literal

from azure_torch_ckpt._internal.units import format_bytes, format_duration
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.report import job_rank, rate_and_requests, report_log
from azure_torch_ckpt.events import TransferEvent, emit

__all__ = ["CopyMetrics"]

_PAST = {"copy": "copied", "consolidate": "consolidated"}


class CopyMetrics:
    """A context manager around a copy, which reports when it is left.

    After an error there is an event, and no log line: the error has its own message.

    Args:
        source: URL without a SAS, or local path.
        destination: URL without a SAS, or local path.
        stores: the stores of source and destination, made for this copy, whose requests are counted.

    Attributes:
        items: number of items copied.
        bytes: bytes copied.
        remark: text for the end of the log line.
    """

    def __init__(
        self, operation: Literal["copy", "consolidate"], source: str, destination: str, stores: Iterable[BlobStore]
    ) -> None:
        self.items = 0
        self.bytes = 0
        self.remark = ""
        self._operation = operation
        self._source = source
        self._destination = destination
        self._stores = list(stores)
        self._began = time.monotonic()
        self._started = datetime.datetime.now(datetime.timezone.utc)

    @property
    def seconds(self) -> float:
        """Seconds since the copy began."""
        return time.monotonic() - self._began

    def __enter__(self) -> CopyMetrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        counts = [store.counts for store in self._stores]
        event = TransferEvent(
            operation=self._operation,
            url=self._source,
            rank=job_rank(),
            items=self.items,
            bytes=self.bytes,
            seconds=self.seconds,
            requests=sum(count.requests for count in counts),
            retries=sum(count.retries for count in counts),
            checkpoint_bytes=None,
            error=error,
            started=self._started,
            finished=datetime.datetime.now(datetime.timezone.utc),
            target=self._destination,
        )
        if error is None:
            took = f"{format_duration(event.seconds)} ({rate_and_requests(event)})"
            line = f"{_PAST[self._operation]} {format_bytes(event.bytes)} in {took} from {event.url} to {event.target}"
            report_log.info("%s%s", line, self.remark)
        emit(event)
