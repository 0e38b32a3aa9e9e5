"""In which order an epoch goes through a dataset, and which part of it a rank and a worker read. Numbers only."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch.distributed as dist

__all__ = ["Permutation", "Share", "Uneven", "this_rank"]

Uneven = Literal["keep", "drop", "pad"]
"""What happens when the ranks cannot get equally many; see `Share`."""

_WORD = (1 << 64) - 1
_ROUNDS = 8


class Permutation:
    """A pseudo-random order of ``range(count)`` that is calculated where it is asked for, instead of being held.

    So ten million blobs cost no memory in any worker, and an epoch can be resumed anywhere at once. It is a Feistel
    network over the next power of four, applied again while the result lies outside the range. It depends on nothing
    but the arguments, neither on the platform nor on a library's version.

    Args:
        key: chooses the order: a seed, the epoch, and what else another order shall depend on.
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
            # The finaliser of splitmix64: every bit of the word decides about every bit of the result.
            word = (right + key) & _WORD
            word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
            word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
            left, right = right, left ^ ((word ^ (word >> 31)) & mask)
        return left << half | right


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker of one rank reads of an epoch.

    The ranks take turns, sample by sample: when each has read n samples, together they have read the first
    ``n * world_size`` of the order. That is why an epoch can be resumed by other numbers of ranks. Within a rank, the
    workers take turns batch by batch, as `torch.utils.data.DataLoader` collects from them. So what a rank gets, and
    when, does not depend on the number of its workers.

    Attributes:
        count: samples of the dataset.
        base: how many of the order all ranks together have read before.
        uneven: where the rest does not divide by `world_size`: ``"keep"`` gives the first ranks one more, ``"drop"``
            leaves out what is too much at the end, and ``"pad"`` repeats samples from the beginning of the order.
        batch_size: samples that a worker reads at its turn.
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
        """Samples that all workers of this rank read together."""
        rest = max(self.count - self.base, 0)
        if self.uneven == "drop":
            return rest // self.world_size
        extra = self.rank if self.uneven == "keep" else 0
        return max(-(-(rest - extra) // self.world_size), 0)

    def __len__(self) -> int:
        rounds, rest = divmod(self.of_rank, self.workers * self.batch_size)
        return rounds * self.batch_size + min(max(rest - self.worker * self.batch_size, 0), self.batch_size)

    def position(self, index: int) -> int:
        """Where in the epoch's order the `index`-th sample of this share stands."""
        turn, within = divmod(index, self.batch_size)
        in_rank = (turn * self.workers + self.worker) * self.batch_size + within
        return (self.base + in_rank * self.world_size + self.rank) % self.count


def this_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The arguments, where they are given; else what the process group says, else what torchrun set, else one rank.

    Raises:
        ValueError: only one of the two is given.
    """
    if rank is not None and world_size is not None:
        return rank, world_size
    if rank is not None or world_size is not None:
        raise ValueError("Give both rank and world_size, or none of them")
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    # https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1
