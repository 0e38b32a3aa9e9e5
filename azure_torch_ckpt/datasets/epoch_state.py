"""`EpochState`: how far an epoch has been read, in the process that made the dataset and in its workers.

A DataLoader's workers hold copies of the dataset, some of them for the whole training. The numbers that must reach them
are in shared memory.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from azure_torch_ckpt.datasets.order import EpochOrder, Permutation, Share
from azure_torch_ckpt.errors import ConfigurationError

__all__ = ["Cursor", "EpochState", "SharedCounter", "StreamPosition"]

_WORKERS = 1024  # slots: one of the process itself and 1,023 of workers
# The shared memory holds: the latest version; the version that workers read; the version of which passes after the
# first one have begun; how many passes workers have begun; the last few `_Start`s, each with the mark of its first
# pass; the names of the last passes, and the version of each; the version from which each worker has begun.
_VERSION, _BY_WORKERS, _LATER, _COUNT, _STARTS = range(5)
_VERSIONS, _START, _MARK = 16, 8, 7  # the number of `_Start`s, the numbers in each, and the index of the mark
_PASSES = _STARTS + _VERSIONS * _START
_LAST_PASSES = 32
_OF_PASSES = _PASSES + _LAST_PASSES
_SLOTS = _OF_PASSES + _LAST_PASSES
_NONE = -1  # no version


class StreamPosition(NamedTuple):
    """How far a pass has read. The fields are stored in the states of datasets, so they keep their names.

    Attributes:
        position: number of blobs of the share that have been read.
        offset: number of bytes of the next blob that have been read; 0 where a sample is a blob.
        drawn: how many of the samples that begin there have been yielded already, out of order (see `shuffled`).
        block: how many samples those were drawn from; 0 if `drawn` is 0.
    """

    position: int
    offset: int = 0
    drawn: int = 0
    block: int = 0


@dataclass(slots=True)
class Cursor:
    """One pass of one process through its share. `place` advances as samples are yielded."""

    epoch: int
    share: Share
    order: Permutation | range
    place: StreamPosition

    def index(self, position: int) -> int:
        """Return the index in the listing of the blob at a position of the share."""
        return self.order[self.share.position(position)]


class _Start(NamedTuple):
    """Where passes begin: the first one at `base` and `place`, those after it at the beginning of the epoch.

    Attributes:
        version: counts the changes that `set_epoch` and `load_state_dict` have made.
        base: samples of the epoch's order that all ranks together have read before.
        place: where the first worker continues after those.
    """

    version: int
    epoch: int
    base: int = 0
    place: StreamPosition = StreamPosition(0)


class EpochState:
    """The epochs of a stream dataset or a `BlobSampler`, and how far the current one has been read.

    `set_epoch` and `load_state_dict` make a new `_Start`, in the process that made the dataset. A worker gets it with
    its copy of the dataset when it is started. A persistent worker gets later ones from the shared memory. A DataLoader
    does not wait until persistent workers have begun a pass, so some may begin after the next `_Start` was made. They
    use the `_Start` from which the first worker of their pass has begun.

    A loaded state is for one pass, which may consist of many processes that begin at any time. So the first of them
    leaves the mark of its pass (see `_WorkerIdentity.mark`) in the shared memory. A process that finds another mark
    there belongs to a later pass, and begins at the beginning. So does a process that has begun a pass from this
    `_Start` before.
    """

    def __init__(self, order: EpochOrder) -> None:
        self.order = order
        self._shared = torch.zeros(_SLOTS + _WORKERS, dtype=torch.int64).share_memory_()
        self._start = _Start(0, 0)
        self._pid = os.getpid()
        self._begun_version = _NONE  # the version from which this process has begun a pass
        self._passes = 0  # the number of passes that this process has begun
        self._loaded: Cursor | None = None  # in a worker, loaded by torchdata
        self._cursor: Cursor | None = None
        self._begin_from(_Start(1, 0))

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, which has an order of its own if `shuffle` is set. A running pass is not disturbed.

        The epoch of a loaded state continues where the state was taken; any other one starts at its beginning.
        """
        start = self._next_start()
        if get_worker_info() is not None:  # the workers of a pass may call this at different times
            if epoch != start.epoch:
                self._start = _Start(start.version, epoch)
        elif epoch != start.epoch or self._shared[_cell(start.version) + _MARK]:
            self._begin_from(_Start(start.version + 1, epoch))

    def begin_pass(self) -> Cursor:
        """Begin a pass: the first one after a load where the state was taken, others at the epoch's beginning.

        `ValueError`: several workers cannot share the loaded state.
        """
        worker, start = _this_worker(), self._next_start()
        cursor, self._loaded = self._loaded, None
        if cursor is None:
            cursor = self._next_cursor(worker, start)
        self._passes += 1
        known = self._version_of_pass(worker, self._passes) != _NONE
        late = worker.slot and (known or int(self._shared[_VERSION]) != start.version)
        if self._is_first(worker, start):
            self._shared[_cell(start.version) + _MARK] = worker.mark(start.version)
            if int(self._shared[_SLOTS + worker.slot]) < start.version:
                self._shared[_SLOTS + worker.slot] = start.version
        elif not late:
            self._shared[_LATER] = start.version
        if not late:  # else other passes may have begun meanwhile
            self._shared[_BY_WORKERS] = start.version if worker.slot else _NONE
        if worker.slot and not known:
            number = int(self._shared[_COUNT]) % _LAST_PASSES
            self._shared[_OF_PASSES + number] = start.version
            self._shared[_PASSES + number] = worker.name(self._passes)
            self._shared[_COUNT] += 1
        self._begun_version = start.version
        self._cursor = cursor
        return cursor

    def state_dict(self) -> dict[str, Any]:
        """Return how far this process has read: numbers, strings and bools. See `StreamDataset.state_dict`."""
        worker, start = _this_worker(), self._next_start()
        if not worker.slot and int(self._shared[_BY_WORKERS]) == start.version:
            raise ValueError(
                "A DataLoader's workers read this dataset, ahead of the training. Take state_at(samples) with the "
                "number of samples that this rank was trained with, or use torchdata's StatefulDataLoader"
            )
        return self._state(self._cursor or self._next_cursor(worker, start))

    def state_at(self, samples: int) -> dict[str, Any]:
        """Return the `state_dict` after `samples` samples of this rank since the epoch began or was resumed.

        More samples than there are mean all of them: if the caller counts batches, the last one may be a short one.
        """
        if samples < 0:
            raise ConfigurationError(f"samples must not be negative, not {samples}")
        start = self._next_start()
        base = 0 if int(self._shared[_LATER]) == start.version else start.base
        return self._state(self._cursor_at(start.epoch, base, 0, 1, StreamPosition(samples)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass continue where `state` was taken: of all workers or, called in a worker, of this one."""
        order = self.order
        try:
            share = Share(**state["share"])
            epoch = int(state["epoch"])
            place = StreamPosition(*(int(state[name]) for name in StreamPosition._fields))
            of_listing, of_order = (share.count, state["fingerprint"]), (state["seed"], state["shuffle"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"This is not the state of a dataset or a sampler ({type(error).__name__}: {error}). Load what its "
                "state_dict() or state_at() returned. The state of a StatefulDataLoader is for the loader"
            ) from error
        if of_listing != (order.count, order.fingerprint):
            raise ValueError(
                f"This state is of another dataset: of {share.count} blobs, while this one has {order.count}, or of "
                "other names. Load the BlobListing that was saved with it, and make the dataset of that"
            )
        if of_order != (order.seed, order.shuffle):
            raise ValueError(
                f"This state is of another order: seed={state['seed']}, shuffle={state['shuffle']}, while this dataset "
                f"has seed={order.seed}, shuffle={order.shuffle}"
            )
        if any(place[1:]) and (share.rank, share.world_size) != (order.rank, order.world_size):
            raise ValueError(
                f"This state is of rank {share.rank} of {share.world_size}, in the middle of a shard, and this is rank "
                f"{order.rank} of {order.world_size}. Save the state of each rank under a key of its own"
            )
        worker, start = _this_worker(), self._next_start()
        if worker.slot:
            mine = order.share(share.base, worker.number, worker.workers)
            if share != mine:
                raise ValueError(f"This state is of {share}, and this is {mine}. Use the same numbers of both")
            self._loaded = self._cursor_at(epoch, share.base, worker.number, worker.workers, place)
            self._cursor = self._loaded
            return
        if share.workers != 1:
            raise ValueError(
                f"This is the state of one of {share.workers} workers. torchdata's StatefulDataLoader loads it, with "
                f"num_workers={share.workers}"
            )
        base = share.base + place.position * share.world_size
        self._begin_from(_Start(start.version + 1, epoch, base, place._replace(position=0)))

    def _begin_from(self, start: _Start) -> None:
        self._start, self._cursor = start, None
        cell = _cell(start.version)
        self._shared[cell : cell + _START] = torch.tensor([*start[:-1], *start.place, 0])
        self._shared[_VERSION] = start.version

    def _next_start(self) -> _Start:
        """Return the start of the next pass: the latest one, or in a late worker that of the pass's other workers.

        A worker that was just started uses the start of the moment at which it was started.
        """
        worker = _this_worker()
        if self._pid != os.getpid():
            self._pid, self._cursor, self._passes = os.getpid(), None, 0
        elif not worker.slot or self._passes:
            version = self._version_of_pass(worker, self._passes + 1)
            if version == _NONE:
                version = int(self._shared[_VERSION])
            if version != self._start.version:
                cell = _cell(version)
                version, epoch, base, *place = (int(value) for value in self._shared[cell : cell + _MARK])
                self._start = _Start(version, epoch, base, StreamPosition(*place))
        return self._start

    def _version_of_pass(self, worker: _WorkerIdentity, number: int) -> int:
        """Return the version with which another worker of this loader has begun this pass, or `_NONE`."""
        if not worker.slot:
            return _NONE
        matches = (self._shared[_PASSES:_OF_PASSES] == worker.name(number)).nonzero()
        return int(self._shared[_OF_PASSES + int(matches[0])]) if len(matches) else _NONE

    def _is_first(self, worker: _WorkerIdentity, start: _Start) -> bool:
        """Whether a pass that this process begins is the first one from `start`."""
        mark = int(self._shared[_cell(start.version) + _MARK])
        # After manual_seed, a later pass has the same mark; but then another process has been this worker already. Only
        # if workers of one such pass have not begun when the other one begins, they may change places.
        again = worker.slot and int(self._shared[_SLOTS + worker.slot]) == start.version
        return self._begun_version != start.version and (not mark or (mark == worker.mark(start.version) and not again))

    def _next_cursor(self, worker: _WorkerIdentity, start: _Start) -> Cursor:
        if not self._is_first(worker, start):
            return self._cursor_at(start.epoch, 0, worker.number, worker.workers, StreamPosition(0))
        if start.place.drawn and worker.workers > 1:
            raise ValueError(
                "This state was taken without workers, in the middle of the shuffle buffer, and "
                f"{worker.workers} workers would share it differently. Load it with num_workers=0 or 1, or use "
                "torchdata's StatefulDataLoader, with the same number of workers for both"
            )
        place = start.place if worker.number == 0 else StreamPosition(0)
        return self._cursor_at(start.epoch, start.base, worker.number, worker.workers, place)

    def _cursor_at(self, epoch: int, base: int, worker: int, workers: int, place: StreamPosition) -> Cursor:
        return Cursor(epoch, self.order.share(base, worker, workers), self.order.permutation(epoch), place)

    def _state(self, cursor: Cursor) -> dict[str, Any]:
        # Numbers and strings only, and always the same keys: torch.distributed.checkpoint must know them before a load.
        return {
            "epoch": cursor.epoch,
            **cursor.place._asdict(),
            "share": asdict(cursor.share),
            "seed": self.order.seed,
            "shuffle": self.order.shuffle,
            "fingerprint": self.order.fingerprint,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> EpochState:
        copied = copy.copy(self)
        copied._shared = self._shared.clone().share_memory_()
        return copied


class SharedCounter:
    """A number to which all workers add."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()

    def add(self) -> None:
        self._counts[_this_worker().slot] += 1

    def __int__(self) -> int:
        return int(self._counts.sum())


class _WorkerIdentity(NamedTuple):
    """Identifies this process among the workers of a DataLoader.

    Attributes:
        slot: index in the shared memory; 0 if this process is not a worker.
        number: of the worker.
        seed: common to all workers of a pass, and hardly to those of another pass: their DataLoader draws it.
        loader: distinguishes DataLoaders that have the same seed because the program has set it again.
    """

    slot: int
    number: int
    workers: int
    seed: int
    loader: int

    def mark(self, version: int) -> int:
        """Return a number other than 0 and -1: the same for all workers of a pass, another one for other passes."""
        return hash((version, bool(self.slot), self.workers, self.seed)) or 1

    def name(self, number: int) -> int:
        """Return the same number for all workers of their loader's `number`-th pass, another one for other passes."""
        return hash((self.workers, self.seed, self.loader, number))


def _this_worker() -> _WorkerIdentity:
    info = get_worker_info()
    if info is None:
        return _WorkerIdentity(0, 0, 1, 0, 0)
    # Python names a process after the number of processes that its parent has started, and a DataLoader starts its
    # workers one after the other. If a program gives other names, or starts processes in between, a late worker uses
    # the latest start.
    number = re.search(r"\d+$", multiprocessing.current_process().name)
    loader = int(number[0]) - info.id if number else os.getpid()
    return _WorkerIdentity(1 + info.id % (_WORKERS - 1), info.id, info.num_workers, info.seed - info.id, loader)


def _cell(version: int) -> int:
    """Return the index of this version's `_Start` in the shared memory."""
    return _STARTS + _START * (version % _VERSIONS)
