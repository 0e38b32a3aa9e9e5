"""`Blob`, `BlobDataset` and `IterableBlobDataset` against the emulator: workers, ranks, resuming, errors, requests."""

from __future__ import annotations

import logging
import pickle
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobClient
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from azure_torch_ckpt import BlobIO, BlobLocation, BlobNotFoundError, LocationError
from azure_torch_ckpt.datasets import Blob, BlobDataset, BlobListing, BlobSampler, IterableBlobDataset
from azure_torch_ckpt.emulator import Azurite
from tests.datasets.sample_blobs import (
    assert_threads_end,
    collate,
    fill,
    join,
    number_of,
    number_unless_seven,
    numbered,
)
from tests.support.faults import Gate, Hold
from tests.support.proxy import FaultProxy
from tests.support.ranks import Ranks

COUNT = 23


@pytest.fixture(scope="module")
def numbers(azurite: Azurite) -> str:
    """URL of a container with 23 blobs that contain their numbers."""
    url = azurite.create_container("datasets-numbers")
    fill(url, numbered(COUNT))
    return url


@pytest.fixture(scope="module")
def listing(numbers: str) -> BlobListing:
    return BlobListing.from_container_url(numbers)


# The interface of azstoragetorch, and errors of arguments


@pytest.mark.parametrize("kind", [BlobDataset, IterableBlobDataset])
def test_the_default_sample_is_url_and_data(numbers: str, kind: Any):
    dataset = kind.from_container_url(numbers)
    expected = [{"url": f"{numbers}/{name}", "data": data} for name, data in numbered(COUNT).items()]
    assert len(dataset) == COUNT
    assert list(dataset if kind is IterableBlobDataset else map(dataset.__getitem__, range(COUNT))) == expected


@pytest.mark.parametrize("kind", [BlobDataset, IterableBlobDataset])
def test_a_transform_gets_a_blob(numbers: str, kind: Any):
    def transform(blob: Blob) -> tuple[str, str, str, bytes]:
        with blob.reader() as file:
            return blob.url, blob.blob_name, blob.container_name, file.read()

    url = f"{numbers}/data/004.txt"
    dataset = kind.from_blob_urls(url, transform=transform)
    sample = next(iter(dataset)) if kind is IterableBlobDataset else dataset[0]
    assert sample == (url, "data/004.txt", "datasets-numbers", b"4")
    assert len(kind.from_container_url(numbers, prefix="data/01")) == 10
    assert len(kind.from_container_url(numbers, prefix="nothing")) == 0


def test_a_map_style_dataset_has_no_sample_beyond_its_end(listing: BlobListing):
    dataset = BlobDataset(listing, transform=number_of)
    assert dataset[-1] == COUNT - 1
    with pytest.raises(IndexError):
        dataset[COUNT]


def test_urls_of_blobs_keep_their_query(container: str, azurite: Azurite):
    fill(container, {"a b/ü.txt": b"old"})
    location = BlobLocation.parse(container).join("a b/ü.txt")
    client = BlobClient(location.endpoint, location.container, location.path, credential=azurite.account_key)
    snapshot = client.create_snapshot()["snapshot"]
    client.upload_blob(b"new", overwrite=True)
    dataset: BlobDataset[dict[str, Any]] = BlobDataset.from_blob_urls(
        iter([str(location), f"{location}?snapshot={snapshot}"]),
        credential=AzureNamedKeyCredential(azurite.account_name, azurite.account_key),
    )
    assert [dataset[0]["data"], dataset[1]["data"]] == [b"new", b"old"]
    assert dataset[0]["url"] == dataset[1]["url"] == str(location)
    # A pickle, which a worker gets, contains the credential; no repr does.
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[1]["data"] == b"old"
    assert azurite.account_key not in repr(dataset.listing) + repr(dataset)
    with pytest.raises(LocationError, match="is a container"):
        BlobDataset.from_blob_urls([container])


# Workers and ranks


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (4, "fork"), (1, "spawn"), (4, "spawn")])
def test_a_dataloader_yields_every_blob_once_and_in_the_same_order(
    listing: BlobListing, workers: int, method: str | None
):
    for world_size in (1, 2, 3):
        expected: list[list[int]] = []
        for rank in range(world_size):
            dataset = IterableBlobDataset(
                listing, transform=number_of, shuffle=True, seed=1, batch_size=2, rank=rank, world_size=world_size
            )
            expected.append(list(dataset))
            if method == "spawn" and (rank, world_size) != (0, 3):  # each start of a spawned worker costs seconds
                continue
            loader = DataLoader(
                dataset, batch_size=2, num_workers=workers, multiprocessing_context=method, collate_fn=collate
            )
            batches = list(loader)
            assert join(batches) == expected[rank]
            assert len(batches) == len(loader)
        assert sorted(join(expected)) == list(range(COUNT))


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (4, "fork"), (1, "spawn")])
def test_a_dataloader_reads_a_map_style_dataset(listing: BlobListing, workers: int, method: str | None):
    dataset = BlobDataset(listing, transform=number_of)
    for world_size in (1, 2, 3) if method != "spawn" else (1,):
        found: list[int] = []
        for rank in range(world_size):
            sampler = BlobSampler(dataset, shuffle=True, rank=rank, world_size=world_size)
            loader = DataLoader(
                dataset,
                batch_size=5,
                sampler=sampler,
                num_workers=workers,
                multiprocessing_context=method,
                collate_fn=collate,
            )
            order = list(sampler)
            assert join(loader) == order
            found += order
        assert sorted(found) == list(range(COUNT))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_with_a_token_over_tls(azurite_tls: Azurite, token_credential: Any, method: str):
    url = azurite_tls.create_container(f"test-{uuid.uuid4().hex}")
    options: dict[str, Any] = {"credential": token_credential, "ca_file": str(azurite_tls.certificate)}
    with BlobIO(url + "/data/5.txt", "wb", **options) as file:
        file.write(b"5")
    dataset = IterableBlobDataset.from_container_url(url, transform=number_of, **options)
    assert list(dataset) == [5]
    assert list(DataLoader(dataset, num_workers=1, multiprocessing_context=method, batch_size=None)) == [5]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_set_epoch_and_a_loaded_state_reach_workers_that_persist(listing: BlobListing, method: str):
    def make() -> IterableBlobDataset[int]:
        return IterableBlobDataset(listing, transform=number_of, shuffle=True, batch_size=3)

    reference, dataset = make(), make()
    orders = []
    for epoch in range(3):
        reference.set_epoch(epoch)
        orders.append(list(reference))
    loader = DataLoader(
        dataset,
        batch_size=3,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context=method,
        collate_fn=collate,
    )
    for epoch in (0, 2):
        dataset.set_epoch(epoch)
        assert join(loader) == orders[epoch]
    with pytest.raises(ValueError, match="StatefulDataLoader"):
        dataset.state_dict()
    dataset.set_epoch(1)
    source = iter(loader)
    first = [next(source) for _ in range(3)]
    dataset.load_state_dict(dataset.state_at(9))
    assert join(first) + join(loader) == orders[1]
    assert join(loader) == orders[1]  # a state is for one pass


def read_on_rank(url: str) -> list[int]:
    dataset = IterableBlobDataset.from_container_url(url, transform=number_of, shuffle=True)
    return join(DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate))


@pytest.mark.parametrize(("size", "counts"), [(2, [12, 11]), (3, [8, 8, 7])])
def test_ranks_under_torchrun_share_a_dataset(numbers: str, ranks: Ranks, size: int, counts: list[int]):
    by_rank = ranks(size).run(read_on_rank, numbers)
    assert sorted(join(by_rank)) == list(range(COUNT))
    assert [len(part) for part in by_rank] == counts


# Resuming


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("style", ["iterable", "map"])
def test_a_stateful_dataloader_resumes_in_the_middle_of_an_epoch(listing: BlobListing, style: str, workers: int):
    def make() -> StatefulDataLoader:
        epochs: IterableBlobDataset[int] | BlobSampler
        dataset: IterableBlobDataset[int] | BlobDataset[int]
        settings: dict[str, Any] = {}
        if style == "iterable":
            epochs = dataset = IterableBlobDataset(listing, transform=number_of, shuffle=True, batch_size=2)
        else:
            dataset = BlobDataset(listing, transform=number_of)
            epochs = settings["sampler"] = BlobSampler(dataset, shuffle=True)
        epochs.set_epoch(3)
        return StatefulDataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate, **settings)

    loader = make()
    whole = join(loader)
    source = iter(loader)
    first = [next(source) for _ in range(5)]
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    loader = make()
    loader.load_state_dict(state)
    assert join(first) + join(loader) == whole
    assert join(loader) == whole


def test_a_state_of_a_worker_is_not_loaded_by_others(listing: BlobListing):
    dataset = IterableBlobDataset(listing, transform=number_of)
    state = dataset.state_dict()
    state["share"] = {**state["share"], "workers": 2}
    with pytest.raises(ValueError, match="one of 2 workers"):
        dataset.load_state_dict(state)


# Errors


def test_an_error_is_raised_and_the_state_is_the_one_before_it(listing: BlobListing):
    dataset = IterableBlobDataset(listing, transform=number_unless_seven)
    source = iter(dataset)
    assert [next(source) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="seven"):
        next(source)
    resumed = IterableBlobDataset(listing, transform=number_of)
    resumed.load_state_dict(dataset.state_dict())
    assert list(resumed) == list(range(7, COUNT))


@pytest.mark.parametrize("workers", [0, 2])
def test_blobs_that_fail_are_skipped_and_counted(listing: BlobListing, workers: int):
    iterable = IterableBlobDataset(listing, transform=number_unless_seven, on_error="skip")
    mapped = BlobDataset(listing, transform=number_unless_seven, on_error="skip")
    rest = [number for number in range(COUNT) if number != 7]
    for dataset in (iterable, mapped):
        assert sorted(join(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=collate))) == rest
        assert dataset.skipped == 1
    with pytest.raises(ValueError, match="seven"):
        mapped[7]
    with pytest.raises(ValueError, match="seven"):
        mapped.__getitems__([7])


def test_a_missing_blob_is_an_error_or_skipped_with_its_name(numbers: str, caplog: pytest.LogCaptureFixture):
    urls = [f"{numbers}/data/001.txt", f"{numbers}/gone.txt", f"{numbers}/data/002.txt"]
    with pytest.raises(BlobNotFoundError, match=r"gone\.txt"):
        list(IterableBlobDataset.from_blob_urls(urls))
    with caplog.at_level(logging.WARNING):
        dataset = IterableBlobDataset.from_blob_urls(urls, transform=number_of, on_error="skip")
        assert list(dataset) == [1, 2]
    assert dataset.skipped == 1 and "gone.txt" in caplog.text


def test_a_blob_is_read_and_transformed_again(numbers: str):
    failures = iter([OSError("first"), ValueError("second")])

    def transform(blob: Blob) -> int:
        number = number_of(blob)
        for error in failures:
            raise error
        return number

    dataset = BlobDataset.from_blob_urls(f"{numbers}/data/003.txt", transform=transform, retries=2)
    assert dataset[0] == 3
    failures = iter([OSError("first"), ValueError("second")])
    dataset = BlobDataset.from_blob_urls(f"{numbers}/data/003.txt", transform=transform, retries=1)
    with pytest.raises(ValueError, match="second"):
        dataset[0]


def test_invalid_settings_are_refused(listing: BlobListing):
    for wrong in ({"on_error": "ignore"}, {"retries": -1}, {"prefetch_bytes": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must"):
            IterableBlobDataset(listing, **wrong)
    with pytest.raises(TypeError, match="shufle"):
        IterableBlobDataset(listing, shufle=True)  # type: ignore[call-arg]


# Requests, memory


def urls_through(proxy: FaultProxy, numbers: str, count: int) -> Iterator[str]:
    container = numbers.rpartition("/")[2]
    return (f"{proxy.endpoint}/{container}/data/{number:03}.txt" for number in range(count))


def test_the_next_blobs_are_prefetched_while_the_transform_runs(proxy: FaultProxy, numbers: str):
    requested_meanwhile: list[int] = []

    def transform(blob: Blob) -> int:
        number = number_of(blob)
        if number == 0:
            proxy.wait_until(lambda: proxy.count("Get Blob") >= 6)
            requested_meanwhile.append(proxy.count("Get Blob"))
        return number

    container = f"{proxy.endpoint}/{numbers.rpartition('/')[2]}"
    budget = 8  # bytes, of one or two digits a blob
    dataset = IterableBlobDataset.from_container_url(container, transform=transform, prefetch_bytes=budget)
    assert list(dataset) == list(range(COUNT))
    assert 6 <= requested_meanwhile[0] <= budget
    assert proxy.count("Get Blob") == COUNT
    assert proxy.count("List") == 1


def test_without_a_budget_nothing_is_prefetched(proxy: FaultProxy, numbers: str):
    container = f"{proxy.endpoint}/{numbers.rpartition('/')[2]}"
    dataset = IterableBlobDataset.from_container_url(container, transform=number_of, prefetch_bytes=0)
    source = iter(dataset)
    for number in range(3):
        assert next(source) == number
        assert proxy.count("Get Blob") == number + 1


def test_a_batch_of_a_map_style_dataset_is_fetched_in_parallel(proxy: FaultProxy, numbers: str):
    gate = Gate()
    proxy.when("Get Blob", times=None).do(Hold(gate))
    dataset = BlobDataset.from_blob_urls(urls_through(proxy, numbers, 8), transform=number_of)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(dataset.__getitems__([3, 1, 2, 0])))
    thread.start()
    gate.wait_for(4)
    gate.open()
    thread.join()
    assert found == [3, 1, 2, 0]


def test_an_abandoned_stream_ends_its_threads(listing: BlobListing):
    assert_threads_end(iter(IterableBlobDataset(listing, transform=number_of)))


def test_a_large_blob_is_read_by_the_transform(container: str):
    size = 3 * 1024 * 1024

    def first_bytes(blob: Blob) -> bytes:
        with blob.reader() as file:
            assert isinstance(file, BlobIO)
            return file.read(4)

    fill(container, {"large": bytes(range(256)) * (size // 256)})
    dataset = IterableBlobDataset.from_container_url(container, transform=first_bytes, prefetch_bytes=size - 1)
    assert list(dataset) == [bytes(range(4))]
