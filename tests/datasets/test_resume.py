"""Passes of real workers, before and after a state is loaded; test_epoch_state.py tries more sequences of passes."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from azure_torch_ckpt.datasets import BlobDataset, BlobListing, BlobSampler, IterableBlobDataset, TarDataset
from azure_torch_ckpt.datasets.base import StreamDataset
from azure_torch_ckpt.emulator import Azurite
from tests.datasets.sample_blobs import collate, fill, join, key, number_of, numbered, shard, tar_of

COUNT = 24


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


@pytest.mark.parametrize("tar", [False, True])
def test_a_dataset_is_saved_and_loaded_with_a_checkpoint(
    listing: BlobListing, shards: BlobListing, container: str, tar: bool
):
    def make() -> StreamDataset[Any, int]:
        if tar:
            return TarDataset(shards, transform=key, shuffle=True, shuffle_buffer=10, seed=8)
        return IterableBlobDataset(listing, transform=number_of, shuffle=True, seed=8)

    dataset = make()
    dataset.set_epoch(2)
    source = iter(dataset)
    first = [next(source) for _ in range(13)]
    dcp.save({"data": dataset}, storage_writer=AzureBlobWriter(container + "/checkpoint"), no_dist=True)
    rest = list(source)
    resumed = make()
    dcp.load({"data": resumed}, storage_reader=AzureBlobReader(container + "/checkpoint"), no_dist=True)
    resumed.set_epoch(2)
    assert list(resumed) == rest
    assert sorted(first + rest) == list(range(COUNT))
