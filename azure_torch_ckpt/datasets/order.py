"""The order in which an epoch goes through a dataset, and the share of each rank and worker. Only numbers here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch.distributed as dist

from azure_torch_ckpt.datasets.listing import BlobListing

__all__ = ["EpochOrder", "OrderSettings", "Permutation", "Share", "Uneven", "split_settings", "this_rank"]

Uneven = Literal["keep", "drop", "pad"]
"""What to do if the samples cannot be divided evenly among the ranks; see `Share`."""

_WORD = (1 << 64) - 1
_ROUNDS = 8


class Permutation:
    """A pseudo-random order of ``range(count)`` that is computed where it is asked for, instead of being stored.

    So ten million blobs cost no memory in any worker, and an epoch can be resumed anywhere at once. It is a Feistel
    network over the next power of four, applied again while the result lies outside the range. It depends only on its
    arguments, neither on the platform nor on the version of a library.

    Args:
        key: chooses the order: a seed, the epoch, and other numbers that should change the order.
    """

    def __init__(self, count: int, *key: int) -> None:
        self.count = count
        self._half = max(((count - 1).bit_length() + 1) // 2, 1)
        digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8)]

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} of {self.count}")
        while (position := self._shuffle(position)) >= self.count:
            pass
        return position

    def _shuffle(self, value: int) -> int:
        half, mask = self._half, (1 << self._half) - 1
        left, right = value >> half, value & mask
        for key in self._keys:
            # The finaliser of splitmix64: every bit of the word influences every bit of the result.
            word = (right + key) & _WORD
            word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
            word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
            left, right = right, left ^ ((word ^ (word >> 31)) & mask)
        return left << half | right


@dataclass(frozen=True, slots=True)
class Share:
    """The samples of an epoch that one worker of one rank reads.

    The ranks take turns, sample by sample: when each has read n samples, together they have read the first
    ``n * world_size`` of the order. This is why another number of ranks can resume an epoch. Within a rank, the workers
    take turns batch by batch, because `torch.utils.data.DataLoader` collects in this order. So the number of workers
    does not change which samples a rank gets, and when.

    The fields are stored in the states of datasets, so they keep their names.

    Attributes:
        count: samples of the dataset.
        base: how many samples of the order all ranks together have read before.
        uneven: what to do with a rest that `world_size` does not divide: ``"keep"`` gives one sample more to the first
            ranks, ``"drop"`` leaves out the rest at the end, and ``"pad"`` repeats samples from the beginning.
        batch_size: samples that a worker reads in its turn.
    """

    count: int
    base: int = 0
    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1
    batch_size: int = 1
    uneven: Uneven = "keep"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, not {self.rank} of {self.world_size}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.uneven not in get_args(Uneven):
            raise ValueError(f"uneven must be one of {get_args(Uneven)}, not {self.uneven!r}")

    @property
    def of_rank(self) -> int:
        """The number of samples that all workers of this rank read."""
        rest = max(self.count - self.base, 0)
        if self.uneven == "drop":
            return rest // self.world_size
        extra = self.rank if self.uneven == "keep" else 0
        return max(-(-(rest - extra) // self.world_size), 0)

    def __len__(self) -> int:
        rounds, rest = divmod(self.of_rank, self.workers * self.batch_size)
        return rounds * self.batch_size + min(max(rest - self.worker * self.batch_size, 0), self.batch_size)

    def position(self, index: int) -> int:
        """Return the position of this share's `index`-th sample in the order of the epoch."""
        turn, within = divmod(index, self.batch_size)
        in_rank = (turn * self.workers + self.worker) * self.batch_size + within
        return (self.base + in_rank * self.world_size + self.rank) % self.count


class OrderSettings(TypedDict, total=False):
    """Arguments of all datasets and samplers that have an order; see `Share`.

    Attributes:
        shuffle: give each epoch its own order, which follows from `seed` and `set_epoch`.
        rank, world_size: of the ranks that share the dataset; by default those of the process group, or of torchrun.
        batch_size: the DataLoader's batch size. It makes the order independent of the number of workers.
    """

    shuffle: bool
    seed: int
    rank: int | None
    world_size: int | None
    batch_size: int
    uneven: Uneven


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """Determines the order of all epochs of the dataset that `fingerprint` identifies."""

    count: int
    fingerprint: int
    rank: int
    world_size: int
    shuffle: bool = False
    seed: int = 0
    batch_size: int = 1
    uneven: Uneven = "keep"

    @classmethod
    def make(
        cls, listing: BlobListing, *, rank: int | None = None, world_size: int | None = None, **settings: Any
    ) -> EpochOrder:
        """Fill in the defaults of `OrderSettings`. Raises `ValueError` for invalid ones."""
        order = cls(len(listing), listing.fingerprint, *this_rank(rank, world_size), **settings)
        order.share(0)  # validates the settings
        return order

    def share(self, base: int, worker: int = 0, workers: int = 1) -> Share:
        return Share(self.count, base, self.rank, self.world_size, worker, workers, self.batch_size, self.uneven)

    def permutation(self, epoch: int) -> Permutation | range:
        """Return the blob's index in the listing for each position of an epoch."""
        return Permutation(self.count, self.seed, epoch) if self.shuffle else range(self.count)


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that `OrderSettings` names, and the others."""
    order = {name: value for name, value in settings.items() if name in OrderSettings.__annotations__}
    return order, {name: value for name, value in settings.items() if name not in order}


def this_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size: the arguments, else the process group's, else torchrun's, else those of one rank.

    `ValueError`: only one of the two arguments is given.
    """
    if rank is not None and world_size is not None:
        return rank, world_size
    if rank is not None or world_size is not None:
        raise ValueError("Pass both rank and world_size, or neither of them")
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    # https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1
