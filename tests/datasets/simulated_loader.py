"""A simulated DataLoader, whose workers begin their passes in any order without being processes."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from azure_torch_ckpt.datasets import BlobListing, BlobSampler, epoch_state
from azure_torch_ckpt.datasets.base import Resumable

__all__ = ["Loader", "Numbers", "Worker"]


class Numbers(BlobSampler):
    """A `BlobSampler` of as many blobs, with all settings of an order."""

    def __init__(self, count: int, **order: Any) -> None:
        listing = BlobListing.from_blob_urls(
            f"https://account.blob.core.windows.net/data/{number}" for number in range(count)
        )
        Resumable.__init__(self, listing, seed=3, **order)


class Worker:
    """A worker of a simulated DataLoader: a copy of the dataset, with the identity of another process."""

    pids = itertools.count(-1, -1)

    def __init__(self, dataset: Numbers, number: int, workers: int, seed: int) -> None:
        self._info = SimpleNamespace(id=number, num_workers=workers, seed=seed + number)
        self._pid = next(self.pids)
        # Like a fork: the copies share the shared memory, and all the rest stays as it was at that moment.
        self.dataset = copy.copy(dataset)
        self.dataset._epochs = copy.copy(dataset._epochs)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        process = SimpleNamespace(name=f"Process-{-self._pid}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(multiprocessing, "current_process", lambda: process)
            patch.setattr(epoch_state, "get_worker_info", lambda: self._info)
            patch.setattr(os, "getpid", lambda: self._pid)
            yield

    def begin(self) -> Iterator[int]:
        with self.running():
            return iter(self.dataset)


class Loader:
    """Yields the batches of a DataLoader, and begins the passes of its workers in any order."""

    def __init__(self, dataset: Numbers, batch_size: int, workers: int, seed: int, persistent: bool) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._number = workers
        self.seed = seed
        self._persistent = persistent
        self._workers: list[Worker] = []
        self._begun: dict[int, Iterator[int]] = {}
        self._behind: set[int] = set()  # workers that have not begun the pass before this one

    def batches(self, late: frozenset[int] = frozenset()) -> Iterator[list[int]]:
        """Yield the batches of a pass. The workers in `late` begin when their first batch is wanted.

        Before a DataLoader wants a batch of workers that persist, all of them have answered that they will begin the
        pass. So they have begun the one before, some of them perhaps after others have begun this one.
        """
        if not self._number:
            return self._from([lambda: iter(self._dataset)])
        numbers = range(self._number)
        if self._workers and self._persistent:
            self._behind = {i for i in numbers if i not in self._begun}
        else:
            self._workers = [Worker(self._dataset, i, self._number, self.seed) for i in numbers]
        self._begun = {}
        for number in reversed(numbers) if self.seed % 2 else numbers:
            if number not in late:
                self._begin(number)
        for number in list(self._behind):
            self._catch_up(number)
        return self._from([functools.partial(self._begin, number) for number in numbers])

    def begin_the_rest(self) -> None:
        """Let the workers begin whose batches were not wanted, although nothing uses them any more."""
        for number in range(self._number):
            self._begin(number)

    def _begin(self, number: int) -> Iterator[int]:
        if number not in self._begun:
            self._catch_up(number)
            self._begun[number] = self._workers[number].begin()
        return self._begun[number]

    def _catch_up(self, number: int) -> None:
        if number in self._behind:
            self._behind.remove(number)
            self._workers[number].begin()

    def _from(self, beginners: list[Any]) -> Iterator[list[int]]:
        sources: list[Any] = list(beginners)
        while sources:
            for index, source in enumerate(sources):
                source = sources[index] = source() if callable(source) else source
                batch = list(itertools.islice(source, self._batch_size))
                if batch:
                    yield batch
                else:
                    sources[index] = None
            sources = [source for source in sources if source is not None]
