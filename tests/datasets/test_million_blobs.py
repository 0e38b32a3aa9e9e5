"""The memory that a dataset of a million blobs needs when it is made, saved, loaded and pickled for workers."""

from __future__ import annotations

import itertools
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from azure_torch_ckpt.datasets import BlobDataset, BlobListing, BlobSampler, IterableBlobDataset

MILLION = 1_000_000
FOLDER = "https://account.blob.core.windows.net/data/train"
NAME = len("train/0000000.jpg")
EXPECTED = MILLION * (NAME + 24)


@dataclass
class Allocated:
    """Bytes that Python allocated in a block: those held at its end, and the peak.

    Pages of a mapped file do not count. The process' resident memory would count them, and also what the allocator
    happens to keep, so a test cannot assert on it.
    """

    held: int = 0
    peak: int = 0


@contextmanager
def allocations() -> Iterator[Allocated]:
    allocated = Allocated()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield allocated
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allocated.held, allocated.peak = held - before, peak - before


@dataclass
class Million:
    listing: BlobListing
    made: Allocated
    path: Path
    saved: Allocated


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Million]:
    path = tmp_path_factory.mktemp("million") / "listing"
    with allocations() as made:
        listing = BlobListing.from_blob_urls(f"{FOLDER}/{number:07}.jpg" for number in range(MILLION))
    with allocations() as saved:
        listing.save(path)
    yield Million(listing, made, path, saved)


def test_a_million_blobs_cost_their_names_and_24_bytes_each(million: Million):
    with allocations() as cost:
        dataset: BlobDataset[Any] = BlobDataset(million.listing)
        iterable: IterableBlobDataset[Any] = IterableBlobDataset(million.listing, shuffle=True)
        order = BlobSampler(dataset, shuffle=True)
        some = [dataset.listing[index] for index in itertools.islice(order, 1000)]
    assert len(dataset) == len(iterable) == len(order) == MILLION
    assert len({blob.location.path for blob in some}) == 1000
    # A growing array has room for an eighth more, and the complete names are copied once.
    assert EXPECTED <= million.made.held < 1.13 * EXPECTED
    assert million.made.peak < 2 * EXPECTED
    assert cost.peak < EXPECTED / 50


def test_a_listing_of_a_million_blobs_is_saved_and_mapped(million: Million):
    assert EXPECTED <= os.path.getsize(million.path) < EXPECTED + 4096
    assert million.saved.peak < 1_000_000  # the columns are written without a copy
    with allocations() as cost:
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
    assert cost.peak < 1_000_000
    indices = list(itertools.islice(BlobSampler(BlobDataset(loaded), shuffle=True), 1000))
    assert [loaded.name(index) for index in indices] == [million.listing.name(index) for index in indices]
