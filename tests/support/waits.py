"""The waits between attempts of a failed request: skipped, or measured.

Tests assert on these waits, not on a clock, how soon an operation gives up: a machine that pauses for some seconds says
nothing about the package.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest

from azure_torch_ckpt.transport import retry
from azure_torch_ckpt.transport.buffers import Cancel


class Clock(threading.local):
    """The retry policy's time, of each thread: waiting takes none, and is noted."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        self.on_wait: Callable[[], object] = list

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        """The wall clock, for dates in ``Retry-After``."""
        return 1_700_000_000.0

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        self.on_wait()


@contextlib.contextmanager
def without_waiting() -> Iterator[Clock]:
    """Failed requests are tried again at once, and as often as if they had waited."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "time", clock)
        patch.setattr(Cancel, "wait", lambda self, seconds: clock.wait(seconds))
        yield clock


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: defaultdict[int | None, float] = defaultdict(float)

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and isinstance(delay := record.args[-1], float):
            self.seconds[record.thread] += delay


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """No thread waits longer than this, in all, before requests that it tries again."""
    log, listener = logging.getLogger(retry.__name__), _Listener()
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(listener)
        log.setLevel(level)
    assert max(listener.seconds.values(), default=0.0) <= seconds
