"""`verify` finds all damage, and says where it is."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, CheckpointNotFoundError, CorruptCheckpointError, verify
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, stored_item
from azure_torch_ckpt.progress import Progress
from tests.faults.tally import Tally
from tests.support.containers import content, put, store_of
from tests.support.faults import Answer
from tests.support.mixed_checkpoint import (
    KEY,
    SMALL,
    data_path,
    flip_in_storage,
    item_of,
    save,
    save_without_collectives,
    state,
)
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def stored_by(url: str, rank: int) -> StoredItem:
    """Return the item that a rank saved without collectives."""
    stored = AzureBlobReader(url, credential=KEY).read_metadata(rank=rank).storage_data
    [info] = [info for index, info in stored.items() if index.fqn == f"rank{rank}"]
    return stored_item(info)


def test_a_sound_checkpoint(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    save(f"{container}/a")
    report = verify(f"{proxied_container}/a", credential=KEY, options=SMALL)
    assert report.ok and report.problems == [] and report.url == f"{proxied_container}/a"
    [blob] = report.blobs
    assert (blob.items, blob.checked, blob.without_checksum) == (4, 4, 0)
    assert f"a/{blob.name}" == data_path(f"{container}/a")
    assert blob.size == blob.expected_size == len(content(container, f"a/{blob.name}"))
    # All of it was read, and nothing was changed.
    assert sum(seen.sent for seen in proxy.requests("Get Blob") if seen.path.endswith(".distcp")) == blob.size
    assert {seen.method for seen in proxy.log} == {"GET"}
    assert proxy.count("List") == 1  # which tells the sizes of all blobs


def test_sizes_are_requested_one_by_one_where_listing_is_not_allowed(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/a")
    proxy.when("List", times=None).do(Answer(403, "AuthorizationPermissionMismatch"))
    report = verify(f"{proxied_container}/a", credential=KEY, options=SMALL)
    assert report.ok and report.blobs[0].size == report.blobs[0].expected_size
    assert proxy.count("Head") == 1


def test_all_ranks_that_saved_without_collectives_are_verified(container: str) -> None:
    save_without_collectives(f"{container}/alone", 0, 1, 2)
    report = verify(f"{container}/alone", credential=KEY)
    assert report.ok and [blob.checked for blob in report.blobs] == [1, 1, 1]
    flip_in_storage(f"{container}/alone", stored_by(f"{container}/alone", 2), 3)
    report = verify(f"{container}/alone", credential=KEY)
    assert ["'rank2'" in problem for problem in report.problems] == [True]


def test_verify_reports_its_progress(container: str) -> None:
    save(f"{container}/a")
    reports: list[Progress] = []
    [blob] = verify(f"{container}/a", credential=KEY, progress=reports.append).blobs
    assert (reports[0].operation, reports[0].url, reports[0].rank) == ("verify", f"{container}/a", 0)
    assert (reports[0].done, reports[0].total) == (0, blob.size)
    assert reports[-1].done == reports[-1].total == blob.size


def test_a_sample_reads_a_share_of_the_items_and_all_sizes(
    proxy: FaultProxy, container: str, proxied_container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{container}/many"
    tensors = {f"t{number}": torch.full((1000,), float(number)) for number in range(200)}
    dcp.save(tensors, storage_writer=AzureBlobWriter(url, credential=KEY))
    monkeypatch.setattr(random, "random", random.Random(7).random)
    [half] = verify(f"{proxied_container}/many", credential=KEY, sample=0.5).blobs
    assert 70 < half.checked < 130 and half.items == 200

    read = len(proxy.requests("Get Blob"))
    [none] = verify(f"{proxied_container}/many", credential=KEY, sample=0).blobs
    assert none.checked == 0 and none.size == none.expected_size
    assert len(proxy.requests("Get Blob")) == read + 1  # the metadata

    path = f"many/{none.name}"
    put(container, path, content(container, path)[:-1])
    report = verify(f"{proxied_container}/many", credential=KEY, sample=0)
    assert not report.ok and "beyond its end" in report.problems[0]
    for sample in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            verify(url, credential=KEY, sample=sample)


def test_every_damaged_item_is_reported_by_its_blob(container: str, tally: Tally) -> None:
    """Three blobs, as three ranks write them: one sound, one with two flipped bytes, one short; later one missing."""
    url = f"{container}/a"
    save(url)
    whole = data_path(url)
    others = [whole.replace("__0_0", f"__{rank}_0") for rank in (1, 2)]
    for path in others:
        put(container, path, content(container, whole))

    def spread(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            rank = {"large": 0, "object": 0, "small": 1, "strided": 2}[index.fqn]
            info.relative_path = info.relative_path.replace("__0_0", f"__{rank}_0")

    rewrite(container, spread)
    assert [blob.items for blob in verify(url, credential=KEY).blobs] == [2, 1, 1]

    for name in ("large", "object"):
        flip_in_storage(url, item_of(url, name), 7)
    strided = item_of(url, "strided")
    put(container, others[1], content(container, others[1])[: strided.offset + strided.length - 1])
    report = verify(url, credential=KEY, options=SMALL)
    flipped, sound, short = report.blobs
    assert not report.ok and len(report.problems) == 3
    assert sound.problems == [] and sound.checked == 1
    assert flipped.checked == 2 and short.checked == 0  # a short blob is not read
    for name in ("large", "object"):
        item = item_of(url, name)
        [problem] = [problem for problem in flipped.problems if f"{name!r}" in problem]
        assert f"{item.length} bytes at offset {item.offset} of blob {item.relative_path}" in problem
        assert f"{item.crc64:016x} was saved" in problem
    assert short.size == short.expected_size - 1
    assert short.name in short.problems[0] and "'strided'" in short.problems[0]

    store_of(url).delete(others[0])
    missing = verify(url, credential=KEY).blobs[1]
    assert missing.size is None
    assert "missing" in missing.problems[0] and "'small'" in missing.problems[0] and missing.name in missing.problems[0]
    tally.add("verify: flipped (2), short, missing", 4, "reported with tensor and blob", 4)


def rewrite(container: str, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads(content(container, "a/.metadata"))
    change(metadata)
    put(container, "a/.metadata", pickle.dumps(metadata))


def test_a_checkpoint_of_torchs_own_writer_is_checked_as_far_as_it_can_be(container: str, tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path))
    for file in tmp_path.iterdir():
        put(container, f"foreign/{file.name}", file.read_bytes())
    report = verify(f"{container}/foreign", credential=KEY)
    assert report.ok
    assert sum(blob.items for blob in report.blobs) == 4
    for blob in report.blobs:
        assert blob.checked == blob.without_checksum == blob.items
        assert blob.size is not None and blob.size >= blob.expected_size
    name = report.blobs[0].name
    put(container, f"foreign/{name}", content(container, f"foreign/{name}")[:-40_000])
    assert not verify(f"{container}/foreign", credential=KEY).ok


def test_nothing_to_verify(container: str) -> None:
    with pytest.raises(CheckpointNotFoundError):
        verify(f"{container}/nothing", credential=KEY)
    put(container, "a/.metadata", b"garbage")
    with pytest.raises(CorruptCheckpointError):
        verify(f"{container}/a", credential=KEY)
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/empty", credential=KEY))
    report = verify(f"{container}/empty", credential=KEY)
    assert report.ok and report.blobs == []
