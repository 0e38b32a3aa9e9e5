"""What writers and readers have in common: the checkpoint's URL, the way to its container, and a state per thread."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.report import TransferReport, reports_errors
from azure_torch_ckpt.errors import CheckpointError, LocationError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["CheckpointPlace", "SavingPlace", "step"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Self = TypeVar("_Self", bound="CheckpointPlace")


@dataclass(slots=True, eq=False)
class _Begun:
    """A save that was begun, in which thread of which process."""

    save: SavingPlace
    thread: threading.Thread = field(default_factory=threading.current_thread)
    process: int = field(default_factory=os.getpid)

    def goes_on(self) -> bool:
        """Whether it may. Nobody is told when another rank's error ends a save, but then its thread begins another."""
        return (
            self.process == os.getpid()
            and self.thread is not threading.current_thread()
            and self.thread.is_alive()
            and not self.save._failed
        )


class _Threads(threading.local):
    """What each thread has turned to, and what it has begun last."""

    place: tuple[BlobLocation, BlobStore] | None = None
    run: Any = None


class CheckpointPlace:
    """Base of all writers and readers.

    torch takes the steps of a save or a load one after the other in one thread, and lets others use the same object
    meanwhile, as a second ``async_save`` does. So every save and every load has a copy of the object to itself:
    `_begin` makes it, and a `step` runs on the copy that its thread has begun.

    Pickles and copies are of the object as it was made, at the URL that it was turned to last.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | BlobLocation,
        access: Access,
        report: TransferReport,
    ) -> None:
        super().__init__()
        self._location = BlobLocation.parse(url)
        self._store = BlobStore(self._location, access)
        self._report = report
        self._threads: _Threads | None = _Threads()  # None in the copies
        self._latest: Any = None  # the copy that was begun last, by any thread
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": None, "_latest": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _threads=_Threads())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.checkpoint_id!r})"

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint's URL, without a SAS: the one that this thread has turned to, if it has turned to any."""
        return str(self._here()[0])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` names a place in Blob Storage."""
        try:
            BlobLocation.parse(checkpoint_id)
        except LocationError:
            return False
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Turn to another checkpoint, in any container that the credential is good for. None: stay at this one.

        It holds for this thread, and for threads that have turned to none themselves. What is being saved or loaded
        goes on where it began.

        Raises:
            LocationError: `checkpoint_id` names no place in Blob Storage.
        """
        if checkpoint_id is None:
            return
        place = self._here()[1].moved_to(BlobLocation.parse(checkpoint_id))
        self._location, self._store = place
        if self._threads is not None:
            self._threads.place = place

    def _here(self) -> tuple[BlobLocation, BlobStore]:
        place = None if self._threads is None else self._threads.place
        return place or (self._location, self._store)

    def _begin(self: _Self, like: _Self | None = None) -> _Self:
        """A copy of this object, or of another copy of it, for what this thread does next."""
        run = object.__new__(type(self))
        run.__dict__.update(self.__dict__ if like is None else like.__dict__, _threads=None, _latest=None)
        run._report = copy.copy(self._report)
        if like is None:
            run._location, run._store = self._here()
        if self._threads is not None:
            self._threads.run = self._latest = run
        return run

    def _begun_here(self: _Self) -> _Self | None:
        """The copy that this thread has begun last."""
        run: _Self | None = self if self._threads is None else self._threads.run
        return run

    def _current(self: _Self) -> _Self:
        """The same; in a thread that has begun nothing, the one that any thread has begun last."""
        run: _Self = self._begun_here() or self._latest or self
        return run


class SavingPlace(CheckpointPlace):
    """Base of all writers: it keeps in mind what failed saves may have left behind."""

    def __init__(
        self,
        url: str | os.PathLike[str] | BlobLocation,
        access: Access,
        report: TransferReport,
    ) -> None:
        super().__init__(url, access, report)
        self._all_begun: list[_Begun] = []
        # Where this save, and earlier ones that will not go on, may have blobs that no metadata names; with save ids.
        self._unfinished: tuple[BlobLocation, str] | None = None
        self._abandoned: list[tuple[BlobLocation, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        # What is still being saved is the affair of this object, not of its copy in another process.
        return {**super().__getstate__(), "_all_begun": []}

    def _begin_save(self: _Saving) -> _Saving:
        """As `_begin`. The copy is told of the saves that were begun before and do not go on."""
        save = self._begin()
        save._abandoned = []
        for begun in list(self._all_begun):
            if begun.goes_on():
                continue
            try:
                self._all_begun.remove(begun)
            except ValueError:  # another thread was faster
                continue
            # The list of a forked process has saves in it that go on in its parent.
            if begun.process == os.getpid() and begun.save._unfinished is not None:
                save._abandoned.append(begun.save._unfinished)
        self._all_begun.append(_Begun(save))
        return save

    def _within_account(self) -> str:
        return f"{self._location.container}/{self._location.path}"

    def _check_same_place(self, rank: int, where: str) -> None:
        """See that a rank, which says `where` it saves to, takes part in this very save.

        Raises:
            CheckpointError: it does not.
        """
        if where != self._within_account():
            raise CheckpointError(
                f"Rank {rank} saves to {where}, and the coordinator to {self._within_account()}. Give all ranks the "
                "same URL. If two saves run at once, give each a process_group of its own, or wait for the first"
            )

    def _remove_abandoned(self) -> None:
        for location, save_id in self._abandoned:
            if location.container_root() == self._store.location:
                self._remove_save(location, save_id)

    def _remove_save(self, location: BlobLocation, save_id: str) -> None:
        """Remove what a save that does not go on has left."""
        raise NotImplementedError


_Saving = TypeVar("_Saving", bound=SavingPlace)


def step(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """For a step of a save or a load: it runs on the copy of its thread, and an error in it ends the whole."""
    told = reports_errors(method)

    @functools.wraps(method)
    def on_the_copy(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        run = self._current()
        try:
            return told(run, *args, **kwargs)
        except BaseException:
            run._failed = True
            raise

    return on_the_copy
