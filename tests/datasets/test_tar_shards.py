"""`TarDataset`: which ranges are prefetched, and what happens to shards and samples that fail."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from azure_torch_ckpt import AccessDeniedError, BlobChangedError, BlobNotFoundError, TarShardError
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.datasets import BlobCache, BlobListing, TarDataset
from azure_torch_ckpt.datasets.tar_shards import SMALLEST_RANGE
from azure_torch_ckpt.location import BlobLocation
from tests.datasets.sample_blobs import assert_threads_end, fill, key, key_unless_three, shard, tar_of
from tests.support.faults import Answer, Cut
from tests.support.proxy import FaultProxy

SMALL = 4 * SMALLEST_RANGE  # a budget with ranges of that size
DENIED = Answer(403, "AuthorizationPermissionMismatch")  # not retried


def large(first: int) -> bytes:
    """Return a shard of eight to sixteen small ranges: five samples of 400 to 800 kB."""
    return tar_of(shard(first, 5, 200_000))


@pytest.fixture
def large_shards(container: str) -> str:
    fill(container, {f"{number}.tar": large(5 * number) for number in range(3)})
    return container


def through(proxy: FaultProxy, container: str) -> str:
    return f"{proxy.endpoint}/{container.rpartition('/')[2]}"


def listed(url: str, known: bool) -> BlobListing:
    """Return the blobs of a container as they are listed, or only with their URLs."""
    listing = BlobListing.from_container_url(url)
    return listing if known else BlobListing.from_blob_urls([blob.location for blob in listing])


# Prefetching


@pytest.mark.parametrize("known", [True, False])
def test_the_next_ranges_and_shards_are_prefetched_while_the_transform_runs(
    proxy: FaultProxy, container: str, known: bool
):
    fill(container, {f"{number}.tar": tar_of(shard(7 * number, 7)) for number in range(4)})
    requested_meanwhile: list[int] = []

    def transform(sample: dict[str, Any]) -> int:
        if not requested_meanwhile:
            proxy.wait_until(lambda: proxy.count("Get Blob") >= 4)
            requested_meanwhile.append(proxy.count("Get Blob"))
        return key(sample)

    dataset = TarDataset(listed(through(proxy, container), known), transform=transform)
    assert list(dataset) == list(range(28))
    assert requested_meanwhile == [4]
    assert proxy.count("Get Blob", "Head") == 4  # a small shard is one request


@pytest.mark.parametrize("known", [True, False])
def test_prefetching_stays_within_its_budget(proxy: FaultProxy, large_shards: str, known: bool):
    begin_of_last = 4 * len(tar_of({"a.jpg": bytes(200_000), "a.cls": bytes(200_000)})) - 4 * 10_240
    ahead: list[int] = []

    def transform(sample: dict[str, Any]) -> int:
        number = key(sample)
        if number == 3:  # in the first shard, of whose samples one is left
            proxy.wait_until(lambda: fetched() >= begin_of_last + SMALL - SMALLEST_RANGE)
            ahead.append(fetched() - begin_of_last)
        return number

    def fetched() -> int:
        return proxy.count("Get Blob") * SMALLEST_RANGE

    dataset = TarDataset(listed(through(proxy, large_shards), known), transform=transform, prefetch_bytes=SMALL)
    assert list(dataset) == list(range(15))
    # The range that is being read counts, too.
    assert SMALL - SMALLEST_RANGE <= ahead[0] <= SMALL
    requests = proxy.requests("Get Blob")
    assert sum(request.sent for request in requests) == sum(len(large(5 * number)) for number in range(3))
    assert proxy.count("Head") == 0


def test_without_a_budget_a_range_is_fetched_on_demand(proxy: FaultProxy, container: str):
    fill(container, {f"{number}.tar": tar_of(shard(7 * number, 7)) for number in range(3)})
    source = iter(TarDataset.from_container_url(through(proxy, container), transform=key, prefetch_bytes=0))
    for number in range(14):
        assert next(source) == number
        # A sample is complete when the next header was read; the last one of a shard, when the shard's end was read.
        assert proxy.count("Get Blob") == 1 + number // 7


def test_an_abandoned_stream_of_tar_files_ends_its_threads(large_shards: str):
    assert_threads_end(iter(TarDataset.from_container_url(large_shards, transform=key)))


def test_shards_come_from_the_cache(proxy: FaultProxy, container: str, tmp_path: Path):
    fill(container, {f"{number}.tar": tar_of(shard(7 * number, 7)) for number in range(3)})
    url = through(proxy, container)
    dataset = TarDataset.from_container_url(url, transform=key, cache=BlobCache(tmp_path, 10_000_000))
    source = iter(dataset)
    first = [next(source) for _ in range(9)]
    inside = dataset.state_dict()
    assert first + list(source) == list(range(21))
    assert proxy.count("Get Blob") == 3
    assert sorted(DataLoader(dataset, num_workers=2, batch_size=None)) == list(range(21))
    dataset.load_state_dict(inside)
    assert list(dataset) == list(range(9, 21))
    assert proxy.count("Get Blob", "Head") == 3


# Failures


def damaged_shards() -> dict[str, bytes]:
    """Return shards of seven samples that cannot be read to their end."""
    plain, packed = tar_of(shard(1, 7)), tar_of(shard(1, 7), "w:gz")
    return {
        "cut.tar": plain[:5000],
        "header.tar": plain[:1024] + b"x" * 512 + plain[1536:],
        "cut.tgz": packed[:-100],
        "checksum.tgz": packed[:-12] + bytes(12),
        "not-compressed.tgz": plain,
    }


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("name", damaged_shards())
def test_a_damaged_shard_is_an_error_or_its_rest_is_skipped(container: str, name: str, retries: int):
    fill(container, {f"0-{name}": damaged_shards()[name], "1.tar": tar_of(shard(8, 7))})
    with pytest.raises(TarShardError):
        list(TarDataset.from_container_url(container, retries=retries))
    dataset = TarDataset.from_container_url(container, on_error="skip", retries=retries, transform=key)
    numbers = list(dataset)
    assert numbers[-7:] == list(range(8, 15)) and numbers[:-7] == list(range(1, len(numbers) - 6))
    assert (len(numbers) < 14 or name == "checksum.tgz") and dataset.skipped == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_missing_shard_is_an_error_or_skipped_with_its_name(
    container: str, known: bool, caplog: pytest.LogCaptureFixture
):
    fill(container, {f"{number}.tar": tar_of(shard(7 * number, 7)) for number in range(3)})
    listing = listed(container, known)
    store = BlobStore(BlobLocation.parse(container))
    store.delete("1.tar")
    dataset = TarDataset(listing, transform=key, retries=1)
    source = iter(dataset)
    assert [next(source) for _ in range(7)] == list(range(7))
    with pytest.raises(BlobNotFoundError, match=r"1\.tar"):
        next(source)
    skipping = TarDataset(listing, transform=key, on_error="skip", retries=1)
    skipping.load_state_dict(dataset.state_dict())  # the one before the error
    assert list(skipping) == list(range(14, 21))
    assert skipping.skipped == 1
    shuffling = TarDataset(listing, transform=key, on_error="skip", shuffle_buffer=10)
    with caplog.at_level(logging.WARNING):
        assert sorted(shuffling) == [*range(7), *range(14, 21)]
    assert "1.tar" in caplog.text


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("buffer", [0, 4])
def test_a_shard_is_opened_again_behind_the_last_sample_that_was_read(
    proxy: FaultProxy, large_shards: str, known: bool, buffer: int
):
    listing = listed(through(proxy, large_shards), known)

    def make(**settings: Any) -> TarDataset[int]:
        return TarDataset(listing, transform=key, prefetch_bytes=SMALL, shuffle_buffer=buffer, **settings)

    whole = list(make())
    assert sorted(whole) == list(range(15))
    for nth in (1, 8, 20):
        proxy.when("Get Blob", nth=nth).do(DENIED)
        assert list(make(retries=1)) == whole
    # Without retries, a resumed pass does not repeat the yielded samples.
    proxy.when("Get Blob", nth=12).do(DENIED)
    dataset = make()
    first: list[int] = []
    with pytest.raises(AccessDeniedError):
        first.extend(number for number in dataset)
    resumed = make()
    resumed.load_state_dict(dataset.state_dict())
    rest = list(resumed)
    assert whole[len(whole) - len(rest) :] == rest and 0 < len(rest) < 15
    # After a skipped rest, a resumed pass repeats nothing, even if all of the rest can be read now.
    proxy.when("Get Blob", nth=12).do(DENIED)
    dataset = make(on_error="skip")
    source = iter(dataset)
    first = [next(source) for _ in range(9)]
    resumed = make()
    resumed.load_state_dict(dataset.state_dict())
    rest, skipping = list(resumed), list(source)
    assert dataset.skipped == 1
    assert len({*first, *rest}) == len(first + rest) and set(rest) >= set(skipping)
    # A permanent error.
    proxy.when("Get Blob", nth=8, times=None).do(DENIED)
    with pytest.raises(AccessDeniedError):
        list(make(retries=1))


def test_broken_connections_are_retried_by_the_transport(proxy: FaultProxy, large_shards: str):
    proxy.when("Get Blob", nth=3).do(Cut(70_000))
    proxy.when("Get Blob", nth=6).do(Answer(503, "ServerBusy"))
    url = through(proxy, large_shards)
    assert list(TarDataset.from_container_url(url, transform=key, prefetch_bytes=SMALL)) == list(range(15))


def test_a_shard_that_was_replaced_since_it_was_listed_is_read_as_it_is_now(container: str):
    fill(container, {"0.tar": tar_of(shard(0, 3)), "1.tar": tar_of(shard(3, 3))})
    dataset = TarDataset.from_container_url(container, transform=key)
    source = iter(dataset)
    assert next(source) == 0
    inside = dataset.state_dict()
    fill(container, {"0.tar": tar_of(shard(100, 40)), "1.tar": tar_of(shard(200, 40))})
    fresh = TarDataset(dataset.listing, transform=key)
    assert list(fresh) == [*range(100, 140), *range(200, 240)]
    # A state in the middle of the old file cannot be used for the new one.
    fresh.load_state_dict(inside)
    with pytest.raises(BlobChangedError):
        list(fresh)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_shard_that_is_replaced_while_it_is_read_is_an_error(container: str, known: bool, on_error: Any):
    fill(container, {"0.tar": large(10), "1.tar": large(20)})

    def transform(sample: dict[str, Any]) -> int:
        if key(sample) == 10:
            fill(container, {"0.tar": large(50)})
        return key(sample)

    dataset = TarDataset(
        listed(container, known), transform=transform, prefetch_bytes=SMALL, retries=3, on_error=on_error
    )
    found: list[int] = []
    with pytest.raises(BlobChangedError) if on_error == "raise" else contextlib.nullcontext():
        found.extend(number for number in dataset)
    rest = [] if on_error == "raise" else [20, 21, 22, 23, 24]
    assert found in ([10, *rest], [10, 11, *rest])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_fails_is_skipped(container: str, workers: int):
    fill(container, {"0.tar": tar_of(shard(0, 7)), "1.tar": tar_of(shard(7, 7))})
    with pytest.raises(ValueError, match="three"):
        list(TarDataset.from_container_url(container, transform=key_unless_three))
    dataset = TarDataset.from_container_url(container, transform=key_unless_three, on_error="skip")
    found = list(DataLoader(dataset, num_workers=workers, batch_size=None))
    assert sorted(found) == [number for number in range(14) if number != 3]
    assert dataset.skipped == 1


def test_a_transform_is_called_again_with_the_whole_sample(container: str):
    fill(container, {"0.tar": tar_of(shard(0, 2))})
    failures = iter([OSError("first"), ValueError("second")])

    def transform(sample: dict[str, Any]) -> int:
        number = key(sample)
        sample.clear()
        for error in failures:
            raise error
        return number

    assert list(TarDataset.from_container_url(container, transform=transform, retries=2)) == [0, 1]
    failures = iter([OSError("first"), ValueError("second")])
    with pytest.raises(ValueError, match="second"):
        list(TarDataset.from_container_url(container, transform=transform, retries=1))
