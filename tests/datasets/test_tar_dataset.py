"""`TarDataset`: samples and members of tar files, over ranks and workers, shuffled, resumed."""

from __future__ import annotations

import itertools
import pickle
import tarfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import azure_torch_ckpt.datasets.epoch_state
from azure_torch_ckpt.datasets import BlobListing, TarDataset
from azure_torch_ckpt.datasets.epoch_state import StreamPosition
from azure_torch_ckpt.datasets.order import Permutation
from azure_torch_ckpt.datasets.tar_dataset import shuffled
from azure_torch_ckpt.emulator import Azurite
from tests.datasets.sample_blobs import collate, fill, join, key, shard, tar_of
from tests.support.ranks import Ranks


def order(count: int, begin: tuple[int, int]) -> Permutation:
    return Permutation(count, 7, *begin)


class Shards:
    """Yields samples ``(shard, number)`` and counts them. A broken shard ends with a None.

    Args:
        counts: samples of each shard.
        broken: shards whose rest cannot be read.
    """

    def __init__(self, counts: list[int], broken: frozenset[int] = frozenset()) -> None:
        self.counts = counts
        self.broken = broken
        self.read = 0

    def begin(self, place: StreamPosition) -> Iterator[tuple[tuple[int, int] | None, tuple[int, int]]]:
        first = place.offset
        for index in range(place.position, len(self.counts)):
            for number in range(first, self.counts[index]):
                self.read += 1
                yield (index, number), (index, number + 1)
            first = 0
            if index in self.broken:
                yield None, (index + 1, 0)

    def all(self) -> list[tuple[int, int]]:
        return [(shard, number) for shard, count in enumerate(self.counts) for number in range(count)]


some_shards = st.lists(st.integers(0, 6), max_size=6)


@given(counts=some_shards, size=st.integers(1, 9), broken=st.frozensets(st.integers(0, 5)))
@settings(max_examples=200, deadline=None)
def test_a_pass_is_resumed_after_every_sample(counts: list[int], size: int, broken: frozenset[int]):
    source = Shards(counts, broken)
    given_out = list(shuffled(source.begin(StreamPosition(0)), size, StreamPosition(0), order))
    samples = [sample for sample, _ in given_out]
    assert sorted(samples) == source.all()
    for done, (_, place) in enumerate(given_out, 1):
        again = Shards(counts, broken)
        rest = [sample for sample, _ in shuffled(again.begin(place), size, place, order)]
        assert rest == samples[done:]
        # A resumed pass reads the block again, and the samples that the buffer has taken since.
        assert again.read <= len(samples) - done + size


@given(counts=some_shards, size=st.integers(1, 9), broken=st.frozensets(st.integers(0, 5), min_size=1))
@settings(max_examples=100, deadline=None)
def test_a_shard_that_can_be_read_again_costs_and_repeats_no_sample(
    counts: list[int], size: int, broken: frozenset[int]
):
    # The broken shards have two samples more, which only a later pass can read.
    healed = [count + 2 * (shard in broken) for shard, count in enumerate(counts)]
    given_out = list(shuffled(Shards(counts, broken).begin(StreamPosition(0)), size, StreamPosition(0), order))
    samples = [sample for sample, _ in given_out]
    for done, (_, place) in enumerate(given_out, 1):
        rest = [sample for sample, _ in shuffled(Shards(healed).begin(place), size, place, order)]
        assert len(set(rest)) == len(rest) and not set(rest) & set(samples[:done])
        assert set(rest) >= set(samples[done:])


@given(counts=some_shards, size=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_the_buffer_holds_no_more_than_its_size(counts: list[int], size: int):
    source = Shards(counts)
    expected = source.all()
    for done, (sample, _) in enumerate(shuffled(source.begin(StreamPosition(0)), size, StreamPosition(0), order)):
        assert source.read - done <= size
        assert abs(expected.index(sample) - done) < size
    assert size > 1 or expected == [
        sample for sample, _ in shuffled(source.begin(StreamPosition(0)), 1, StreamPosition(0), order)
    ]


def test_a_buffer_of_a_thousand_samples_shuffles():
    source = Shards([5_000] * 2)
    found = [
        shard * 5_000 + number
        for (shard, number), _ in shuffled(source.begin(StreamPosition(0)), 1000, StreamPosition(0), order)
    ]
    distances = [abs(number - position) for position, number in enumerate(found)]
    # In a random order of a thousand, a sample is a third of them away from its place: 333, with a deviation of some 3.
    assert 320 < sum(distances) / len(distances) < 347


COUNT = 35


@pytest.fixture(scope="module")
def shards(azurite: Azurite) -> str:
    """Five tar files with seven samples each, of all formats, one of them compressed."""
    url = azurite.create_container("datasets-shards")
    forms = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
    blobs = {f"train-{n}.tar": tar_of(shard(7 * n, 7), form=form) for n, form in enumerate(forms)}
    fill(url, {**blobs, "train-4.tar.gz": tar_of(shard(28, 7), "w:gz"), "readme.txt": b"not a tar file"})
    return url


@pytest.fixture(scope="module")
def listing(shards: str) -> BlobListing:
    return BlobListing.from_container_url(shards, glob="*.tar*")


def test_samples_of_tar_files(shards: str, container: str):
    assert list(TarDataset.from_container_url(shards, transform=key)) == list(range(COUNT))
    files = {"./a/0001.jpg": b"1", "./a/0001.seg.png": b"2", "./a/0002.jpg": b"", "no-extension": b"3", "./b/.x": b"4"}
    fill(container, {"odd.tar": tar_of(files)})
    odd: TarDataset[dict[str, Any]] = TarDataset.from_blob_urls(container + "/odd.tar")
    first, second = odd
    assert first == {"__key__": "./a/0001", "__url__": container + "/odd.tar", "jpg": b"1", "seg.png": b"2"}
    assert second == {"__key__": "./a/0002", "__url__": container + "/odd.tar", "jpg": b""}


def test_members_of_tar_files(container: str):
    files = {"./a/0001.jpg": b"1", "./a/0001.seg.png": b"2", "no-extension": b"3" * 512, "empty": b"", "./b/.x": b"4"}
    fill(container, {"odd.tar": tar_of(files), "odd.tgz": tar_of(files, "w:gz")})
    expected = [
        {"url": f"{container}/{tar}", "name": name, "data": data}
        for tar in ("odd.tar", "odd.tgz")
        for name, data in files.items()
    ]
    dataset: TarDataset[dict[str, Any]] = TarDataset.from_container_url(container, group=False)
    assert list(dataset) == expected
    source = iter(dataset)
    first = [next(source) for _ in range(7)]
    resumed: TarDataset[dict[str, Any]] = TarDataset.from_container_url(container, group=False)
    resumed.load_state_dict(dataset.state_dict())
    assert first + list(resumed) == expected


def test_an_empty_tar_file_has_no_samples(container: str):
    fill(container, {"0.tar": tar_of({}), "1.tar": tar_of(shard(0, 2)), "2.tar.gz": tar_of({}, "w:gz")})
    assert list(TarDataset.from_container_url(container, transform=key)) == [0, 1]
    assert list(TarDataset.from_container_url(container, prefix="nothing", shuffle_buffer=5)) == []


# Workers and ranks


@pytest.mark.parametrize(
    ("workers", "method", "buffer"),
    [(0, None, 0), (0, None, 10), (1, "fork", 10), (4, "fork", 0), (4, "fork", 10), (1, "spawn", 10)],
)
def test_ranks_and_workers_share_tar_files(listing: BlobListing, workers: int, method: str | None, buffer: int):
    for world_size in (1, 2, 3) if method != "spawn" else (2,):  # each start of a spawned worker costs seconds
        found: list[int] = []
        for rank in range(world_size):
            dataset = TarDataset(
                listing, transform=key, shuffle=True, shuffle_buffer=buffer, rank=rank, world_size=world_size
            )
            loader = DataLoader(dataset, num_workers=workers, batch_size=None, multiprocessing_context=method)
            of_rank = list(loader)
            assert workers > 1 or of_rank == list(dataset)
            found += of_rank
        assert sorted(found) == list(range(COUNT))


def read_on_rank(url: str) -> list[int]:
    return list(TarDataset.from_container_url(url, transform=key, shuffle=True, shuffle_buffer=5))


def test_ranks_under_torchrun_share_tar_files(shards: str, ranks: Ranks):
    by_rank = ranks(2).run(read_on_rank, shards)
    assert sorted(join(by_rank)) == list(range(COUNT))
    assert sorted(len(part) for part in by_rank) == [14, 21]


# Shuffling and resuming


def test_samples_are_shuffled_within_a_buffer_by_seed_and_epoch(listing: BlobListing):
    def order(buffer: int, seed: int = 0, epoch: int = 0) -> list[int]:
        dataset = TarDataset(listing, transform=key, shuffle_buffer=buffer, seed=seed)
        dataset.set_epoch(epoch)
        return list(dataset)

    assert order(0) == order(1) == list(range(COUNT))
    orders = [order(10, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(one) for one in orders}) == 9
    assert order(10, 1, 2) == orders[5]
    for one in orders:
        assert sorted(one) == list(range(COUNT))
        assert all(sorted(one[start : start + 10])[0] == start for start in (0, 10, 20, 30))
    with pytest.raises(ValueError, match="shuffle_buffer must not be negative"):
        order(-1)


@pytest.mark.parametrize(("buffer", "step"), [(0, 5), (10, 1), (100, 5)])
def test_a_tar_dataset_is_resumed_after_any_sample(listing: BlobListing, buffer: int, step: int):
    def make() -> TarDataset[int]:
        return TarDataset(listing, transform=key, shuffle=True, shuffle_buffer=buffer, seed=2)

    dataset = make()
    whole = list(dataset)
    assert sorted(whole) == list(range(COUNT))
    source = iter(dataset)
    for done in range(0, COUNT + 1, step):
        resumed = make()
        resumed.load_state_dict(pickle.loads(pickle.dumps(dataset.state_dict())))
        assert list(resumed) == whole[done:]
        assert list(resumed) == whole  # a state is for one pass
        assert list(itertools.islice(source, step)) == whole[done : done + step]


@pytest.mark.parametrize("buffer", [0, 4])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_stateful_dataloader_resumes_a_tar_dataset(listing: BlobListing, workers: int, buffer: int):
    def make(rank: int) -> StatefulDataLoader:
        dataset = TarDataset(listing, transform=key, shuffle=True, shuffle_buffer=buffer, rank=rank, world_size=2)
        return StatefulDataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate)

    found: list[int] = []
    for rank in (0, 1):
        loader = make(rank)
        whole = list(loader)
        source = iter(loader)
        first = [next(source) for _ in range(3)]
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        loader = make(rank)
        loader.load_state_dict(state)
        assert first + list(loader) == whole
        found += join(whole)
    assert sorted(found) == list(range(COUNT))


def test_a_state_inside_a_tar_file_is_for_its_rank(listing: BlobListing):
    def make(rank: int) -> TarDataset[int]:
        return TarDataset(listing, transform=key, rank=rank, world_size=2)

    dataset = make(0)
    next(iter(dataset))
    with pytest.raises(ValueError, match="key of its own"):
        make(1).load_state_dict(dataset.state_dict())


def test_a_state_inside_the_buffer_is_refused_by_several_workers(listing: BlobListing, monkeypatch: pytest.MonkeyPatch):
    def make(buffer: int) -> TarDataset[int]:
        return TarDataset(listing, transform=key, shuffle_buffer=buffer)

    for buffer, workers in ((10, 1), (0, 2)):
        dataset = make(buffer)
        source = iter(dataset)
        first = [next(source) for _ in range(3)]
        resumed = make(buffer)
        resumed.load_state_dict(dataset.state_dict())
        rest = list(DataLoader(resumed, num_workers=workers, batch_size=None))
        assert sorted(first + rest) == list(range(COUNT))
        assert workers == 2 or rest == list(source)
    resumed, dataset = make(10), make(10)
    next(iter(dataset))
    resumed.load_state_dict(dataset.state_dict())
    # Without real workers: a DataLoader waits 5 seconds for each one whose dataset has failed.
    worker = SimpleNamespace(id=1, num_workers=2, seed=8)
    monkeypatch.setattr(azure_torch_ckpt.datasets.epoch_state, "get_worker_info", lambda: worker)
    with pytest.raises(ValueError, match="num_workers=0 or 1"):
        iter(resumed)
