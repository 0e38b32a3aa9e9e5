"""`BlobListing`: listed, filtered, saved, loaded, pickled, and the memory that a million blobs need."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import ContainerClient, ContainerSasPermissions, generate_container_sas
from torch.utils.data import DataLoader

from azure_torch_ckpt import BlobIO, LocationError
from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.datasets import BlobDataset, BlobListing, BlobSampler, IterableBlobDataset
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.location import BlobLocation
from tests.datasets.sample_blobs import fill, number_of, numbered
from tests.support.proxy import FaultProxy


def test_a_listing_is_filtered(container: str):
    fill(container, {name: b"1" for name in ("a/1.jpg", "a/1.txt", "a/b/2.jpeg", "b/3.jpg", "ab.jpg")})

    def names(url: str = container, **filters: Any) -> list[str]:
        listing = BlobListing.from_container_url(url, **filters)
        return [listing.name(index) for index in range(len(listing))]

    assert names() == ["a/1.jpg", "a/1.txt", "a/b/2.jpeg", "ab.jpg", "b/3.jpg"]
    assert names(suffix=(".jpg", ".jpeg"), prefix="a/") == ["a/1.jpg", "a/b/2.jpeg"]
    assert names(glob="a*.jp*g") == ["a/1.jpg", "a/b/2.jpeg", "ab.jpg"]
    assert names(glob="?/[12]*", suffix=".txt") == ["a/1.txt"]
    assert names(container + "/a") == ["a/1.jpg", "a/1.txt", "a/b/2.jpeg"]
    assert names(container + "/a", prefix="b") == ["a/b/2.jpeg"]


def test_blobs_that_mark_folders_are_left_out_and_odd_names_are_not(container: str, azurite: Azurite, tmp_path: Path):
    location = BlobLocation.parse(container)
    client = ContainerClient(location.endpoint, location.container, azurite.account_key)
    for name, metadata in (("a", {"hdi_isfolder": "true"}), ("b", {"Hdi_isFolder": "True"}), ("c/", {}), ("a/d//", {})):
        client.upload_blob(name, b"", metadata=metadata)
    samples = {"a//b": b"1", "/a": b"2", "c/e": b"3", "full/": b"4", "empty": b"", "f": b""}
    for name, data in samples.items():
        client.upload_blob(name, data, metadata={"hdi_isfolder": "false"})
    for dataset in (
        IterableBlobDataset[dict[str, Any]].from_container_url(container),
        IterableBlobDataset[dict[str, Any]].from_blob_urls([f"{container}/{name}" for name in samples]),
    ):
        found = {sample["url"].removeprefix(f"{container}/"): sample["data"] for sample in dataset}
        assert found == samples
        dataset.listing.save(tmp_path / "listing")
        assert list(BlobListing.load(tmp_path / "listing")) == list(dataset.listing)


@pytest.mark.parametrize("name", ["a/../b", "a/./b", "a\tb", "a?sig=secret"])
def test_an_unreadable_name_is_refused_when_it_is_listed(container: str, name: str, azurite: Azurite):
    """Otherwise it would fail in the middle of an epoch, where on_error= would not help."""
    fill(container, {"a/1.jpg": b"1"})
    location = BlobLocation.parse(container)
    client = ContainerClient(location.endpoint, location.container, azurite.account_key)
    client.upload_blob("x" * len(name), b"")

    def renamed(self: BlobStore, prefix: str) -> Iterator[BlobInfo]:
        for info in listed(self, prefix):
            yield info if "/" in info.path else dataclasses.replace(info, path=name)

    # Azurite, or a proxy in front of it, resolves such names. The service lists them.
    listed = BlobStore.list
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlobStore, "list", renamed)
        with pytest.raises(LocationError, match=r"cannot be read.*with prefix=") as caught:
            BlobListing.from_container_url(container)
        assert "secret" not in str(caught.value)
        assert len(BlobListing.from_container_url(container, suffix=".jpg")) == 1


def test_a_listing_knows_sizes_and_etags(container: str):
    fill(container, {"ü": b"123", "z": b""})
    listing = BlobListing.from_container_url(container)
    assert [blob.size for blob in listing] == [0, 3]
    for blob in listing:
        with BlobIO(blob.location, "rb") as file:
            assert blob.etag == file.etag


def test_a_saved_listing_is_loaded_without_a_request(proxied_container: str, proxy: FaultProxy, tmp_path: Path):
    fill(proxied_container, numbered(9))
    listing = BlobListing.from_container_url(proxied_container)
    listing.save(tmp_path / "listing")
    proxy.refuse()
    loaded = BlobListing.load(tmp_path / "listing")
    assert list(loaded) == list(listing)
    assert loaded.fingerprint == listing.fingerprint
    # A worker gets the path, not the names.
    assert len(pickle.dumps(loaded)) < 700
    assert list(pickle.loads(pickle.dumps(loaded))) == list(listing)
    proxy.accept()
    dataset: IterableBlobDataset[int] = IterableBlobDataset(loaded, transform=number_of)
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context="spawn", batch_size=None)
    assert list(loader) == list(range(9))


def test_a_saved_listing_has_urls_snapshots_and_containers_but_no_sas(tmp_path: Path):
    base = "https://account.blob.core.windows.net"
    urls = [f"{base}/one/a?sig=secret", f"{base}/two/b", f"{base}/one/c?snapshot=2026-01-31T12:00:00.1234567Z"]
    listing = BlobListing.from_blob_urls(urls)
    assert [blob.location.sas for blob in listing] == ["sig=secret", None, None]
    assert [blob.location.sas for blob in pickle.loads(pickle.dumps(listing))] == ["sig=secret", None, None]
    listing.save(tmp_path / "listing")
    assert b"secret" not in (tmp_path / "listing").read_bytes()
    assert "secret" not in repr(listing)
    loaded = BlobListing.load(tmp_path / "listing")
    assert [str(blob.location) for blob in loaded] == [f"{base}/one/a", *urls[1:]]
    assert [(blob.size, blob.etag) for blob in loaded] == [(None, None)] * 3
    empty = BlobListing.from_blob_urls([])
    empty.save(tmp_path / "empty")
    assert len(BlobListing.load(tmp_path / "empty")) == 0


def test_a_file_that_is_not_a_complete_listing_is_refused(tmp_path: Path):
    listing = BlobListing.from_blob_urls(f"https://account.blob.core.windows.net/data/{n}" for n in range(5))
    path = tmp_path / "listing"
    listing.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"x" * 200, whole[:-8], whole[:100], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not a listing|incomplete"):
            BlobListing.load(path)
    assert os.listdir(tmp_path) == ["listing"]


def test_a_listing_that_is_replaced_does_not_reach_a_worker(tmp_path: Path):
    urls = [f"https://account.blob.core.windows.net/data/{n}" for n in range(5)]
    BlobListing.from_blob_urls(urls).save(tmp_path / "listing")
    loaded = BlobListing.load(tmp_path / "listing")
    pickled = pickle.dumps(loaded)
    BlobListing.from_blob_urls(urls[1:]).save(tmp_path / "listing")
    assert [str(blob.location) for blob in loaded] == urls
    with pytest.raises(ValueError, match="replaced"):
        pickle.loads(pickled)


def test_a_sas_in_the_url_is_used_for_listing_and_reading(container: str, azurite: Azurite):
    fill(container, numbered(3))
    location = BlobLocation.parse(container)
    sas = generate_container_sas(
        location.account,
        location.container,
        account_key=azurite.account_key,
        permission=ContainerSasPermissions(read=True, list=True),
        expiry=datetime.now(timezone.utc) + timedelta(hours=1),
    )
    dataset: BlobDataset[Any] = BlobDataset.from_container_url(f"{container}?{sas}", credential=False)
    assert [dataset[index]["data"] for index in range(3)] == [b"0", b"1", b"2"]
    assert "sig" not in dataset[0]["url"]


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
