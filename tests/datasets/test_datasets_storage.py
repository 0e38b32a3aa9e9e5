"""Around the datasets: saved listings, the cache on disk."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import pickle
import stat
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import ContainerClient, ContainerSasPermissions, generate_container_sas
from torch.utils.data import DataLoader

from azure_torch_ckpt import BlobIO, LocationError
from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.datasets import BlobCache, BlobDataset, BlobListing, IterableBlobDataset
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.location import BlobLocation
from tests.datasets.datasets_support import fill, number_of, numbered
from tests.support.proxy import FaultProxy

# Listings


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


def test_blobs_that_mark_folders_are_no_samples_and_odd_names_are(container: str, azurite: Azurite, tmp_path: Path):
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
def test_a_name_that_nobody_can_read_is_refused_when_it_is_listed(container: str, name: str, azurite: Azurite):
    """And not in the middle of an epoch, where no on_error= would help."""
    fill(container, {"a/1.jpg": b"1"})
    location = BlobLocation.parse(container)
    client = ContainerClient(location.endpoint, location.container, azurite.account_key)
    client.upload_blob("x" * len(name), b"")

    def renamed(self: BlobStore, prefix: str) -> Iterator[BlobInfo]:
        for info in listed(self, prefix):
            yield info if "/" in info.path else dataclasses.replace(info, path=name)

    # Azurite, or a proxy before it, resolves such names; the service lists them.
    listed = BlobStore.list
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlobStore, "list", renamed)
        with pytest.raises(LocationError, match=r"has a blob that cannot be read.*leave it out with prefix=") as caught:
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
    # To a worker goes the path, and not the names.
    assert len(pickle.dumps(loaded)) < 700
    assert list(pickle.loads(pickle.dumps(loaded))) == list(listing)
    proxy.accept()
    dataset: IterableBlobDataset[int] = IterableBlobDataset(loaded, transform=number_of)
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context="spawn", batch_size=None)
    assert list(loader) == list(range(9))


def test_a_saved_listing_holds_urls_snapshots_and_containers_but_no_sas(tmp_path: Path):
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


def test_a_file_that_is_no_listing_or_not_complete_is_refused(tmp_path: Path):
    listing = BlobListing.from_blob_urls(f"https://account.blob.core.windows.net/data/{n}" for n in range(5))
    path = tmp_path / "listing"
    listing.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"x" * 200, whole[:-8], whole[:100], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"no listing|not complete"):
            BlobListing.load(path)
    assert os.listdir(tmp_path) == ["listing"]


def test_a_listing_that_is_replaced_does_not_reach_a_worker(tmp_path: Path):
    urls = [f"https://account.blob.core.windows.net/data/{n}" for n in range(5)]
    BlobListing.from_blob_urls(urls).save(tmp_path / "listing")
    loaded = BlobListing.load(tmp_path / "listing")
    pickled = pickle.dumps(loaded)
    BlobListing.from_blob_urls(urls[1:]).save(tmp_path / "listing")
    assert [str(blob.location) for blob in loaded] == urls
    with pytest.raises(ValueError, match="replaced by another listing"):
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


# The cache


def cached_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "total")


def test_a_second_epoch_comes_from_the_cache(proxied_container: str, proxy: FaultProxy, tmp_path: Path):
    fill(proxied_container, numbered(8))
    cache = BlobCache(tmp_path / "cache", 1_000_000)
    dataset = IterableBlobDataset.from_container_url(proxied_container, transform=number_of, cache=cache)
    assert list(dataset) == list(range(8))
    assert proxy.count("Get Blob") == 8
    assert list(dataset) == list(range(8))
    loader = DataLoader(dataset, num_workers=2, batch_size=None)
    assert list(loader) == list(range(8))
    assert proxy.count("Get Blob", "Head") == 8
    # A listing of now knows that a blob was replaced.
    fill(proxied_container, {"data/003.txt": b"33"})
    dataset = IterableBlobDataset.from_container_url(proxied_container, transform=number_of, cache=cache)
    assert list(dataset) == [0, 1, 2, 33, 4, 5, 6, 7]
    assert proxy.count("Get Blob", "Head") == 9


def test_a_blob_of_which_only_the_url_is_known_is_looked_at(container: str, tmp_path: Path):
    fill(container, {"blob": b"1"})
    cache = BlobCache(tmp_path, 1_000_000)
    dataset = BlobDataset.from_blob_urls(container + "/blob", transform=number_of, cache=cache)
    assert dataset[0] == dataset[0] == 1
    fill(container, {"blob": b"2"})
    assert dataset[0] == 2


def test_a_damaged_file_is_fetched_again(tmp_path: Path):
    cache = BlobCache(tmp_path, 1_000_000)
    for damage in (b"", b"short", b"x" * 100):
        cache.put("url", "etag", b"content")
        assert cache.get("url", "etag") == b"content"
        (file,) = cached_files(tmp_path)
        file.write_bytes(damage)
        assert cache.get("url", "etag") is None
    assert cache.get("url", "another") is None


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path: Path):
    cache = BlobCache(tmp_path, 16_000)
    for number in range(100):
        cache.put(str(number), "etag", bytes(492))  # 500 with its checksum
        # Not the clock's resolution, but this order decides what was used last.
        for file in cached_files(tmp_path):
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 1))
        assert cache.get("0", "etag") == bytes(492)
        assert sum(file.stat().st_size for file in cached_files(tmp_path)) <= 16_000
    assert cache.get("99", "etag") is not None
    assert cache.get("1", "etag") is None
    cache.put("large", "etag", bytes(1_000))
    assert cache.get("large", "etag") is None


def test_what_crashed_processes_left_behind_is_removed(tmp_path: Path):
    cache = BlobCache(tmp_path, 16_000)
    cache.put("0", "etag", bytes(100))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    # The second name is one of earlier versions.
    for name in (".abandoned.0123456789abcdef.part", ".new-abandoned"):
        (folder / name).write_bytes(bytes(100))
    with AtomicFile(folder / "being written") as new:
        new.file.write(bytes(100))
        for number in range(20):
            cache.put(str(number), "etag", bytes(900))
        (left,) = folder.glob(".*")
        assert left.name.startswith(".being written")
        new.publish()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_for_others_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        BlobListing.from_blob_urls(["https://account.blob.core.windows.net/data/1"]).save(tmp_path / "listing")
        BlobCache(tmp_path / "cache", 1_000_000).put("url", "etag", b"content")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [mode] * 3


def fill_cache(folder: Path, start: Any, first: int) -> None:
    cache = BlobCache(folder, 100_000)
    start.wait()
    for number in itertools.chain(range(first, 200), range(first)):
        data = number.to_bytes(2, "big") * 500
        found = cache.get(str(number), "etag")
        assert found is None or found == data
        cache.put(str(number), "etag", data)


def test_processes_fill_a_cache_at_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    children = [context.Process(target=fill_cache, args=(tmp_path, start, first)) for first in (0, 0, 100)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    files = cached_files(tmp_path)
    total = sum(file.stat().st_size for file in files)
    assert 50_000 < total <= 100_000
    assert int((tmp_path / "total").read_text()) == total


def test_a_disk_that_takes_nothing_costs_the_cache_and_not_the_epoch(container: str, tmp_path: Path):
    fill(container, numbered(2))
    (tmp_path / "file").write_bytes(b"")
    cache = BlobCache(tmp_path / "file" / "below", 1_000_000)
    assert list(IterableBlobDataset.from_container_url(container, transform=number_of, cache=cache)) == [0, 1]
