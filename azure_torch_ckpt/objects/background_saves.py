"""`BackgroundSaves`: saves and removals of checkpoints in a thread, one after the other, in the order of the calls."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from azure_torch_ckpt.blobs.workers import WAIT_SECONDS
from azure_torch_ckpt.dcp.tensors.copies import copy_elements
from azure_torch_ckpt.errors import CheckpointError
from azure_torch_ckpt.objects.codec import SKELETON, Packed

__all__ = ["BackgroundSaves", "Snapshot", "is_being_saved", "wait_for_pending"]

_log = logging.getLogger(__name__)

# One that is being uploaded and one that waits for it: two saves in a row (the best and the last) do not make the
# caller wait, and memory stays bounded.
_SNAPSHOTS = 2


class Snapshot:
    """Host memory for one copy of a state dict. The next copy of tensors of the same shapes reuses the memory.

    The memory is pinned for tensors on a CUDA or XPU device, so that the device's copy engine fills it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contiguous copies on the CPU, complete when this returns and valid until the next call."""
        # A tensor made in inference mode cannot be written to outside of it, and the memory is used again.
        with torch.inference_mode(False), torch.no_grad():
            return self._take(tensors)

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept, self._buffers = self._buffers, {}
        filling: set[torch.device] = set()
        for name, tensor in tensors.items():
            pinned = tensor.device.type in ("cuda", "xpu")
            buffer = kept.pop(name, None)
            if buffer is None or not _fits(buffer, tensor, pinned):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            copy_elements(tensor.detach(), buffer, repr(name), non_blocking=pinned)
            self._buffers[name] = buffer
            if pinned:
                filling.add(tensor.device)
        for device in filling:
            torch.accelerator.current_stream(device).synchronize()
        return dict(self._buffers)


def _fits(buffer: torch.Tensor, tensor: torch.Tensor, pinned: bool) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and buffer.is_pinned() == pinned


@dataclass(frozen=True, slots=True)
class _Task:
    """A save, or a removal if there is no snapshot."""

    url: str
    work: Callable[[], None]
    snapshot: Snapshot | None = None

    @property
    def kind(self) -> str:
        return "removal" if self.snapshot is None else "save"

    def is_within(self, url: str) -> bool:
        return self.url == url or self.url.startswith(f"{url}/")

    def __str__(self) -> str:
        return f"The {self.kind} of {self.url} in the background"


@dataclass(frozen=True, slots=True)
class _FailedTask:
    task: _Task
    error: BaseException

    def as_error(self) -> CheckpointError:
        error = CheckpointError(
            f"{self.task} failed: {self.error}. The checkpoint that was there before is still there, and no checkpoint "
            "was removed since. Save again once the cause is gone"
        )
        error.__cause__ = self.error
        return error


class BackgroundSaves:
    """A queue of saves and removals, and a thread that runs while the queue has tasks.

    The next call of any method raises the error of a failed save, once. From the failure until then, removals are
    skipped: the failed save may have been meant to replace the checkpoint to remove.

    The interpreter does not exit before the queue is empty. Only one thread may call the methods. In the child of a
    fork the queue is empty: pending tasks are the parent's.
    """

    def __init__(self) -> None:
        self._start_over()
        _instances.add(self)

    def save(self, packed: Packed, url: str, upload: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Copy an object to host memory, and queue its upload. Waits while two earlier copies are not uploaded yet.

        Args:
            packed: the object.
            url: of the checkpoint.
            upload: called with the copy, later and in another thread.

        Raises:
            CheckpointError: an earlier save failed. This one did not begin.
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
        self._submit(_Task(url, lambda: upload(state_dict), snapshot))

    def remove(self, url: str, work: Callable[[], None]) -> None:
        """Queue the removal `work` of the checkpoint at `url`, behind all earlier tasks.

        Raises:
            CheckpointError: an earlier save failed. Nothing is removed.
        """
        self._check_process()
        with self._changed:
            self._raise_failure()
        self._submit(_Task(url, work))

    def wait(self) -> None:
        """Wait until the queue is empty; `CheckpointError` if a save failed."""
        self._check_process()
        with self._changed:
            self._wait_for(lambda: self._thread is None)
            self._raise_failure()

    def last_pending(self, url: str) -> str | None:
        """The kind of the last pending task at `url`: "save", "removal" or None."""
        self._check_process()
        with self._changed:
            pending = [task for task in self._pending() if task.url == url]
        return pending[-1].kind if pending else None

    def wait_for_pending(self, url: str) -> None:
        """Wait until no task at `url`, or below it, is pending.

        Raises:
            CheckpointError: a save there failed, and no call has raised that yet; the next call of another method does.
        """
        self._check_process()
        with self._changed:
            self._wait_for(lambda: not any(task.is_within(url) for task in self._pending()))
            failure = self._failure
        if failure is not None and failure.task.snapshot is not None and failure.task.is_within(url):
            raise failure.as_error()

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
        self._failure: _FailedTask | None = None
        self._thread: threading.Thread | None = None

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # the thread is the parent's, which may have held the lock when it forked
            self._start_over()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        failure, self._failure = self._failure, None
        raise failure.as_error()

    def _submit(self, task: _Task) -> None:
        with self._changed:
            self._tasks.append(task)
            if self._thread is not None:
                return
            # Not a daemon: the interpreter waits for it, and it ends by itself.
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
                _log.warning("%s was not removed, because an earlier save failed", task.url)
            else:
                failure = _carry_out(task)
            with self._changed:
                self._running = None
                self._put_back(task)
                self._failure = self._failure or failure
                self._changed.notify_all()


_instances: weakref.WeakSet[BackgroundSaves] = weakref.WeakSet()


def is_being_saved(url: str) -> bool:
    """Whether this process is saving a checkpoint at `url`, with no removal queued behind the save."""
    return any(saves.last_pending(url) == "save" for saves in list(_instances))


def wait_for_pending(url: str, besides: BackgroundSaves | None = None) -> None:
    """Wait until no task of this process is pending at `url`, or below it, in any queue.

    Args:
        besides: a queue not to wait for.

    Raises:
        CheckpointError: a save there failed, and no call has raised that yet.
    """
    for saves in list(_instances):
        if saves is not besides:
            saves.wait_for_pending(url)


def _carry_out(task: _Task) -> _FailedTask | None:
    try:
        task.work()
    except BaseException as error:
        # At once: the next call may be much later, and at the interpreter's exit there is none.
        _log.error("%s failed: %s", task, error)
        return _FailedTask(task, error)
    return None
