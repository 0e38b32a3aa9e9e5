"""The threads of a transfer end when it is interrupted, wherever the signal finds the main thread."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from azure_torch_ckpt.workers import Workers

_SECONDS = 10.0


class InterruptionError(Exception):
    pass


def _interrupt(*_: object) -> None:
    raise InterruptionError


@pytest.fixture(autouse=True)
def signal_that_raises() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, _interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


class HangingRequests:
    """What workers wait for until they are stopped, as for the answer of a service that is gone."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.has_begun = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def request(self) -> None:
        self.begun.append(threading.get_ident())
        self.has_begun.set()
        assert self._stopped.wait(_SECONDS)
        self.ended.append(threading.get_ident())

    def request_and_signal(self) -> None:
        assert self.has_begun.wait(_SECONDS)
        _until_the_main_thread_waits()
        os.kill(os.getpid(), signal.SIGUSR1)
        self.request()


def _until_the_main_thread_waits() -> None:
    main = threading.main_thread().ident
    assert main is not None
    deadline = time.monotonic() + _SECONDS
    while sys._current_frames()[main].f_code.co_filename != threading.__file__:
        assert time.monotonic() < deadline, "the main thread does not wait"
        time.sleep(0.001)


def submit_more_than_fit(workers: Workers, task: Callable[[], None]) -> None:
    for _ in range(100):
        workers.submit(task)


def wait_for_the_end(workers: Workers, task: Callable[[], None]) -> None:
    workers.finish()


def leave(workers: Workers, task: Callable[[], None]) -> None:
    pass


@pytest.mark.parametrize("wait", [submit_more_than_fit, wait_for_the_end, leave])
def test_a_signal_ends_the_wait_for_requests_that_hang(wait: Callable[[Workers, Callable[[], None]], None]) -> None:
    service = HangingRequests()
    with pytest.raises(InterruptionError), Workers(2, "test", service.stop) as workers:
        workers.submit(service.request)
        workers.submit(service.request_and_signal)
        wait(workers, service.request)
    # Those that had begun have ended before the block was left, and no other one has begun.
    assert len(service.begun) == 2
    assert sorted(service.ended) == sorted(service.begun)


def test_a_signal_while_a_thread_starts_does_not_leave_another_one_without_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A process cannot be made to get a signal at just this moment.
    start = threading.Thread.start

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "test-1":
            raise InterruptionError

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    service = HangingRequests()
    left = threading.Event()

    def transfer() -> None:
        with pytest.raises(InterruptionError), Workers(2, "test", service.stop) as workers:
            workers.submit(service.request)
            assert service.has_begun.wait(_SECONDS)
            workers.submit(service.request)
        left.set()

    threading.Thread(target=transfer, daemon=True).start()
    assert left.wait(_SECONDS)
    assert service.ended == service.begun
