"""`prefetch`: run jobs on threads before their results are needed, in order, within a budget of bytes."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["prefetch"]

_T = TypeVar("_T")
_Task = Callable[[], None]


def prefetch(
    jobs: Iterable[tuple[int, Callable[[], _T]]], threads: int, budget: int
) -> Generator[Future[_T], None, None]:
    """Run jobs on threads and yield their futures, finished or not, in the order of the jobs.

    A future counts as used when the next one is requested.

    Args:
        jobs: each job, with the number of bytes that its result will hold. They are taken when there is room for them.
        threads: the number of threads. They are daemons, so that a hanging request does not keep the process alive.
        budget: bytes of all jobs that are running, or finished and not used. One job may always run.
    """
    tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
    waiting: deque[tuple[int, Future[_T]]] = deque()
    source = iter(jobs)
    started = held = 0
    following = next(source, None)
    try:
        while following is not None or waiting:
            while (
                following is not None and (not waiting or held + following[0] <= budget) and len(waiting) < 2 * threads
            ):
                cost, job = following
                future: Future[_T] = Future()
                tasks.put(_task(future, job))
                if started < threads:
                    threading.Thread(target=_work, args=(tasks,), name="blob-prefetch", daemon=True).start()
                    started += 1
                waiting.append((cost, future))
                held += cost
                following = next(source, None)
            cost, future = waiting.popleft()
            yield future
            held -= cost
    finally:
        for _, future in waiting:
            future.cancel()
        tasks.put(None)


def _task(future: Future[_T], job: Callable[[], _T]) -> _Task:
    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    return run


def _work(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
    tasks.put(None)  # for the next thread
