"""`Throttle`: how many requests may be in flight, which is fewer while the service is busy."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["RequestCounts", "Throttle"]


_WAIT_SECONDS = 0.5  # so that signals come through: see blobs/workers.py


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """How many requests there were, and how many of them were sent because another one had failed."""

    requests: int = 0
    retries: int = 0


class Throttle:
    """Halves the requests in flight when the service is busy, and lets one more in per round of good answers.

    All threads of a store share one. Without a busy answer it costs two lock operations a request.
    """

    def __init__(self) -> None:
        self.start_over()
        _all.add(self)

    def start_over(self) -> None:
        """In the child of a fork: the parent's requests are not ours, and its lock may have been held."""
        self._changed = threading.Condition()
        self._in_flight = 0
        self._most = 0  # ever in flight while nothing held them back
        self.limit: float | None = None
        """Requests that may be in flight now; None while nothing holds them back."""
        self._cuts = 0
        self._requests = 0
        self._retries = 0

    @property
    def counts(self) -> RequestCounts:
        """Of this process, since the store was made."""
        return RequestCounts(self._requests, self._retries)

    def count_retry(self) -> None:
        """Count a request that is about to be sent once more."""
        with self._changed:
            self._retries += 1

    @contextlib.contextmanager
    def permit(self) -> Iterator[Permit]:
        """Wait until one more request may be sent. The caller notes the result on the permit that this yields."""
        with self._changed:
            while self.limit is not None and self._in_flight >= max(1, int(self.limit)):
                self._changed.wait(_WAIT_SECONDS)
            self._in_flight += 1
            if self.limit is None:
                self._most = max(self._most, self._in_flight)
            permit = Permit(self._cuts)
        try:
            yield permit
        finally:
            with self._changed:
                if permit.busy:
                    self._cut(permit.cuts)
                elif permit.good and self.limit is not None:
                    self.limit += 1 / self.limit
                    if self.limit > self._most:
                        self.limit = None
                self._in_flight -= 1
                self._requests += 1
                self._changed.notify_all()

    def _cut(self, cuts_at_start: int) -> None:
        # Requests that were in flight together get the busy answer together. That is one reason to halve, not many.
        if cuts_at_start == self._cuts:
            self._cuts += 1
            self.limit = max(1.0, self._in_flight / 2)


_all: weakref.WeakSet[Throttle] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # Before the child has threads: two of them that found the change of process by themselves would not agree.
    for throttle in list(_all):
        throttle.start_over()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Permit:
    """Allows one request. Set `busy` or `good` before leaving it; leave both False after a failure without answer."""

    __slots__ = ("busy", "cuts", "good")

    def __init__(self, cuts: int) -> None:
        self.cuts = cuts
        self.busy = False
        self.good = False
