"""Around the datasets: saved listings, the cache on disk, tar files."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from azure_torch_ckpt import BlobIO
from azure_torch_ckpt.datasets import BlobCache, BlobDataset, BlobListing, IterableBlobDataset, TarDataset
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.location import BlobLocation
from tests.datasets_support import collate, fill, number_of, numbered
from tests.proxy import FaultProxy

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
    for name, age in ((".new-old", 7200), (".new-young", 0)):
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (folder.stat().st_mtime - age,) * 2)
    for number in range(20):
        cache.put(str(number), "etag", bytes(900))
    assert [path.name for path in folder.glob(".new-*")] == [".new-young"]


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


# Tar files


def tar_of(files: dict[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode, format=form) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def shard(first: int, count: int) -> dict[str, bytes]:
    # Names of more than 100 characters have a header of their own in front.
    return {
        f"{'long/' * 25 if number % 3 == 0 else ''}{number:04}.{extension}": str(number).encode() * 400
        for number in range(first, first + count)
        for extension in ("jpg", "cls.TXT")
    }


def key(sample: dict[str, Any]) -> int:
    assert set(sample) == {"__key__", "__url__", "jpg", "cls.txt"}
    number = int(sample["__key__"].rpartition("/")[2])
    assert sample["jpg"] == sample["cls.txt"] == str(number).encode() * 400
    return number


@pytest.fixture(scope="module")
def shards(azurite: Azurite) -> str:
    """Five tar files with seven samples each, of all formats, one of them compressed."""
    url = azurite.create_container("datasets-shards")
    forms = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
    blobs = {f"train-{n}.tar": tar_of(shard(7 * n, 7), form=form) for n, form in enumerate(forms)}
    fill(url, {**blobs, "train-4.tar.gz": tar_of(shard(28, 7), "w:gz"), "readme.txt": b"not a tar file"})
    return url


def test_samples_of_tar_files(shards: str, container: str):
    assert list(TarDataset.from_container_url(shards, transform=key)) == list(range(35))
    files = {"./a/0001.jpg": b"1", "./a/0001.seg.png": b"2", "./a/0002.jpg": b"", "no-extension": b"3", "./b/.x": b"4"}
    fill(container, {"odd.tar": tar_of(files)})
    odd: TarDataset[dict[str, Any]] = TarDataset.from_blob_urls(container + "/odd.tar")
    first, second = odd
    assert first == {"__key__": "./a/0001", "__url__": container + "/odd.tar", "jpg": b"1", "seg.png": b"2"}
    assert second == {"__key__": "./a/0002", "__url__": container + "/odd.tar", "jpg": b""}


def test_ranks_and_workers_share_tar_files(shards: str):
    for world_size in (1, 2, 3):
        found: list[int] = []
        for rank in range(world_size):
            dataset = TarDataset.from_container_url(
                shards, transform=key, shuffle=True, rank=rank, world_size=world_size
            )
            found += DataLoader(dataset, num_workers=2 * (world_size == 2), batch_size=None)
        assert sorted(found) == list(range(35))


@pytest.mark.parametrize("done", range(0, 36, 5))
def test_a_tar_dataset_is_resumed_inside_of_a_file(shards: str, done: int):
    def make() -> TarDataset[int]:
        return TarDataset.from_container_url(shards, transform=key, shuffle=True, seed=2)

    dataset = make()
    source = iter(dataset)
    first = [next(source) for _ in range(done)]
    state = dataset.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    assert list(resumed) == list(source)
    assert sorted(first) != list(range(35)) or done == 35
    assert len(list(resumed)) == 35


def test_torchdatas_loader_resumes_a_tar_dataset(shards: str):
    def make() -> StatefulDataLoader:
        dataset = TarDataset.from_container_url(shards, transform=key, shuffle=True)
        return StatefulDataLoader(dataset, batch_size=3, num_workers=2, collate_fn=collate)

    loader = make()
    whole = list(loader)
    source = iter(loader)
    first = [next(source) for _ in range(4)]
    state = loader.state_dict()
    loader = make()
    loader.load_state_dict(state)
    assert first + list(loader) == whole


def test_a_state_inside_of_a_tar_file_is_of_one_rank(shards: str):
    def make(rank: int) -> TarDataset[int]:
        return TarDataset.from_container_url(shards, transform=key, rank=rank, world_size=2)

    dataset = make(0)
    next(iter(dataset))
    with pytest.raises(ValueError, match="key of its own"):
        make(1).load_state_dict(dataset.state_dict())


@pytest.mark.parametrize("damage", [lambda data: data[:5000], lambda data: data[:1024] + b"x" * 512 + data[1536:]])
def test_a_damaged_tar_file_is_an_error_or_its_rest_is_skipped(container: str, damage: Callable[[bytes], bytes]):
    fill(container, {"0.tar": damage(tar_of(shard(1, 7))), "1.tar": tar_of(shard(8, 7))})
    with pytest.raises(tarfile.TarError):
        list(TarDataset.from_container_url(container))
    dataset = TarDataset.from_container_url(container, on_error="skip", transform=lambda sample: sample["__key__"])
    found = list(dataset)
    assert found[-7:] == [name.rpartition(".cls")[0] for name in shard(8, 7) if name.endswith("TXT")]
    assert len(found) < 14 and dataset.skipped == 1


def test_a_sample_that_fails_is_skipped(shards: str):
    def transform(sample: dict[str, Any]) -> int:
        if key(sample) == 3:
            raise ValueError("three")
        return key(sample)

    with pytest.raises(ValueError, match="three"):
        list(TarDataset.from_container_url(shards, transform=transform))
    dataset = TarDataset.from_container_url(shards, transform=transform, on_error="skip")
    assert list(dataset) == [number for number in range(35) if number != 3]
    assert dataset.skipped == 1
