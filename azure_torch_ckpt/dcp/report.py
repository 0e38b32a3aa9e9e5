"""`TransferReport`: counts what a save or a load of this rank does, and reports it: progress, log line, event."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch.distributed as dist

from azure_torch_ckpt._internal.units import format_bytes, format_duration, format_rate
from azure_torch_ckpt.blobs.download import Read
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.errors import CheckpointError
from azure_torch_ckpt.events import TransferEvent, emit
from azure_torch_ckpt.progress import Meter, Progress, ProgressOption, check_progress
from azure_torch_ckpt.transport.throttle import RequestCounts

__all__ = ["TransferReport", "job_rank", "rate_and_requests", "report_abandoned", "report_log"]

report_log = logging.getLogger("azure_torch_ckpt")
"""The package's logger, so that one name selects the lines of all modules."""

_PAST = {"save": "saved", "load": "loaded"}
_DIRECTION = {"save": "to", "load": "from"}


@dataclass(frozen=True, slots=True)
class _Moment:
    at: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc))
    clock: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Running:
    url: str
    store: BlobStore
    begin: _Moment
    last_step: _Moment
    counts: RequestCounts
    leads: bool
    is_certain: bool
    error: BaseException | None = None
    process: int = field(default_factory=os.getpid)
    items: int = 0
    bytes: int = 0
    meter: Meter | None = None


class TransferReport:
    """Reports one save or load. A pickle or copy is of a report that has not begun.

    How it ends may remain unknown here: torch does not pass on an error that the planner raises before there is a plan
    (a missing key), nor an error of another rank. Such an end is reported once its thread begins something else, or the
    process ends.

    Args:
        operation: ``"save"`` or ``"load"``.
        progress: as the user gave it.

    Raises:
        MissingDependencyError, TypeError: `progress` cannot be used.
    """

    def __init__(self, operation: str, progress: ProgressOption) -> None:
        check_progress(progress)
        self._operation = operation
        self._progress = progress
        self._running: _Running | None = None

    def __reduce__(self) -> tuple[type[TransferReport], tuple[str, ProgressOption]]:
        return type(self), (self._operation, self._progress)

    def begin(self, url: str, store: BlobStore, *, leads: bool | None = None) -> None:
        """Begin a save or a load of `url`; `leads` as for `confirm`, if it is known already."""
        thread = threading.current_thread()
        report_abandoned(thread)
        now = _Moment()
        self._running = _Running(url, store, now, now, store.counts, leads is None or leads, leads is not None)
        _begun[id(self)] = thread, self

    def confirm(self, leads: bool) -> None:
        """Record that this is a save or a load, not only a look at the metadata; with `leads`, it is logged at INFO."""
        if self._running is not None:
            self._running.leads, self._running.is_certain, self._running.last_step = leads, True, _Moment()

    def may_have_ended(self, error: BaseException | None) -> None:
        """Record that it has ended with this error unless something else follows; None takes that back."""
        if self._running is not None:
            self._running.error = error

    def _abandon(self) -> None:
        """Report that it will not continue, unless it was only a look at the metadata, or runs in another process."""
        running = self._running
        if running is not None and running.process == os.getpid() and (running.error is not None or running.is_certain):
            self._finish(running.error or _unknown_end(self._operation, running.url), None, running.last_step)
        self._running = None

    def transfer(self, items: int, total: int | None) -> Meter:
        """Make the meter for this rank's `items`, of about `total` bytes, or of as many as `expecting` sees."""
        running = self._running
        url = "" if running is None else running.url
        meter = Meter(self._progress, Progress(self._operation, url, job_rank(), 0, total, 0.0))
        if running is not None:
            running.items, running.meter, running.last_step = items, meter, _Moment()
        return meter

    def paused(self) -> AbstractContextManager[Meter | None]:
        """Return the meter that `transfer` made, to continue with."""
        running = self._running
        return nullcontext() if running is None or running.meter is None else running.meter

    def moved(self, nbytes: int) -> None:
        """Count `nbytes` that have arrived. From any thread."""
        running = self._running
        if running is not None and running.meter is not None:
            running.meter.moved(nbytes)

    def expecting(self, reads: Iterable[Read]) -> Iterable[Read]:
        """Return the same reads, after the meter was told their bytes."""
        meter = None if self._running is None else self._running.meter
        if meter is None or not meter.reports:
            return reads
        expected = list(reads)
        meter.expect(sum(read.length for read in expected))
        return expected

    def end(self, error: BaseException | None = None, checkpoint_bytes: int | None = None) -> None:
        """End it: write the log line unless there was an error, and emit the event."""
        if self._running is not None:
            self._finish(error, checkpoint_bytes, _Moment())

    def _finish(self, error: BaseException | None, checkpoint_bytes: int | None, end: _Moment) -> None:
        running, self._running = self._running, None
        _begun.pop(id(self), None)
        assert running is not None
        counts = running.store.counts
        event = TransferEvent(
            operation=self._operation,
            url=running.url,
            rank=job_rank(),
            items=running.items,
            bytes=0 if running.meter is None else running.meter.done,
            seconds=end.clock - running.begin.clock,
            requests=counts.requests - running.counts.requests,
            retries=counts.retries - running.counts.retries,
            checkpoint_bytes=checkpoint_bytes,
            error=error,
            started=running.begin.at,
            finished=end.at,
        )
        if error is None:
            report_log.log(logging.INFO if running.leads else logging.DEBUG, "%s", _line(event))
        emit(event)


# What was begun and has not ended, by id, with its thread. torch takes all steps of one save or load in one thread.
_begun: dict[int, tuple[threading.Thread, TransferReport]] = {}


def report_abandoned(thread: threading.Thread | None = None) -> None:
    """Report what `thread` abandons by beginning something else (None: all, at exit), and what ended threads began."""
    for key, (its_thread, report) in list(_begun.items()):
        if thread is None or its_thread is thread or not its_thread.is_alive():
            _begun.pop(key, None)
            report._abandon()


atexit.register(report_abandoned)


def _unknown_end(operation: str, url: str) -> CheckpointError:
    return CheckpointError(
        f"The {operation} {_DIRECTION[operation]} {url} was broken off, by an error of its planner or of another rank. "
        "The exception that torch raised there has the reason"
    )


def _line(event: TransferEvent) -> str:
    past, direction = _PAST[event.operation], _DIRECTION[event.operation]
    took = format_duration(event.seconds)
    if event.checkpoint_bytes is not None and _world_size() > 1:
        rate = format_rate(event.checkpoint_bytes, event.seconds)
        checkpoint = f"saved {format_bytes(event.checkpoint_bytes)} in {took} ({rate}) to {event.url}"
        return f"{checkpoint}; rank {event.rank} sent {format_bytes(event.bytes)} of it ({_requests(event)})"
    who = f"rank {event.rank} " if _world_size() > 1 else ""
    return f"{who}{past} {format_bytes(event.bytes)} in {took} ({rate_and_requests(event)}) {direction} {event.url}"


def rate_and_requests(event: TransferEvent) -> str:
    """Format as ``"3.9 GB/s, 391 requests, 0 retries"``."""
    return f"{format_rate(event.bytes, event.seconds)}, {_requests(event)}"


def _requests(event: TransferEvent) -> str:
    return f"{event.requests} requests, {event.retries} {'retry' if event.retries == 1 else 'retries'}"


def job_rank() -> int:
    """Return the rank of this process in the whole job; 0 without ``torch.distributed``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
