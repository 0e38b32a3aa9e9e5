"""What writers and readers have in common: `BaseStorage`, and of writers `BaseWriter`, the protocol of a save.

==========================  ==========================================================================================
``set_up_storage_writer``   every rank begins the save, with a nonce of its own
``prepare_local_plan``      the coordinator removes what its failed saves left, and looks at the URL;
                            every rank sends a `SaveTicket` with its plan
``prepare_global_plan``     the coordinator checks the tickets, and gives the save its id
``write_data``              every rank stores its data under names that have the save's id
``finish``                  the coordinator checks the results, commits with one conditional write, and removes the old
==========================  ==========================================================================================
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.dcp.blob_names import new_save_id
from azure_torch_ckpt.dcp.removal import remove_blobs
from azure_torch_ckpt.dcp.report import TransferReport
from azure_torch_ckpt.errors import AzureCheckpointError, CheckpointError, CommitConflictError, LocationError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.progress import ProgressOption

__all__ = ["BaseStorage", "BaseWriter", "SaveTicket", "step"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Self = TypeVar("_Self", bound="BaseStorage")


class _ThreadState(threading.local):
    """What one thread does with a writer or a reader."""

    target: tuple[BlobLocation, BlobStore] | None = None  # where `reset` turned this thread
    operation: Any = None  # the save or load that this thread began last


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


_log = logging.getLogger(__name__)

_Writer = TypeVar("_Writer", bound="BaseWriter")


@dataclass(frozen=True, slots=True)
class SaveTicket:
    """Travels in the plans: from a rank to the coordinator, and back with the save's id.

    Attributes:
        nonce: of this rank in this save. A ticket that comes back with another nonce is from a cached plan
            (``enable_plan_caching``), and so is its save id.
        save_id: None on the way to the coordinator.
        rank: what the rank calls itself; None lets the coordinator number the plans.
        where: container and path, so that the coordinator notices ranks that save to another URL.
    """

    nonce: str
    save_id: str | None = None
    rank: int | None = None
    where: str = ""


@dataclass(slots=True, eq=False)
class _BegunSave:
    """A save, and the thread of the process that began it."""

    save: BaseWriter
    thread: threading.Thread = field(default_factory=threading.current_thread)
    process: int = field(default_factory=os.getpid)

    def may_continue(self) -> bool:
        """Whether more steps may follow.

        An error of another rank ends a save without notice on this one. But then its thread begins another save.
        """
        return (
            self.process == os.getpid()
            and self.thread is not threading.current_thread()
            and self.thread.is_alive()
            and not self.save._failed
        )


class BaseWriter(BaseStorage, StorageWriter):
    """Base of all writers. It remembers what failed saves may have left behind. Arguments as for `AzureBlobWriter`."""

    def __init__(
        self, url: str | os.PathLike[str] | BlobLocation, access: Access, progress: ProgressOption, overwrite: bool
    ) -> None:
        super().__init__(url, access, TransferReport("save", progress))
        self._overwrite = overwrite
        self._is_coordinator = True
        self._nonce = new_save_id()
        self._begun_saves: list[_BegunSave] = []
        # URL and save id of this save, as long as no metadata can name its blobs.
        self._unfinished: tuple[BlobLocation, str] | None = None
        self._abandoned: list[tuple[BlobLocation, str]] = []  # the same of earlier saves that will not continue

    def __getstate__(self) -> dict[str, Any]:
        # The saves that are running belong to this object, not to its copy in another process.
        return {**super().__getstate__(), "_begun_saves": []}

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    @staticmethod
    @abstractmethod
    def _data_prefix(save_id: str) -> str:
        """What the names of a save's data blobs begin with, below the checkpoint's URL."""

    def _begin_save(self: _Writer, is_coordinator: bool) -> _Writer:
        """`_begin` a save. The copy gets the saves that were begun before and do not continue."""
        save = self._begin()
        save._abandoned = []
        for begun in list(self._begun_saves):
            if begun.may_continue():
                continue
            try:
                self._begun_saves.remove(begun)
            except ValueError:  # another thread was faster
                continue
            # The list of a forked process has saves in it that continue in its parent.
            if begun.process == os.getpid() and begun.save._unfinished is not None:
                save._abandoned.append(begun.save._unfinished)
        self._begun_saves.append(_BegunSave(save))
        save._is_coordinator = is_coordinator
        save._nonce = new_save_id()
        save._report.begin(save.checkpoint_id, save._store, leads=is_coordinator)
        return save

    def _within_account(self) -> str:
        return f"{self._location.container}/{self._location.path}"

    def _check_same_url(self, rank: int, ticket: SaveTicket) -> None:
        """Raise `CheckpointError` unless a rank takes part in this very save."""
        if ticket.where != self._within_account():
            raise CheckpointError(
                f"Rank {rank} saves to {ticket.where}, and the coordinator to {self._within_account()}. Give all ranks "
                "the same URL. If two saves run at once, give each a process_group of its own, or wait for the first"
            )

    def _end_of_write(self, results: list[WriteResult]) -> Future[list[WriteResult]]:
        """What `write_data` returns."""
        if not self._has_finish():
            self._report.end()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _has_finish(self) -> bool:
        """Whether torch calls `finish` on this rank."""
        return self._is_coordinator

    def _commit_or_remove(self, commit: Callable[[], str], names: Iterable[str]) -> str:
        """Call `commit`, and return the ETag that it returns. If another save won, remove the data blobs `names`.

        Before `commit` begins, the save stops being one whose data may be removed: without an answer, the commit may
        have been carried out. `CommitConflictError` alone proves that no metadata names the data.
        """
        self._unfinished = None
        try:
            return commit()
        except CommitConflictError:
            remove_blobs(self._store, self._location, names)
            raise

    def _remove_abandoned(self) -> None:
        """Remove the data of earlier saves of this writer that an error of some rank ended before the commit."""
        for location, save_id in self._abandoned:
            if location.container_root() == self._store.location:
                self._remove_save(location, save_id)

    def _remove_save(self, location: BlobLocation, save_id: str) -> None:
        prefix = self._data_prefix(save_id)
        try:
            paths = [blob.path for blob in self._store.list(location.prefix + prefix)]
        except AzureCheckpointError as error:
            _log.warning("could not look for the blobs of the failed save %s at %s: %s", save_id, location, error)
            return
        folder = prefix.rpartition("/")[0]
        names = [path[len(location.prefix) :] for path in paths]
        remove_blobs(self._store, location, names, [folder] if folder else [])
