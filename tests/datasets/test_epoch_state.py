"""A loaded state is for one pass on any number of workers: exactly the rest of the epoch, then whole epochs.

Simulated workers, which begin as those of a DataLoader do, run any sequence of passes; real workers run some.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from azure_torch_ckpt.datasets import (
    BlobDataset,
    BlobListing,
    BlobSampler,
    IterableBlobDataset,
    TarDataset,
    epoch_state,
)
from azure_torch_ckpt.datasets.base import StreamDataset
from azure_torch_ckpt.datasets.blob import Blob
from azure_torch_ckpt.datasets.epoch_state import Cursor, StreamPosition
from azure_torch_ckpt.datasets.order import Uneven
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import ConfigurationError
from tests.datasets.sample_blobs import collate, fill, join, key, number_of, numbered, shard, tar_of

URL = "https://account.blob.core.windows.net/data"
COUNT = 24


class Numbers(StreamDataset[Blob, int]):
    """An `IterableBlobDataset` that yields the blobs' numbers instead of reading them."""

    def __init__(self, count: int, **order: Any) -> None:
        listing = BlobListing.from_blob_urls(f"{URL}/{number}" for number in range(count))
        super().__init__(listing, seed=3, **order)

    def _read(self, cursor: Cursor) -> Iterator[int]:
        for position in range(cursor.place.position, len(cursor.share)):
            cursor.place = StreamPosition(position + 1)
            yield cursor.index(position)

    def __len__(self) -> int:
        return len(self._epochs.order.share(0))

    def state_at(self, samples: int) -> dict[str, Any]:
        return self._epochs.state_at(samples)


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


_PERSISTENT_LATE: list[tuple[Any, ...]] = [
    (0, False, "", None, "here", 1, frozenset(), False, False),
    (2, True, "", None, "here", 1, frozenset(), False, False),
    (2, True, "", 1, "here", 1, frozenset({1}), False, False),
]


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    return draw(
        st.lists(
            st.tuples(
                st.integers(0, 3),  # workers
                st.booleans(),  # the loader of this number of workers, which persist, or a new one
                st.sampled_from(["", "", "same", "next"]),  # set_epoch before the pass
                st.one_of(st.none(), st.integers(1, 4)),  # batches before the pass is left and resumed, if it is
                st.sampled_from(["here", "anew", "nowhere"]),  # load into this dataset, a new one, or do not
                st.integers(1, 3),  # ranks of the new one
                st.frozensets(st.integers(0, 2)),  # workers that begin late
                st.booleans(),  # the same seed for all loaders, as with manual_seed before each pass
                st.booleans(),  # late workers of the pass before, of which nothing was wanted, begin after this pass
            ),
            min_size=1,
            max_size=6,
        )
    )


# A loaded state, and two passes of two workers with the same seed; and one whose second worker begins after a load.
@example(
    [
        (0, False, "", 1, "here", 1, frozenset(), False, False),
        *[(2, False, "", None, "", 1, frozenset(), True, False)] * 2,
    ],
    9,
    2,
    1,
    False,
)
@example(
    [
        (2, False, "", 1, "here", 1, frozenset({1}), False, False),
        (1, False, "", None, "", 1, frozenset(), False, False),
    ],
    9,
    2,
    1,
    False,
)
# Of workers that persist, the second one begins its second pass after a load; then follows a whole pass, or a part.
@example([*_PERSISTENT_LATE, (0, False, "", None, "here", 1, frozenset(), False, False)], 1, 1, 1, False)
@example([*_PERSISTENT_LATE, (0, False, "", 1, "here", 1, frozenset(), False, False)], 2, 1, 1, False)
# And the first one begins its third pass before the second one has begun the second.
@example([*_PERSISTENT_LATE, (2, True, "", None, "here", 1, frozenset(), False, False)], 9, 1, 1, False)
@given(
    program=steps(),
    count=st.integers(0, 20),
    batch_size=st.integers(1, 3),
    world_size=st.integers(1, 3),
    shuffle=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_any_sequence_of_passes_gives_what_remains_and_then_whole_epochs(
    program: list[tuple[Any, ...]], count: int, batch_size: int, world_size: int, shuffle: bool
):
    def make(ranks: int) -> list[Numbers]:
        return [
            Numbers(count, rank=rank, world_size=ranks, batch_size=batch_size, shuffle=shuffle) for rank in range(ranks)
        ]

    def order(epoch: int) -> list[int]:
        whole = Numbers(count, rank=0, world_size=1, shuffle=shuffle)
        whole.set_epoch(epoch)
        return list(whole)

    def begin_the_rest(loaders: list[Loader]) -> None:
        for loader in loaders:
            loader.begin_the_rest()

    seeds = itertools.count(100)
    datasets, kept = make(world_size), dict[int, list[Loader]]()
    epoch = done = 0
    left: list[Loader] = []
    for workers, persistent, setting, leave, where, ranks, late, same_seed, afterwards in program:
        if setting:
            epoch += setting == "next"
            done = 0 if setting == "next" else done
            for dataset in datasets:
                dataset.set_epoch(epoch)
        seed = 7 if same_seed else next(seeds)
        loaders = kept.get(workers) if persistent else None
        if loaders is None:
            loaders = [Loader(dataset, batch_size, workers, seed, persistent) for dataset in datasets]
            if persistent:
                kept[workers] = loaders
        if left == loaders:  # these workers persist, and begin one pass after the other
            left = []
        # Passes of the same seed in one epoch cannot be told apart by a worker that is the first of its number. A loop
        # that is left waits for workers that do not persist: they end when they have begun.
        if not afterwards or {loader.seed for loader in left} & {loader.seed for loader in loaders}:
            begin_the_rest(left)
            left = []
        rest = order(epoch)[done:]
        steps_of_all = len(rest) // (len(datasets) * batch_size)
        passes = [loader.batches(late) for loader in loaders]
        if leave is None or leave > steps_of_all:
            by_rank = [join(batches) for batches in passes]
            found = [number for step in itertools.zip_longest(*by_rank) for number in step if number is not None]
            assert found == rest
            done = 0
            begin_the_rest(left)
            left = []
            continue
        by_rank = [join(itertools.islice(batches, leave)) for batches in passes]
        found = [number for step in zip(*by_rank, strict=True) for number in step]
        samples = leave * batch_size
        done += samples * len(datasets)
        assert found == rest[: samples * len(datasets)]
        begin_the_rest(left)
        states = [dataset.state_at(samples) for dataset in datasets]
        if workers:
            for dataset in datasets:
                with pytest.raises(ValueError, match="StatefulDataLoader"):
                    dataset.state_dict()
        else:
            assert [dataset.state_dict() for dataset in datasets] == states
        for one in states:  # one state serves all ranks
            assert one == {**states[0], "share": {**states[0]["share"], "rank": one["share"]["rank"]}}
        if where == "anew":
            datasets, kept = make(ranks), {}
        left = loaders
        if where == "nowhere":
            done = 0
            continue
        for dataset in datasets:
            dataset.load_state_dict(states[-1])


def test_set_epoch_after_a_pass_begins_also_the_epoch_of_a_loaded_state():
    dataset = Numbers(9, rank=0, world_size=1)
    dataset.load_state_dict(dataset.state_at(4))
    dataset.set_epoch(0)
    assert dataset.state_dict() == dataset.state_at(0) != Numbers(9, rank=0, world_size=1).state_dict()
    assert join(Loader(dataset, 1, 2, 5, False).batches()) == [4, 5, 6, 7, 8]
    assert dataset.state_at(5) == {**Numbers(9, rank=0, world_size=1).state_at(5), **dataset.state_at(5)}
    dataset.set_epoch(0)
    assert dataset.state_dict() == dataset.state_at(0) == Numbers(9, rank=0, world_size=1).state_dict()


def test_a_worker_that_goes_through_the_epochs_by_itself_does_not_disturb_the_others():
    """An IterableDataset around this one does that, if its `__iter__` never ends."""
    dataset = Numbers(12, rank=0, world_size=1, shuffle=True)
    dataset.set_epoch(1)
    dataset.load_state_dict(dataset.state_at(4))
    workers = [Worker(dataset, number, 2, 5) for number in range(2)]
    found: dict[int, list[int]] = {1: [], 2: []}
    for epoch, number in ((1, 0), (2, 0), (1, 1), (2, 1)):
        with workers[number].running():
            workers[number].dataset.set_epoch(epoch)
            found[epoch] += list(workers[number].dataset)
    whole = {}
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        whole[epoch] = list(dataset)
    assert sorted(found[1]) == sorted(whole[1][4:])
    assert sorted(found[2]) == sorted(whole[2])


def test_a_state_beyond_the_end_of_the_epoch():
    for world_size in (1, 2):
        dataset = Numbers(9, rank=0, world_size=world_size)
        dataset.load_state_dict(dataset.state_at(12))  # three batches of four
        assert list(dataset) == []
        assert list(dataset) == list(range(0, 9, world_size))


def test_an_invalid_state_is_refused():
    dataset = Numbers(9, rank=0, world_size=2)
    dataset.load_state_dict(dataset.state_at(3))
    with pytest.raises(ConfigurationError, match="must not be negative"):
        dataset.state_at(-1)
    before = dataset.state_dict()
    state = dataset.state_at(1)
    some_wrong: tuple[dict[str, Any], ...] = (
        {},
        {"_snapshot": {}},
        {**state, "share": None},
        {**state, "epoch": "x"},
        {**state, "share": {"a": 1}},
    )
    for wrong in some_wrong:
        with pytest.raises(ConfigurationError, match="not the state of a dataset"):
            dataset.load_state_dict(wrong)
    assert dataset.state_dict() == before


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("uneven", get_args(Uneven))
def test_an_epoch_goes_on_with_other_numbers_of_ranks_and_workers(before: int, after: int, uneven: Uneven):
    for count, batches in itertools.product((0, 7, 12), (0, 1, 2)):
        passes = []
        settings: dict[str, Any] = {"batch_size": 2, "uneven": uneven}
        for rank in range(before):
            dataset = Numbers(count, rank=rank, world_size=before, **settings)
            if len(dataset) < 2 * batches:
                break
            batch = itertools.islice(Loader(dataset, 2, 2, 1, False).batches(), batches)
            passes.append((join(batch), dataset.state_at(2 * batches)))
        else:
            found = [number for numbers, _ in passes for number in numbers]
            assert sorted(found) == sorted(number % count for number in range(len(found)))
            rest: list[int] = []
            for rank in range(after):
                dataset = Numbers(count, rank=rank, world_size=after, **settings)
                dataset.load_state_dict(passes[-1][1])
                rest += join(Loader(dataset, 2, 3, 1, False).batches())
                assert join(Loader(dataset, 2, 1, 2, False).batches()) == list(
                    Numbers(count, rank=rank, world_size=after, **settings)
                )
            left = max(count - len(found), 0)
            if uneven == "drop":
                assert sorted(rest) == list(range(len(found), len(found) + left // after * after))
            else:
                more = -left % after if uneven == "pad" else 0
                assert sorted(rest) == sorted([*range(len(found), count), *(n % count for n in range(more))])


# Real workers


@pytest.fixture(scope="module")
def listing(azurite: Azurite) -> BlobListing:
    url = azurite.create_container("datasets-resume")
    fill(url, numbered(COUNT))
    return BlobListing.from_container_url(url)


@pytest.fixture(scope="module")
def shards(azurite: Azurite) -> BlobListing:
    """Six tar files with four samples each."""
    url = azurite.create_container("datasets-resume-tar")
    fill(url, {f"{number}.tar": tar_of(shard(4 * number, 4, 1)) for number in range(6)})
    return BlobListing.from_container_url(url)


@pytest.mark.parametrize(
    "workers", [(2, 0, 2), (0, 2, 1), (1, 2, 2), (2, 3, 0), (3, 1, 3)], ids=lambda workers: "-".join(map(str, workers))
)
@pytest.mark.parametrize("again", [False, True])
def test_passes_with_other_numbers_of_workers(listing: BlobListing, workers: tuple[int, ...], again: bool):
    dataset = IterableBlobDataset(listing, transform=number_of, batch_size=4)
    dataset.load_state_dict(dataset.state_at(8))
    begin = 8
    for number in workers:
        torch.manual_seed(0)  # so the workers of all passes have the same seeds
        if again:
            dataset.set_epoch(0)
        loader = DataLoader(dataset, batch_size=4, num_workers=number, collate_fn=collate)
        assert join(loader) == list(range(begin, COUNT))
        begin = 0


def test_passes_with_workers_that_persist_and_others_in_turn(listing: BlobListing):
    dataset = IterableBlobDataset(listing, transform=number_of, batch_size=4)
    persistent = DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=collate)
    other = DataLoader(dataset, batch_size=4, num_workers=1, collate_fn=collate)
    for first, second in ((persistent, other), (other, persistent), (persistent, persistent)):
        source = iter(first)
        assert join(itertools.islice(source, 2)) == list(range(8))
        dataset.load_state_dict(dataset.state_at(8))
        assert join(second) == list(range(8, COUNT))
        assert join(first) == join(second) == list(range(COUNT))
        dataset.load_state_dict(dataset.state_at(COUNT))
        assert (join(first), join(second)) == ([], list(range(COUNT)))


class _Delayed(IterableDataset[Any]):
    """Delays a dataset: the second pass of worker 1 does not begin before `go` is set."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self._dataset = dataset
        self._passes = 0
        self.go = multiprocessing.Event()

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        self._passes += 1
        if info is not None and info.id == 1 and self._passes == 2:
            assert self.go.wait(60)
        return iter(self._dataset)


@pytest.mark.parametrize("change", ["load", "epoch"])
def test_a_worker_that_persists_may_begin_its_pass_after_the_next_one_was_prepared(listing: BlobListing, change: str):
    """A DataLoader waits until such workers know of the next pass, but not until they have begun it."""
    dataset = IterableBlobDataset(listing, transform=number_of, batch_size=4)
    delayed = _Delayed(dataset)
    loader = DataLoader(delayed, 4, num_workers=2, persistent_workers=True, collate_fn=collate)
    assert join(loader) == list(range(COUNT))
    dataset.load_state_dict(dataset.state_at(4))
    source = iter(loader)
    assert join(itertools.islice(source, 1)) == [4, 5, 6, 7]
    if change == "load":
        dataset.load_state_dict(dataset.state_at(4))
    else:
        dataset.set_epoch(1)
    delayed.go.set()
    assert join(source) == list(range(8, COUNT))
    assert list(dataset) == list(range(8 if change == "load" else 0, COUNT))
    assert list(dataset) == join(loader) == list(range(COUNT))


def test_spawned_workers_begin_at_the_state_of_their_start(listing: BlobListing):
    dataset = IterableBlobDataset(listing, transform=number_of, batch_size=4)
    dataset.load_state_dict(dataset.state_at(8))
    loader = DataLoader(dataset, 4, num_workers=2, multiprocessing_context="spawn", collate_fn=collate)
    source = iter(loader)
    dataset.load_state_dict({**dataset.state_at(0), "position": 12})  # before they have begun
    assert join(source) == list(range(8, COUNT))
    assert join(DataLoader(dataset, 4, num_workers=1, collate_fn=collate)) == list(range(20, COUNT))
    assert list(dataset) == list(range(COUNT))


@pytest.mark.parametrize("workers", [(2, 0), (0, 2), (1, 3), (2, 2)], ids=lambda workers: "-".join(map(str, workers)))
@pytest.mark.parametrize("taken", [4, 5])
def test_passes_of_tar_files_with_other_numbers_of_workers(shards: BlobListing, workers: tuple[int, ...], taken: int):
    def make() -> TarDataset[int]:
        return TarDataset(shards, transform=key)

    dataset = make()
    assert list(itertools.islice(iter(dataset), taken)) == list(range(taken))
    resumed = make()
    resumed.load_state_dict(dataset.state_dict())  # between two files, or in the middle of one
    first, second = (list(DataLoader(resumed, batch_size=None, num_workers=number)) for number in workers)
    assert sorted(first) == list(range(taken, COUNT))
    assert sorted(second) == list(range(COUNT))


@pytest.mark.parametrize("workers", [(2, 0), (0, 2)], ids=lambda workers: "-".join(map(str, workers)))
def test_passes_of_a_sampler_with_other_numbers_of_workers(listing: BlobListing, workers: tuple[int, ...]):
    dataset = BlobDataset(listing, transform=number_of)
    sampler = BlobSampler(dataset)
    sampler.load_state_dict(sampler.state_at(8))
    loaders = [DataLoader(dataset, 4, sampler=sampler, num_workers=number, collate_fn=collate) for number in workers]
    assert join(loaders[0]) == list(range(8, COUNT))
    source = iter(loaders[1])
    assert join(itertools.islice(source, 2)) == list(range(8))
    # In the pass after the resumed one, samples count from the beginning of the epoch.
    sampler.load_state_dict(sampler.state_at(8))
    assert join(loaders[0]) == list(range(8, COUNT))
    assert join(loaders[0]) == list(range(COUNT))


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("tar", [False, True])
def test_a_stateful_dataloader_in_turn_with_a_plain_one(
    listing: BlobListing, shards: BlobListing, workers: int, persistent: bool, tar: bool
):
    def make() -> tuple[StreamDataset[Any, int], StatefulDataLoader]:
        dataset: StreamDataset[Any, int] = (
            TarDataset(shards, transform=key)
            if tar
            else IterableBlobDataset(listing, transform=number_of, batch_size=4)
        )
        return dataset, StatefulDataLoader(
            dataset, batch_size=4, num_workers=workers, persistent_workers=persistent, collate_fn=collate
        )

    _, loader = make()
    source = iter(loader)
    first = [next(source) for _ in range(3)]
    state = loader.state_dict()
    for setting in (None, 0):
        dataset, loader = make()
        loader.load_state_dict(state)
        if setting is not None:
            dataset.set_epoch(setting)
        assert sorted(join(first) + join(loader)) == list(range(COUNT))
        for number in (1, 0, 3):
            if setting is not None:
                dataset.set_epoch(setting)
            assert sorted(join(DataLoader(dataset, 4, num_workers=number, collate_fn=collate))) == list(range(COUNT))
            assert sorted(join(loader)) == list(range(COUNT))
