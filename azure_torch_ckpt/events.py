"""What a save, a load or a copy came to, for whoever wants to know: metrics, traces, a logger of the framework.

    def note(event: TransferEvent) -> None:
        statsd.timing(f"checkpoint.{event.operation}.seconds", event.seconds)

    add_listener(note)

A save or a load is an event on every rank, whether it succeeded or not. What ends by an error of the planner before
there is a plan (a missing key), or by one of another rank, is told when the same thread begins its next save or load,
or when the process ends: torch lets nobody know earlier. Its error is then a `CheckpointError` that says so.

Listeners belong to the process. A save in a process of its own (``AsyncCheckpointerType.PROCESS``) ends there.
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
    """One save, load or copy has ended, on one rank.

    Attributes:
        operation: ``"save"``, ``"load"``, and of the catalog ``"copy"`` and ``"consolidate"``.
        url: the checkpoint's, without a SAS; what a copy was made of, which may be a local path.
        rank: of ``torch.distributed`` (the whole job's); 0 without it.
        items: tensors' shards and objects of this rank; blobs that were copied; tensors and objects in the file.
        bytes: that this rank has moved: of blocks that arrived, of ranges that were received, of blobs that were
            copied, of a file. After an error, those that had been moved until then.
        seconds: since the save or the load began on this rank, with the planning and, on the rank that commits, with
            the wait for the other ranks and the commit.
        requests: to the service, retries included.
        retries: requests that were sent again because they failed.
        checkpoint_bytes: of all ranks' items; only on the rank that committed the checkpoint, else None.
        error: what ended it; None if it succeeded.
        started: with time zone (UTC).
        finished: with time zone (UTC).
        target: where a copy went: a URL without a SAS, or a local path. None for saves and loads.
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

# Replaced as a whole, so that `emit` needs no lock, which a fork might copy while it is held.
_listeners: tuple[Listener, ...] = ()


def add_listener(listener: Listener) -> None:
    """Call `listener` with every event of this process from now on, in the thread that saves, loads or copies.

    What it raises is logged and goes no further: a broken metric must not cost a checkpoint. Keep it quick, for the
    save, load or copy returns after it.
    """
    global _listeners
    _listeners = (*_listeners, listener)


def remove_listener(listener: Listener) -> None:
    """Do not call `listener` any more.

    Raises:
        ValueError: it is not there.
    """
    global _listeners
    kept = list(_listeners)
    kept.remove(listener)
    _listeners = tuple(kept)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener` called as long as the block lasts."""
    add_listener(listener)
    try:
        yield
    finally:
        remove_listener(listener)


def emit(event: TransferEvent) -> None:
    """Hand an event to all listeners."""
    for listener in _listeners:
        try:
            listener(event)
        except Exception:
            _log.exception("a listener failed on the %s of %s; the %s is not affected", *_named(event))


def _named(event: TransferEvent) -> tuple[str, str, str]:
    return event.operation, event.url, event.operation
