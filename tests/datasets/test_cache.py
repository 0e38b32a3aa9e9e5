"""`BlobCache`: hits, eviction, damage, several processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt.datasets import BlobCache, BlobDataset, BlobListing, IterableBlobDataset
from tests.datasets.sample_blobs import fill, number_of, numbered
from tests.support.proxy import FaultProxy


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
    # A new listing has the ETag of the replaced blob.
    fill(proxied_container, {"data/003.txt": b"33"})
    dataset = IterableBlobDataset.from_container_url(proxied_container, transform=number_of, cache=cache)
    assert list(dataset) == [0, 1, 2, 33, 4, 5, 6, 7]
    assert proxy.count("Get Blob", "Head") == 9


def test_a_blob_without_a_listed_etag_is_revalidated(container: str, tmp_path: Path):
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


def test_the_cache_stays_within_its_bound_and_keeps_the_most_recently_used_blobs(tmp_path: Path):
    cache = BlobCache(tmp_path, 16_000)
    for number in range(100):
        cache.put(str(number), "etag", bytes(492))  # 500 with its checksum
        # Shift the times, so that the clock's resolution does not decide which file was used last.
        for file in cached_files(tmp_path):
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 1))
        assert cache.get("0", "etag") == bytes(492)
        assert sum(file.stat().st_size for file in cached_files(tmp_path)) <= 16_000
    assert cache.get("99", "etag") is not None
    assert cache.get("1", "etag") is None
    cache.put("large", "etag", bytes(1_000))
    assert cache.get("large", "etag") is None


def test_files_of_crashed_processes_are_removed(tmp_path: Path):
    cache = BlobCache(tmp_path, 16_000)
    cache.put("0", "etag", bytes(100))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    # Earlier versions used the second name.
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
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int):
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
        cached = cache.get(str(number), "etag")
        assert cached is None or cached == data
        cache.put(str(number), "etag", data)


def test_processes_fill_a_cache_at_the_same_time(tmp_path: Path):
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


def test_an_unusable_disk_does_not_fail_the_epoch(container: str, tmp_path: Path):
    fill(container, numbered(2))
    (tmp_path / "file").write_bytes(b"")
    cache = BlobCache(tmp_path / "file" / "below", 1_000_000)
    assert list(IterableBlobDataset.from_container_url(container, transform=number_of, cache=cache)) == [0, 1]
