"""How far an epoch has got: `set_epoch`, `state_dict` and `load_state_dict`, in the process and in its workers.

A DataLoader's workers hold copies of the dataset, some of them for the whole training. What must reach them lies in
shared memory; what belongs to one of them, does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch.utils.data import get_worker_info

from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.order import Permutation, Share, Uneven, this_rank

__all__ = ["Cursor", "OrderSettings", "Place", "Plan", "Progress", "Tally", "split_settings"]

_SLOTS = 1024  # the process itself and 1,023 workers
_EPOCH, _LOADS, _BASE, _OFFSET, _DRAWN, _BLOCK, _BY_WORKERS, _USED = range(8)


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


class Progress:
    """What the iterable datasets and `BlobSampler` have in common: epochs, and how far this one has got."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._shared = torch.zeros(_USED + _SLOTS, dtype=torch.int64).share_memory_()
        self._loaded: Cursor | None = None  # in a worker, by torchdata
        self._cursor: Cursor | None = None

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch: each has an order of its own if `shuffle` is set. A running pass is not disturbed.

        The epoch that was loaded goes on where the state was taken; any other begins at its beginning.
        """
        if epoch != int(self._shared[_EPOCH]):
            self._shared[_EPOCH] = epoch
            self._resume_at(0, Place(0))
        self._shared[_BY_WORKERS] = 0
        self._cursor = None

    def begin(self) -> Cursor:
        """A new pass: where the loaded state was taken, the first time; else at the beginning of the epoch.

        Raises:
            ValueError: the loaded state is not one for several workers.
        """
        slot, worker, workers = _place()
        fresh = int(self._shared[_USED + slot]) != int(self._shared[_LOADS])
        self._shared[_USED + slot] = self._shared[_LOADS]
        if slot:
            self._shared[_BY_WORKERS] = 1
        cursor, self._loaded = self._loaded, None
        if cursor is None:
            base, place = self._resumed(worker, workers) if fresh else (0, Place(0))
            cursor = self._new(int(self._shared[_EPOCH]), base, worker, workers, place)
        self._cursor = cursor
        return cursor

    def state_dict(self) -> dict[str, Any]:
        """How far this process has got: what `load_state_dict` takes, of numbers, strings and truth values.

        Raises:
            ValueError: workers read, and how far the training has got with what they sent, nobody here knows.
        """
        cursor = self._cursor
        if cursor is None:
            if get_worker_info() is None and self._shared[_BY_WORKERS]:
                raise ValueError(
                    "A DataLoader's workers read this dataset, ahead of the training. Take state_at(samples) with the "
                    "number of samples that this rank was trained with, or use torchdata's StatefulDataLoader"
                )
            _, worker, workers = _place()
            base, place = self._resumed(worker, workers)
            cursor = self._new(int(self._shared[_EPOCH]), base, worker, workers, place)
        return self._state(cursor)

    def state_at(self, samples: int) -> dict[str, Any]:
        """What `state_dict` is when this rank has got `samples` samples since the epoch began or was resumed.

        Raises:
            ValueError: `samples` is negative.
        """
        if samples < 0:
            raise ValueError(f"samples must not be negative, not {samples}")
        return self._state(self._new(int(self._shared[_EPOCH]), int(self._shared[_BASE]), 0, 1, Place(samples)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on where `state` was taken: of all workers, or, in a worker, of this one.

        Raises:
            ValueError: the state does not fit: it is of another dataset, order, or share.
        """
        plan = self.plan
        share = Share(**state["share"])
        if share.count != plan.count or state["fingerprint"] != plan.fingerprint:
            raise ValueError(
                f"This state is of another dataset: of {share.count} blobs, while this one has {plan.count}, or of "
                "other names. Load the BlobListing that was saved with it, and make the dataset of that"
            )
        if (state["seed"], state["shuffle"]) != (plan.seed, plan.shuffle):
            raise ValueError(
                f"This state is of another order: seed={state['seed']}, shuffle={state['shuffle']}, while this dataset "
                f"has seed={plan.seed}, shuffle={plan.shuffle}"
            )
        place = Place(*(int(state[name]) for name in Place._fields))
        _, worker, workers = _place()
        if any(place[1:]) and (share.rank, share.world_size) != (plan.rank, plan.world_size):
            raise ValueError(
                f"This state is of rank {share.rank} of {share.world_size}, in the middle of a shard, and this is rank "
                f"{plan.rank} of {plan.world_size}. Save the state of each rank under a key of its own"
            )
        if get_worker_info() is not None:
            mine = plan.share(share.base, worker, workers)
            if share != mine:
                raise ValueError(f"This state is of {share}, and this is {mine}. Use the same numbers of both")
            self._loaded = self._new(int(state["epoch"]), share.base, worker, workers, place)
            self._cursor = self._loaded
            return
        if share.workers != 1:
            raise ValueError(
                f"This is the state of one of {share.workers} workers. torchdata's StatefulDataLoader loads it, with "
                f"num_workers={share.workers}"
            )
        self._shared[_EPOCH] = int(state["epoch"])
        self._resume_at(share.base + place.position * share.world_size, place)
        self._shared[_LOADS] += 1
        self._shared[_BY_WORKERS] = 0
        self._cursor = None

    def _resume_at(self, base: int, place: Place) -> None:
        for slot, value in ((_BASE, base), (_OFFSET, place.offset), (_DRAWN, place.drawn), (_BLOCK, place.block)):
            self._shared[slot] = value

    def _resumed(self, worker: int, workers: int) -> tuple[int, Place]:
        """The base of the share, and where a worker's pass begins."""
        base, offset, drawn, block = (int(self._shared[slot]) for slot in (_BASE, _OFFSET, _DRAWN, _BLOCK))
        if drawn and workers > 1:
            raise ValueError(
                f"This state was taken without workers, in the middle of what shuffle_buffer holds, and {workers} "
                "workers would share that differently. Load it with num_workers=0 or 1, or use torchdata's "
                "StatefulDataLoader, with one number of workers for both"
            )
        return base, Place(0, offset, drawn, block) if worker == 0 else Place(0)

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
        copy = Progress(self.plan)
        copy._shared.copy_(self._shared)
        return copy


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `OrderSettings`, and the others."""
    order = {name: value for name, value in settings.items() if name in OrderSettings.__annotations__}
    return order, {name: value for name, value in settings.items() if name not in order}


class Tally:
    """A number that all workers add to."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()

    def add(self) -> None:
        self._counts[_place()[0]] += 1

    def __int__(self) -> int:
        return int(self._counts.sum())


def _place() -> tuple[int, int, int]:
    """Slot in the shared memory, number of this worker, number of workers."""
    info = get_worker_info()
    return (0, 0, 1) if info is None else (1 + info.id % (_SLOTS - 1), info.id, info.num_workers)
