"""`TransferEvent`: the result of a save, a load or a copy, for metrics, traces or a framework's logger.

    def send_metrics(event: TransferEvent) -> None:
        statsd.timing(f"checkpoint.{event.operation}.seconds", event.seconds)

    add_listener(send_metrics)

Every save and load is an event on every rank, whether it succeeded or not. If the planner raises before there is a plan
(a missing key), or another rank raises, torch does not notify this rank: its event comes when the same thread begins
its next save or load, or when the process ends, with a `CheckpointError` that says so.

Listeners belong to their process. A save in another process (``AsyncCheckpointerType.PROCESS``) is an event there.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Listener", "TransferEvent", "add_listener", "emit", "listening", "remove_listener"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransferEvent:
    """The end of one save, load or copy on one rank.

    Attributes:
        operation: ``"save"`` or ``"load"``; of the catalog ``"copy"`` or ``"consolidate"``.
        url: URL of the checkpoint without a SAS. For a copy the source, which may be a local path.
        rank: rank in ``torch.distributed`` (in the whole job); 0 without it.
        items: number of this rank's shards and objects; for a copy, of the blobs copied; for ``"consolidate"``, of the
            tensors and objects in the file.
        bytes: bytes that this rank has moved: blocks stored, ranges received, blobs copied, or bytes of the file. After
            an error, the bytes moved until then.
        seconds: time since the save or load began on this rank, including the planning. On the rank that commits, also
            including the wait for the other ranks and the commit.
        requests: number of requests to the service, including retries.
        retries: number of requests that were sent again after a failure.
        checkpoint_bytes: bytes of all ranks' items, on the rank that committed the checkpoint; else None.
        error: the error that ended the operation; None if it succeeded.
        started: start time (UTC).
        finished: end time (UTC).
        target: destination of a copy: a URL without a SAS, or a local path. None for saves and loads.
    """

    operation: str
    url: str
    rank: int
    items: int
    bytes: int
    seconds: float
    requests: int
    retries: int
    checkpoint_bytes: int | None
    error: BaseException | None
    started: datetime.datetime
    finished: datetime.datetime
    target: str | None = None


Listener: TypeAlias = Callable[[TransferEvent], object]

# The tuple is replaced as a whole, so that `emit` needs no lock: a fork could copy a lock while it is held.
_listeners: tuple[Listener, ...] = ()


def add_listener(listener: Listener) -> None:
    """Call `listener` with every event of this process from now on, in the thread that saves, loads or copies.

    Errors of the listener are logged and not raised: a broken metric must not cost a checkpoint. The listener should
    return quickly, because the save, load or copy waits for it.
    """
    global _listeners
    _listeners = (*_listeners, listener)


def remove_listener(listener: Listener) -> None:
    """Stop calling `listener`.

    Raises:
        ValueError: `listener` was not added.
    """
    global _listeners
    kept = list(_listeners)
    kept.remove(listener)
    _listeners = tuple(kept)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` with every event until the block ends."""
    add_listener(listener)
    try:
        yield
    finally:
        remove_listener(listener)


def emit(event: TransferEvent) -> None:
    """Call all listeners with an event."""
    for listener in _listeners:
        try:
            listener(event)
        except Exception:
            operation = event.operation
            _log.exception("a listener failed on the %s of %s; the %s is not affected", operation, event.url, operation)
