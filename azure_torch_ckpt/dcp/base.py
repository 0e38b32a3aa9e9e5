"""What writers and readers have in common: the checkpoint's URL, its store, and a state for each save and each load."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.dcp.report import TransferReport
from azure_torch_ckpt.errors import LocationError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["BaseStorage", "step"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Self = TypeVar("_Self", bound="BaseStorage")


class _ThreadState(threading.local):
    """What one thread does with a writer or a reader.

    Attributes:
        target: where `reset` turned this thread.
        operation: the save or load that this thread began last.
    """

    target: tuple[BlobLocation, BlobStore] | None = None
    operation: Any = None


class BaseStorage:
    """Base of all writers and readers.

    torch takes the steps of a save or a load one after the other in one thread, and lets other threads use the same
    object meanwhile, as a second ``async_save`` does. So every save and every load has a copy of the object to itself:
    `_begin` makes it, and a `step` runs on the copy that its thread has begun.

    Pickles and copies are of the object as it was made, at the URL that it was turned to last.
    """

    def __init__(self, url: str | os.PathLike[str] | BlobLocation, access: Access, report: TransferReport) -> None:
        super().__init__()
        self._location = BlobLocation.parse(url)
        self._store = BlobStore(self._location, access)
        self._report = report
        self._threads: _ThreadState | None = _ThreadState()  # None in the copies
        self._latest: Any = None  # the copy that was begun last, by any thread
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": None, "_latest": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _threads=_ThreadState())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.checkpoint_id!r})"

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint's URL, without a SAS: the one that this thread has turned to, if it has turned to any."""
        return str(self._turned_to()[0])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a URL in Blob Storage."""
        try:
            BlobLocation.parse(checkpoint_id)
        except LocationError:
            return False
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Turn to another checkpoint, in any container that the credential is good for. None: stay at this one.

        It holds for this thread, and for threads that have not turned to one themselves. A save or load that has begun
        continues where it began.

        Raises:
            LocationError: `checkpoint_id` is not a URL in Blob Storage.
        """
        if checkpoint_id is None:
            return
        target = self._turned_to()[1].moved_to(BlobLocation.parse(checkpoint_id))
        self._location, self._store = target
        if self._threads is not None:
            self._threads.target = target

    def _turned_to(self) -> tuple[BlobLocation, BlobStore]:
        target = None if self._threads is None else self._threads.target
        return target or (self._location, self._store)

    def _begin(self: _Self, like: _Self | None = None) -> _Self:
        """Copy this object, or another copy of it, for what this thread does next."""
        operation = object.__new__(type(self))
        operation.__dict__.update(self.__dict__ if like is None else like.__dict__, _threads=None, _latest=None)
        operation._report = copy.copy(self._report)
        if like is None:
            operation._location, operation._store = self._turned_to()
        if self._threads is not None:
            self._threads.operation = self._latest = operation
        return operation

    def _begun_here(self: _Self) -> _Self | None:
        """The copy that this thread has begun last."""
        operation: _Self | None = self if self._threads is None else self._threads.operation
        return operation

    def _current(self: _Self) -> _Self:
        """The same; in a thread that has begun nothing, the one that any thread has begun last."""
        operation: _Self = self._begun_here() or self._latest or self
        return operation


def step(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """Decorate a step of a save or a load: it runs on the copy of its thread, which an error in it ends."""

    @functools.wraps(method)
    def on_the_copy(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        operation = self._current()
        try:
            return method(operation, *args, **kwargs)
        except BaseException as error:
            operation._failed = True
            operation._report.end(error)
            raise

    return on_the_copy
