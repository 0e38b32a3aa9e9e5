"""`CollectorPause` stops the garbage collector during a loop, and starts it again however the loop ends."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

import pytest

from azure_torch_ckpt._internal.gc_pause import CollectorPause, without_collector


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_the_collector_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), CollectorPause():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()


def test_a_collector_that_the_user_switched_off_stays_off() -> None:
    gc.disable()
    with CollectorPause():
        pass
    assert not gc.isenabled()


@contextlib.contextmanager
def pause_of_another_thread() -> Iterator[None]:
    begun, end = threading.Event(), threading.Event()

    def pause() -> None:
        with CollectorPause():
            begun.set()
            end.wait(60)

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        assert begun.wait(60)
        yield
    finally:
        end.set()
        thread.join(60)


def test_the_last_of_several_threads_brings_it_back() -> None:
    with contextlib.ExitStack() as stack:
        with CollectorPause():
            stack.enter_context(pause_of_another_thread())
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_loop_that_takes_long_gets_it_back_early(monkeypatch: pytest.MonkeyPatch) -> None:
    items = without_collector(range(3))
    next(items)
    assert not gc.isenabled()
    # Two seconds would be long for a test.
    monkeypatch.setattr("azure_torch_ckpt._internal.gc_pause.time.monotonic", lambda: float("inf"))
    assert list(items) == [1, 2]
    assert gc.isenabled()
    with CollectorPause():  # and the count is right again
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_loop_that_is_left_brings_it_back() -> None:
    for item in without_collector(range(10)):
        assert not gc.isenabled()
        if item == 3:
            break
    del item
    assert gc.isenabled()


def test_a_fork_in_the_pause_of_another_thread_has_a_collector() -> None:
    with pause_of_another_thread():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
