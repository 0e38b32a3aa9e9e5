"""The threads of a transfer: so many, until the first error, and to the end of what an interruption found."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import pytest

from azure_torch_ckpt.blobs.workers import Workers
from azure_torch_ckpt.blobs.workers import __file__ as workers_file
from azure_torch_ckpt.dcp.tensor_stream import ahead
from azure_torch_ckpt.objects.background_saves import BackgroundSaves

_SECONDS = 60.0


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
    """Requests that hang until they are stopped, as to a dead service."""

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


def wait_for_the_workers(hanging: Callable[[], None]) -> None:
    with Workers(1, "test") as workers:
        workers.submit(hanging)
        workers.finish()


def wait_for_a_value(hanging: Callable[[], None]) -> None:
    def values() -> Iterator[int]:
        hanging()
        yield 1

    with contextlib.closing(ahead(values())) as made:
        next(made)


def wait_for_the_background(hanging: Callable[[], None]) -> None:
    saves = BackgroundSaves()
    saves.remove("somewhere", hanging)
    saves.wait()


@pytest.mark.parametrize("wait", [wait_for_the_workers, wait_for_a_value, wait_for_the_background])
def test_a_signal_that_does_not_interrupt_the_wait_is_heeded_all_the_same(
    wait: Callable[[Callable[[], None]], None],
) -> None:
    """As one that comes just before the main thread begins to wait: here, another thread receives it."""
    handled = threading.Event()
    heeded: list[bool] = []

    def handle(*_: object) -> None:
        handled.set()
        raise InterruptionError

    def hanging() -> None:
        _until_the_main_thread_waits()
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        heeded.append(handled.wait(_SECONDS))

    signal.signal(signal.SIGUSR1, handle)
    with pytest.raises(InterruptionError):
        wait(hanging)
    assert heeded in ([], [True])  # not yet where the wait alone was given up


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


# ---- Tasks and errors -----------------------------------------------------------------------------------------------


def test_tasks_run_on_so_many_threads_and_no_more() -> None:
    barrier = threading.Barrier(3, timeout=60)
    threads: set[str] = set()
    done: list[int] = []

    def task(number: int) -> None:
        threads.add(threading.current_thread().name)
        barrier.wait()  # passes only if three run at once
        done.append(number)

    with Workers(3, "some") as workers:
        for number in range(30):
            workers.submit(lambda number=number: task(number))  # type: ignore[misc]
        workers.finish()
    assert sorted(done) == list(range(30))
    assert threads == {"some-0", "some-1", "some-2"}


def test_no_more_threads_than_tasks() -> None:
    def count() -> int:  # threads of other tests may end meanwhile
        return sum(thread.name.startswith("alone-") for thread in threading.enumerate())

    lock = threading.Lock()

    def wait() -> None:
        with lock:
            pass

    with Workers(50, "alone") as workers:
        with lock:
            workers.submit(wait)
            assert count() == 1
        workers.finish()
    assert count() == 0


@pytest.mark.parametrize("error", [KeyError("mine"), SystemExit(3), KeyboardInterrupt()])
def test_the_first_error_stops_the_rest_and_is_raised_ever_after(error: BaseException) -> None:
    ran: list[int] = []
    stops: list[int] = []

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught, Workers(1, "some", lambda: stops.append(1)) as workers:
        workers.submit(fail)
        for _ in range(10):
            with pytest.raises(type(error)):
                while True:
                    workers.submit(lambda: ran.append(1))
        workers.finish()
    assert caught.value is error
    assert (ran, stops) == ([], [1])


def test_an_error_of_the_caller_drops_what_has_not_begun() -> None:
    begun, ran = threading.Event(), []
    stopped = threading.Event()

    def wait() -> None:
        begun.set()
        assert stopped.wait(60)

    with pytest.raises(KeyError), Workers(1, "some", stopped.set) as workers:
        workers.submit(wait)
        workers.submit(lambda: ran.append(1))
        assert begun.wait(60)
        raise KeyError
    assert ran == []


def test_tasks_see_the_context_of_their_caller() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    variable.set("set")
    seen: list[str] = []
    with Workers(2, "some") as workers:
        workers.submit(lambda: seen.append(variable.get()))
        workers.finish()
    assert seen == ["set"]


def test_tasks_are_taken_after_the_end_of_the_main_thread() -> None:
    code = """
import runpy, sys, threading

Workers = runpy.run_path(sys.argv[1])["Workers"]  # without the rest of the package, which is slow to import

def late():
    threading.main_thread().join()
    with Workers(2, "late") as workers:
        for number in range(3):
            workers.submit(lambda: sys.stdout.write("ran\\n"))
        workers.finish()

threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", code, workers_file], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.returncode) == (["ran"] * 3, 0), done.stderr
