"""Saves and removals of checkpoints in a thread, one after the other and in the order in which they were asked for."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from azure_torch_ckpt.blobs.workers import WAIT_SECONDS
from azure_torch_ckpt.errors import CheckpointError
from azure_torch_ckpt.objects.codec import SKELETON, Packed
from azure_torch_ckpt.objects.snapshot import Snapshot

__all__ = ["BackgroundSaves", "is_being_saved", "settle"]

_log = logging.getLogger(__name__)

# One that is being uploaded and one that waits for it: two saves of one moment (the best and the last) cost the
# caller no wait, and memory stays bounded.
_SNAPSHOTS = 2


@dataclass(frozen=True, slots=True)
class _Task:
    """A save, or a removal where there is no snapshot."""

    where: str
    work: Callable[[], None]
    snapshot: Snapshot | None = None

    @property
    def kind(self) -> str:
        return "removal" if self.snapshot is None else "save"

    def is_within(self, where: str) -> bool:
        return self.where == where or self.where.startswith(f"{where}/")

    def __str__(self) -> str:
        return f"The {self.kind} of {self.where} in the background"


@dataclass(frozen=True, slots=True)
class _Failure:
    task: _Task
    error: BaseException

    def told(self) -> CheckpointError:
        error = CheckpointError(
            f"{self.task} failed: {self.error}. What stood there before still stands, and no checkpoint was removed "
            "since. If the cause is gone, save again"
        )
        error.__cause__ = self.error
        return error


class BackgroundSaves:
    """A queue of saves and removals, and the thread that works through it for as long as there is something to do.

    A save that failed is reported by the next call of any method, once. From the failure to its report no removal is
    carried out: the checkpoint that was to be removed may be the one that the failed save was to replace.

    The interpreter does not exit before the queue is empty. Only one thread may call the methods. In the child of a
    fork the queue is empty: what waits is the parent's.
    """

    def __init__(self) -> None:
        self._start_over()
        _everybody.add(self)

    def save(self, packed: Packed, where: str, upload: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Copy what is to be saved and return; ``upload`` gets the copy, later and in another thread.

        Waits while two earlier copies are unsaved.

        Raises:
            CheckpointError: an earlier save failed. This one was not begun.
        """
        self._check_process()
        with self._changed:
            self._wait_for(lambda: bool(self._free or self._failure))
            self._raise_failure()
            snapshot = self._free.pop()
        try:
            state_dict = {**snapshot.take(packed.tensors), SKELETON: packed.skeleton}
        except BaseException:
            with self._changed:
                self._free.append(snapshot)
            raise
        self._submit(_Task(where, lambda: upload(state_dict), snapshot))

    def remove(self, where: str, work: Callable[[], None]) -> None:
        """Carry out a removal after everything that was asked for before.

        Raises:
            CheckpointError: an earlier save failed. Nothing is removed.
        """
        self._check_process()
        with self._changed:
            self._raise_failure()
        self._submit(_Task(where, work))

    def wait(self) -> None:
        """Wait until the queue is empty.

        Raises:
            CheckpointError: a save failed.
        """
        self._check_process()
        with self._changed:
            self._wait_for(lambda: self._thread is None)
            self._raise_failure()

    def last_at(self, where: str) -> str | None:
        """What was asked for last at `where` and is not done: "save" or "removal"."""
        self._check_process()
        with self._changed:
            pending = [task for task in self._pending() if task.where == where]
        return pending[-1].kind if pending else None

    def settle(self, where: str) -> None:
        """Wait until nothing at `where`, or below it, is pending.

        Raises:
            CheckpointError: a save there failed, and no call has said so yet; the next call of the methods above will.
        """
        self._check_process()
        with self._changed:
            self._wait_for(lambda: not any(task.is_within(where) for task in self._pending()))
            failure = self._failure
        if failure is not None and failure.task.snapshot is not None and failure.task.is_within(where):
            raise failure.told()

    def _pending(self) -> list[_Task]:
        return [*([] if self._running is None else [self._running]), *self._tasks]

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        while not self._changed.wait_for(condition, WAIT_SECONDS):
            pass

    def _start_over(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._tasks: deque[_Task] = deque()
        self._running: _Task | None = None
        self._free = [Snapshot() for _ in range(_SNAPSHOTS)]
        self._failure: _Failure | None = None
        self._thread: threading.Thread | None = None

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # the thread is the parent's, and the lock may have been held when it forked
            self._start_over()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        failure, self._failure = self._failure, None
        raise failure.told()

    def _submit(self, task: _Task) -> None:
        with self._changed:
            self._tasks.append(task)
            if self._thread is not None:
                return
            # No daemon: the interpreter waits for it, and it ends by itself.
            thread = threading.Thread(target=self._run, name="checkpoint-saves", daemon=False)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is about to exit, or the system has no more threads
                self._put_back(self._tasks.pop())
                raise
            self._thread = thread

    def _put_back(self, task: _Task) -> None:
        if task.snapshot is not None:
            self._free.append(task.snapshot)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    self._thread = None
                    self._changed.notify_all()
                    return
                task = self._running = self._tasks.popleft()
                skip = task.snapshot is None and self._failure is not None
            failure = None
            if skip:
                _log.warning("%s was not removed, for a save before that failed", task.where)
            else:
                failure = _carry_out(task)
            with self._changed:
                self._running = None
                self._put_back(task)
                self._failure = self._failure or failure
                self._changed.notify_all()


_everybody: weakref.WeakSet[BackgroundSaves] = weakref.WeakSet()


def is_being_saved(where: str) -> bool:
    """Whether a checkpoint at `where` is on its way in this process, and is not to be removed after that."""
    return any(saves.last_at(where) == "save" for saves in list(_everybody))


def settle(where: str, besides: BackgroundSaves | None = None) -> None:
    """Wait until nothing in this process is pending at `where`, or below it, whoever asked for it.

    Args:
        besides: not waited for.

    Raises:
        CheckpointError: a save there failed, and nobody was told yet.
    """
    for saves in list(_everybody):
        if saves is not besides:
            saves.settle(where)


def _carry_out(task: _Task) -> _Failure | None:
    try:
        task.work()
    except BaseException as error:
        # At once, for the next call may be far away, and at the interpreter's exit there is none.
        _log.error("%s failed: %s", task, error)
        return _Failure(task, error)
    return None
