"""How far an epoch has got: `set_epoch`, `state_dict` and `load_state_dict`, in the process and in its workers.

A DataLoader's workers hold copies of the dataset, some of them for the whole training. What must reach them lies in
shared memory; what belongs to one of them, does not.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch.utils.data import get_worker_info

from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.order import Permutation, Share, Uneven, this_rank
from azure_torch_ckpt.errors import ConfigurationError

__all__ = ["Cursor", "OrderSettings", "Place", "Plan", "Progress", "Tally", "split_settings"]

_WORKERS = 1024  # slots: of the process itself and of 1,023 workers
# What lies in the shared memory: the latest version, and that of which workers read, and of which later passes than the
# first have begun; how many passes workers have begun; the last few `_Start`s, each with the mark of its first pass;
# the names of the last passes, and the version of each; the version that each worker has begun with.
_VERSION, _BY_WORKERS, _LATER, _COUNT, _STARTS = range(5)
_VERSIONS, _START, _MARK = 16, 8, 7  # how many, of how many numbers, which of them is the mark
_PASSES = _STARTS + _VERSIONS * _START
_LAST_PASSES = 32
_OF_PASSES = _PASSES + _LAST_PASSES
_SLOTS = _OF_PASSES + _LAST_PASSES
_NONE = -1  # no version


class OrderSettings(TypedDict, total=False):
    """Arguments of all datasets and samplers that have an order; see `Plan` and `Share`.

    Attributes:
        shuffle: give each epoch an order of its own, which follows from `seed` and `set_epoch`.
        rank, world_size: of the ranks that share the dataset; by default those of the process group, or of torchrun.
        batch_size: what the DataLoader has. It keeps the order independent of the number of workers.
    """

    shuffle: bool
    seed: int
    rank: int | None
    world_size: int | None
    batch_size: int
    uneven: Uneven


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides about the order of all epochs.

    Attributes:
        fingerprint: of the dataset, so that a state is not loaded for another one.
    """

    count: int
    fingerprint: int
    shuffle: bool
    seed: int
    rank: int
    world_size: int
    batch_size: int
    uneven: Uneven

    @classmethod
    def make(
        cls,
        listing: BlobListing,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        batch_size: int = 1,
        uneven: Uneven = "keep",
    ) -> Plan:
        rank, world_size = this_rank(rank, world_size)
        plan = cls(len(listing), listing.fingerprint, shuffle, seed, rank, world_size, batch_size, uneven)
        plan.share(0)  # refuses what cannot be
        return plan

    def share(self, base: int, worker: int = 0, workers: int = 1) -> Share:
        return Share(self.count, base, self.rank, self.world_size, worker, workers, self.batch_size, self.uneven)


class Place(NamedTuple):
    """Where a pass stands.

    Attributes:
        position: blobs of the share that are done.
        offset: bytes of the next blob that are done; 0 where a sample is a blob.
        drawn: how many of the samples that begin there have been handed out already, out of order (see `shuffled`).
        block: how many those were to be chosen from; 0 if `drawn` is.
    """

    position: int
    offset: int = 0
    drawn: int = 0
    block: int = 0


@dataclass(slots=True)
class Cursor:
    """One pass through the share of one process. `place` moves on as samples are handed out."""

    epoch: int
    share: Share
    order: Permutation | range
    place: Place

    def index(self, position: int) -> int:
        """Of the sample in the dataset."""
        return self.order[self.share.position(position)]


class _Start(NamedTuple):
    """Where passes begin: the first one at `base` and `place`, those after it at the beginning of the epoch.

    Attributes:
        version: counts what `set_epoch` and `load_state_dict` have changed.
        base: samples of the epoch's order that all ranks together have read before.
        place: where the first worker goes on behind those.
    """

    version: int
    epoch: int
    base: int = 0
    place: Place = Place(0)


class Progress:
    """What the iterable datasets and `BlobSampler` have in common: epochs, and how far this one has got.

    `set_epoch` and `load_state_dict` make a new `_Start`, in the process that made the dataset. A worker gets it with
    its copy of the dataset, when it is started, and later ones, if it persists, from the shared memory. A DataLoader
    does not wait until such workers have begun a pass, so some may begin after the next `_Start` was made. They take
    that from which the first worker of their pass has begun.

    A loaded state is for one pass, which may consist of many processes that begin at any time. So the first of them
    leaves the mark of its pass (see `_Here.mark`) in the shared memory. A process that finds another mark there belongs
    to a later pass, and begins at the beginning. So does one that has begun a pass from this `_Start` before.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._shared = torch.zeros(_SLOTS + _WORKERS, dtype=torch.int64).share_memory_()
        self._start = _Start(0, 0)
        self._pid = os.getpid()
        self._taken = _NONE  # the version from which this process has begun a pass
        self._passes = 0  # that this process has begun
        self._loaded: Cursor | None = None  # in a worker, by torchdata
        self._cursor: Cursor | None = None
        self._begin_from(_Start(1, 0))

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch: each has an order of its own if `shuffle` is set. A running pass is not disturbed.

        The epoch that was loaded goes on where the state was taken; any other begins at its beginning.
        """
        start = self._known()
        if get_worker_info() is not None:  # the workers of a pass may come here at different times
            if epoch != start.epoch:
                self._start = _Start(start.version, epoch)
        elif epoch != start.epoch or self._shared[_cell(start.version) + _MARK]:
            self._begin_from(_Start(start.version + 1, epoch))

    def begin(self) -> Cursor:
        """A new pass: where the loaded state was taken, the first time; else at the beginning of the epoch.

        Raises:
            ValueError: the loaded state is not one for several workers.
        """
        here, start = _here(), self._known()
        cursor, self._loaded = self._loaded, None
        if cursor is None:
            cursor = self._next(here, start)
        self._passes += 1
        known = self._version_of_pass(here, self._passes) != _NONE
        late = here.slot and (known or int(self._shared[_VERSION]) != start.version)
        if self._is_first(here, start):
            self._shared[_cell(start.version) + _MARK] = here.mark(start.version)
            if int(self._shared[_SLOTS + here.slot]) < start.version:
                self._shared[_SLOTS + here.slot] = start.version
        elif not late:
            self._shared[_LATER] = start.version
        if not late:  # else other passes may have begun meanwhile
            self._shared[_BY_WORKERS] = start.version if here.slot else _NONE
        if here.slot and not known:
            number = int(self._shared[_COUNT]) % _LAST_PASSES
            self._shared[_OF_PASSES + number] = start.version
            self._shared[_PASSES + number] = here.name(self._passes)
            self._shared[_COUNT] += 1
        self._taken = start.version
        self._cursor = cursor
        return cursor

    def state_dict(self) -> dict[str, Any]:
        """How far this process has got: what `load_state_dict` takes, of numbers, strings and truth values.

        Raises:
            ValueError: workers read, and how far the training has got with what they sent, nobody here knows.
        """
        here, start = _here(), self._known()
        if not here.slot and int(self._shared[_BY_WORKERS]) == start.version:
            raise ValueError(
                "A DataLoader's workers read this dataset, ahead of the training. Take state_at(samples) with the "
                "number of samples that this rank was trained with, or use torchdata's StatefulDataLoader"
            )
        return self._state(self._cursor or self._next(here, start))

    def state_at(self, samples: int) -> dict[str, Any]:
        """What `state_dict` is when this rank has got `samples` samples since the epoch began or was resumed.

        More than there are means all: with batches counted, the last one may be a short one.

        Raises:
            ValueError: `samples` is negative.
        """
        if samples < 0:
            raise ConfigurationError(f"samples must not be negative, not {samples}")
        start = self._known()
        base = 0 if int(self._shared[_LATER]) == start.version else start.base
        return self._state(self._new(start.epoch, base, 0, 1, Place(samples)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on where `state` was taken: of all workers, or, in a worker, of this one.

        Raises:
            ValueError: the state does not fit: it is of another dataset, order, or share.
        """
        plan = self.plan
        try:
            share = Share(**state["share"])
            epoch, place = int(state["epoch"]), Place(*(int(state[name]) for name in Place._fields))
            listing, order = (share.count, state["fingerprint"]), (state["seed"], state["shuffle"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"This is not the state of a dataset or a sampler ({type(error).__name__}: {error}). Load what its "
                "state_dict() or state_at() returned. The state of a StatefulDataLoader is for the loader"
            ) from error
        if listing != (plan.count, plan.fingerprint):
            raise ValueError(
                f"This state is of another dataset: of {share.count} blobs, while this one has {plan.count}, or of "
                "other names. Load the BlobListing that was saved with it, and make the dataset of that"
            )
        if order != (plan.seed, plan.shuffle):
            raise ValueError(
                f"This state is of another order: seed={state['seed']}, shuffle={state['shuffle']}, while this dataset "
                f"has seed={plan.seed}, shuffle={plan.shuffle}"
            )
        if any(place[1:]) and (share.rank, share.world_size) != (plan.rank, plan.world_size):
            raise ValueError(
                f"This state is of rank {share.rank} of {share.world_size}, in the middle of a shard, and this is rank "
                f"{plan.rank} of {plan.world_size}. Save the state of each rank under a key of its own"
            )
        here, start = _here(), self._known()
        if here.slot:
            mine = plan.share(share.base, here.worker, here.workers)
            if share != mine:
                raise ValueError(f"This state is of {share}, and this is {mine}. Use the same numbers of both")
            self._loaded = self._new(epoch, share.base, here.worker, here.workers, place)
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

    def _known(self) -> _Start:
        """That of the next pass: the latest, or in a late worker that of the others.

        A worker that was just started takes the one of the moment at which that was done.
        """
        here = _here()
        if self._pid != os.getpid():
            self._pid, self._cursor, self._passes = os.getpid(), None, 0
        elif not here.slot or self._passes:
            version = self._version_of_pass(here, self._passes + 1)
            if version == _NONE:
                version = int(self._shared[_VERSION])
            if version != self._start.version:
                cell = _cell(version)
                version, epoch, base, *place = (int(value) for value in self._shared[cell : cell + _MARK])
                self._start = _Start(version, epoch, base, Place(*place))
        return self._start

    def _version_of_pass(self, here: _Here, number: int) -> int:
        """With which another worker of this loader has begun this pass, if one has."""
        if not here.slot:
            return _NONE
        found = (self._shared[_PASSES:_OF_PASSES] == here.name(number)).nonzero()
        return int(self._shared[_OF_PASSES + int(found[0])]) if len(found) else _NONE

    def _is_first(self, here: _Here, start: _Start) -> bool:
        """Whether a pass that this process begins is the first one from `start`."""
        mark = int(self._shared[_cell(start.version) + _MARK])
        # After manual_seed, a later pass has the same mark; but then another process has been this worker already. Only
        # if workers of one such pass have not begun when the other one begins, they may change places.
        again = here.slot and int(self._shared[_SLOTS + here.slot]) == start.version
        return self._taken != start.version and (not mark or (mark == here.mark(start.version) and not again))

    def _next(self, here: _Here, start: _Start) -> Cursor:
        if not self._is_first(here, start):
            return self._new(start.epoch, 0, here.worker, here.workers, Place(0))
        if start.place.drawn and here.workers > 1:
            raise ValueError(
                f"This state was taken without workers, in the middle of what shuffle_buffer holds, and {here.workers} "
                "workers would share that differently. Load it with num_workers=0 or 1, or use torchdata's "
                "StatefulDataLoader, with one number of workers for both"
            )
        place = start.place if here.worker == 0 else Place(0)
        return self._new(start.epoch, start.base, here.worker, here.workers, place)

    def _new(self, epoch: int, base: int, worker: int, workers: int, place: Place) -> Cursor:
        plan = self.plan
        order = Permutation(plan.count, plan.seed, epoch) if plan.shuffle else range(plan.count)
        return Cursor(epoch, plan.share(base, worker, workers), order, place)

    def _state(self, cursor: Cursor) -> dict[str, Any]:
        # Numbers and strings only, and always the same keys: torch.distributed.checkpoint wants to know them before.
        return {
            "epoch": cursor.epoch,
            **cursor.place._asdict(),
            "share": asdict(cursor.share),
            "seed": self.plan.seed,
            "shuffle": self.plan.shuffle,
            "fingerprint": self.plan.fingerprint,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Progress:
        copied = copy.copy(self)
        copied._shared = self._shared.clone().share_memory_()
        return copied


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `OrderSettings`, and the others."""
    order = {name: value for name, value in settings.items() if name in OrderSettings.__annotations__}
    return order, {name: value for name, value in settings.items() if name not in order}


class Tally:
    """A number that all workers add to."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()

    def add(self) -> None:
        self._counts[_here().slot] += 1

    def __int__(self) -> int:
        return int(self._counts.sum())


class _Here(NamedTuple):
    """Which process this is.

    Attributes:
        slot: in the shared memory; 0 if this is no worker.
        seed: what all workers of a pass, and hardly those of another one, have in common: their DataLoader draws it.
        loader: tells loaders of one seed apart, with which a program has begun anew.
    """

    slot: int
    worker: int
    workers: int
    seed: int
    loader: int

    def mark(self, version: int) -> int:
        """The same for all workers of a pass, and another one for another pass from the same version; never 0 or -1."""
        return hash((version, bool(self.slot), self.workers, self.seed)) or 1

    def name(self, number: int) -> int:
        """The same for all workers of their loader's `number`-th pass, and another one for any other pass."""
        return hash((self.workers, self.seed, self.loader, number))


def _here() -> _Here:
    info = get_worker_info()
    if info is None:
        return _Here(0, 0, 1, 0, 0)
    # A process is called by how many its parent has started: a DataLoader starts its workers one after the other. Where
    # other names were given, or other processes started in between, a late worker takes the latest start.
    number = re.search(r"\d+$", multiprocessing.current_process().name)
    loader = int(number[0]) - info.id if number else os.getpid()
    return _Here(1 + info.id % (_WORKERS - 1), info.id, info.num_workers, info.seed - info.id, loader)


def _cell(version: int) -> int:
    """Where the `_Start` of this version lies in the shared memory."""
    return _STARTS + _START * (version % _VERSIONS)
