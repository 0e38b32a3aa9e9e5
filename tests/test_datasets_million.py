"""A dataset of a million blobs: what it costs in memory and time, made, saved, loaded and handed to workers."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from azure_torch_ckpt.datasets import BlobDataset, BlobListing, BlobSampler, IterableBlobDataset
from tests.datasets_support import resident

MILLION = 1_000_000
FOLDER = "https://account.blob.core.windows.net/data/train"
NAME = len("train/0000000.jpg")
# What it is on a quiet machine is said beside each; a busy one may take so many times as long.
BUSY = 10


@dataclass
class Cost:
    seconds: float = 0.0
    resident: int = 0


class Measured:
    """Seconds and bytes of resident memory that the block took. What freed memory is used again does not count."""

    def __enter__(self) -> Cost:
        self._cost = Cost()
        self._started, self._before = time.perf_counter(), resident()
        return self._cost

    def __exit__(self, *_: object) -> None:
        self._cost.seconds, self._cost.resident = time.perf_counter() - self._started, resident() - self._before


@dataclass
class Million:
    listing: BlobListing
    made: Cost
    path: Path
    saved: Cost


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Million]:
    path = tmp_path_factory.mktemp("million") / "listing"
    with Measured() as made:
        listing = BlobListing.from_blob_urls(f"{FOLDER}/{number:07}.jpg" for number in range(MILLION))
    with Measured() as saved:
        listing.save(path)
    yield Million(listing, made, path, saved)


def test_a_million_blobs_cost_their_names_and_24_bytes_each(million: Million):
    with Measured() as cost:
        dataset: BlobDataset[Any] = BlobDataset(million.listing)
        iterable: IterableBlobDataset[Any] = IterableBlobDataset(million.listing, shuffle=True)
        order = BlobSampler(dataset, shuffle=True)
        some = [dataset.listing[index] for index in itertools.islice(order, 1000)]
    assert len(dataset) == len(iterable) == len(order) == MILLION
    assert len({blob.location.path for blob in some}) == 1000
    # An array that grows has room for an eighth more, and the names are copied once when all are there.
    expected = MILLION * (NAME + 24)
    assert million.made.resident < 1.5 * expected
    assert cost.resident < expected / 10
    assert million.made.seconds < 4 * BUSY
    assert cost.seconds < 0.1 * BUSY


def test_a_listing_of_a_million_blobs_is_saved_and_mapped(million: Million):
    assert MILLION * (NAME + 24) <= os.path.getsize(million.path) < MILLION * (NAME + 24) + 4096
    assert million.saved.resident < 4_000_000  # nothing is copied to be written
    assert million.saved.seconds < 0.2 * BUSY
    with Measured() as cost:
        loaded = BlobListing.load(million.path)
        assert len(loaded) == MILLION
        assert loaded.fingerprint == million.listing.fingerprint
        assert loaded[0].location.path == "train/0000000.jpg"
        assert str(loaded[MILLION - 1].location) == f"{FOLDER}/0999999.jpg"
        dataset: IterableBlobDataset[Any] = IterableBlobDataset(loaded, shuffle=True)
        pickled = pickle.dumps(dataset)
    # A worker gets the path, and maps the file itself.
    assert len(pickled) < 20_000
    assert len(pickle.loads(pickled)) == MILLION
    assert cost.resident < 4_000_000
    assert cost.seconds < 0.01 * BUSY
    indices = list(itertools.islice(BlobSampler(BlobDataset(loaded), shuffle=True), 1000))
    assert [loaded.name(index) for index in indices] == [million.listing.name(index) for index in indices]
