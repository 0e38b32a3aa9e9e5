"""`Workers`: a bounded number of threads that carry out the requests of one transfer."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterable

__all__ = ["WAIT_SECONDS", "Workers", "run_all"]

WAIT_SECONDS = 0.5
"""The longest wait of the main thread, so that SIGTERM ends a transfer whose requests hang: the handler of a signal
that comes just before the thread begins to wait for a lock runs when that wait ends."""


class Workers:
    """Run tasks on at most `count` threads. The first error stops the rest and is raised to the caller.

    A context manager: leaving it waits for the tasks that have begun, and after an exception drops the other ones. Not
    a ``ThreadPoolExecutor``, which accepts no tasks once the main thread has ended, although an asynchronous save may
    still run in its own thread.

    Args:
        count: threads; they start when there is work for them.
        name: of the threads.
        stop: called after the first error, to end tasks that are running.
    """

    def __init__(self, count: int, name: str, stop: Callable[[], None] | None = None) -> None:
        self._count = count
        self._name = name
        self._stop = stop
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # A few tasks wait ready, so that no thread idles while the caller prepares the next one.
        self._permits = threading.Semaphore(count + 2)
        # Each thread with an event for its end: up to Python 3.12, once a signal's handler has raised in Thread.join,
        # that thread counts as ended.
        self._threads: list[tuple[threading.Thread, threading.Event]] = []
        self._error: BaseException | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._fail(error)
        try:
            self._join()
        except BaseException as interruption:  # a signal's handler raised
            self._fail(interruption)
            self._join()
            raise

    def submit(self, task: Callable[[], object]) -> None:
        """Queue a task; wait while ``count + 2`` are unfinished.

        Raises:
            the error of an earlier task.
        """
        while not self._permits.acquire(timeout=WAIT_SECONDS):
            pass
        if self._error is not None:
            self._permits.release()  # so that a caller who continues gets the error again instead of waiting for ever
            raise self._error
        if len(self._threads) < self._count:
            context = contextvars.copy_context()  # tracing finds its parent span there
            ended = threading.Event()
            thread = threading.Thread(
                target=context.run,
                args=(self._work, self._tasks, ended),
                name=f"{self._name}-{len(self._threads)}",
                daemon=True,
            )
            # In this order, because a signal's handler may raise while `start` waits: every running thread is listed.
            self._threads.append((thread, ended))
            try:
                thread.start()
            except RuntimeError:  # the system has no thread left
                self._threads.pop()
                raise
        self._tasks.put(task)

    def finish(self) -> None:
        """Wait for all tasks.

        Raises:
            the first error of a task.
        """
        self._join()
        if self._error is not None:
            raise self._error

    def abort(self, *, wait: bool = True) -> None:
        """Drop the tasks that have not begun and stop the others; with `wait`, return when no thread is left."""
        self._fail(ConnectionAbortedError("aborted"))
        self._join(wait)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
            if self._stop is not None:
                self._stop()

    def _join(self, wait: bool = True) -> None:
        self._tasks.put(None)
        if not wait:
            return
        for thread, ended in self._threads:
            while not ended.wait(WAIT_SECONDS):
                pass
            thread.join()
        self._threads, self._tasks = [], queue.SimpleQueue()

    def _work(self, tasks: queue.SimpleQueue[Callable[[], object] | None], ended: threading.Event) -> None:
        while (task := tasks.get()) is not None:
            try:
                if self._error is None:
                    task()
            except BaseException as error:
                self._fail(error)
            finally:
                self._permits.release()
        tasks.put(None)  # for the next thread
        ended.set()


def run_all(
    tasks: Iterable[Callable[[], object]], count: int, name: str, stop: Callable[[], None] | None = None
) -> None:
    """Run tasks on at most `count` threads, and return when all have ended. Arguments as for `Workers`.

    Raises:
        the first error of a task, or of `tasks`.
    """
    with Workers(count, name, stop) as workers:
        for task in tasks:
            workers.submit(task)
        workers.finish()
