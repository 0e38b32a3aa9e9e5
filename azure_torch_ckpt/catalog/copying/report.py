"""What a copy came to: counted while it runs, told in its log line and its event."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from typing import Literal

from azure_torch_ckpt._internal.units import format_bytes, format_duration
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.report import job_rank, rate_and_requests, report_log
from azure_torch_ckpt.events import TransferEvent, emit

__all__ = ["CopyFigures"]

_PAST = {"copy": "copied", "consolidate": "consolidated"}


class CopyFigures:
    """A context manager around a copy. An error in it is in the event, and not in the log, for it speaks for itself.

    Args:
        source, target: URLs without a SAS, or local paths.
        stores: of both ends, made for this copy.

    Attributes:
        items: that were copied.
        bytes: that were copied.
        remark: for the end of the log line.
    """

    def __init__(
        self, operation: Literal["copy", "consolidate"], source: str, target: str, stores: Iterable[BlobStore]
    ) -> None:
        self.items = 0
        self.bytes = 0
        self.remark = ""
        self._operation = operation
        self._source = source
        self._target = target
        self._stores = list(stores)
        self._clock = time.monotonic()
        self._time = datetime.datetime.now(datetime.timezone.utc)

    @property
    def seconds(self) -> float:
        """Since the copy began."""
        return time.monotonic() - self._clock

    def __enter__(self) -> CopyFigures:
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
            started=self._time,
            finished=datetime.datetime.now(datetime.timezone.utc),
            target=self._target,
        )
        if error is None:
            took = f"{format_duration(event.seconds)} ({rate_and_requests(event)})"
            line = f"{_PAST[self._operation]} {format_bytes(event.bytes)} in {took} from {event.url} to {event.target}"
            report_log.info("%s%s", line, self.remark)
        emit(event)
