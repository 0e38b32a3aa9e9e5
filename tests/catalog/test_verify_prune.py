"""`verify` finds all damage and says where; `prune` and `remove_checkpoint` delete what is theirs and nothing else."""

from __future__ import annotations

import datetime
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    BlobLocation,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
    TransferOptions,
    UnsafeMetadataError,
    prune,
    remove_checkpoint,
    verify,
)
from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.blob_names import new_save_id
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, stored_item
from tests.faults.tally import Tally
from tests.support.faults import Answer, Call
from tests.support.mixed_checkpoint import (
    KEY,
    SMALL,
    assert_right,
    blobs_below,
    flip_in_storage,
    item_of,
    load,
    save,
    state,
)
from tests.support.planted import content, put
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

NOW = datetime.timedelta(0)
LONG = datetime.timedelta(hours=1)


def data_path(url: str) -> str:
    return BlobLocation.parse(url).join(item_of(url, "large").relative_path).path


def stored_by(url: str, rank: int) -> StoredItem:
    """The item that a rank has saved without collectives."""
    [info] = AzureBlobReader(url, credential=KEY).read_metadata(rank=rank).storage_data.values()
    return stored_item(info)


def remains(container: str, checkpoint: str, blobs: int = 2) -> list[str]:
    """What a save that died before its commit leaves at a checkpoint's place."""
    save_id = new_save_id()
    paths = [f"{checkpoint}/{save_id}/__{rank}_0.distcp".lstrip("/") for rank in range(blobs)]
    for path in paths:
        put(container, path, b"1234567890")
    return paths


# ---- verify ----------------------------------------------------------------------------------------------------------


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


def test_sizes_are_asked_for_one_by_one_where_a_listing_is_not_allowed(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/a")
    proxy.when("List", times=None).do(Answer(403, "AuthorizationPermissionMismatch"))
    report = verify(f"{proxied_container}/a", credential=KEY, options=SMALL)
    assert report.ok and report.blobs[0].size == report.blobs[0].expected_size
    assert proxy.count("Head") == 1


def test_ranks_that_saved_without_collectives_are_verified_together(container: str) -> None:
    for rank in range(3):
        save_without_collectives(AzureBlobWriter(f"{container}/alone", credential=KEY), rank)
    report = verify(f"{container}/alone", credential=KEY)
    assert report.ok and [blob.checked for blob in report.blobs] == [1, 1, 1]
    flip_in_storage(f"{container}/alone", stored_by(f"{container}/alone", 2), 3)
    report = verify(f"{container}/alone", credential=KEY)
    assert ["'rank2'" in problem for problem in report.problems] == [True]


def test_verifying_tells_how_far_it_has_got(container: str) -> None:
    save(f"{container}/a")
    told: list[tuple[int, int]] = []
    report = verify(f"{container}/a", credential=KEY, progress=lambda done, total: told.append((done, total)))
    [blob] = report.blobs
    assert told[0] == (0, blob.size) and told[-1] == (blob.size, blob.size)


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
    assert flipped.checked == 2 and short.checked == 0  # what is not there is not read
    for name in ("large", "object"):
        item = item_of(url, name)
        [problem] = [problem for problem in flipped.problems if f"{name!r}" in problem]
        assert f"{item.length} bytes at offset {item.offset} of blob {item.relative_path}" in problem
        assert f"{item.crc64:016x} was saved" in problem
    assert short.size == short.expected_size - 1
    assert short.name in short.problems[0] and "'strided'" in short.problems[0]

    store = BlobStore(BlobLocation.parse(url), Access(KEY))
    store.delete(others[0])
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


# ---- prune -----------------------------------------------------------------------------------------------------------


STRAY_PLACES = ("run", "run/alone", "run/never-committed", "run/step-1", "run/step-2/inner")


def a_full_container(container: str) -> tuple[list[str], list[str]]:
    """All sorts of things: those that a prune must leave alone, and those that it is for."""
    save(f"{container}/run/step-1", 1)
    save(f"{container}/run/step-2", 2)
    save(f"{container}/run/step-2/inner", 3)  # a checkpoint below another
    save(f"{container}/other/step-1", 4)
    for rank in range(2):
        planned = AzureBlobWriter(f"{container}/run/alone", credential=KEY)
        save_without_collectives(planned, rank)
    save_id = new_save_id()
    foreign = [
        f"run/step-1/{save_id}/notes.txt",
        f"run/step-1/{save_id}/__0_0.distcp.bak",
        f"run/step-1/{save_id}/deeper/__0_0.distcp",
        f"run/step-1/{save_id[:-1]}/__0_0.distcp",
        f"run/step-1/{save_id[:-1]}F/__0_0.distcp",
        "run/step-1/__0_0.distcp",  # torch's FileSystemWriter
        "run/step-1/__1_0.distcp",
        f"run/{save_id}",
        "run/model.safetensors",
        f"runs/{save_id}/__0_0.distcp",  # outside the prefix "run/"
    ]
    for path in foreign:
        put(container, path)
    keep = blobs_below(container)
    strays = (
        remains(container, "run/step-1") + remains(container, "run/step-1") + remains(container, "run/step-2/inner")
    )
    strays += remains(container, "run/never-committed") + remains(container, "run") + remains(container, "run/alone")
    return keep, sorted(strays)


def save_without_collectives(writer: AzureBlobWriter, rank: int) -> None:
    """What a rank of ``dcp.save(use_collectives=False)`` does."""
    planner = dcp.DefaultSavePlanner()
    writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
    planner.set_up_planner({f"rank{rank}": torch.arange(50)}, writer.storage_meta(), True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    [plan], metadata = planner.create_global_plan([plan])
    [plan] = writer.prepare_global_plan([plan])
    results = writer.write_data(planner.finish_plan(plan), planner)
    writer.finish(metadata, [results.wait()])


def test_prune_finds_the_remains_and_nothing_else(container: str, tally: Tally) -> None:
    keep, strays = a_full_container(container)
    assert prune(f"{container}/run", credential=KEY, grace=LONG).remains == []
    found = prune(f"{container}/run", credential=KEY, grace=NOW).remains
    assert sorted(path for one in found for path in one.blobs) == strays
    assert len(found) == 6 and all(one.size == 20 and len(one.blobs) == 2 for one in found)
    assert {one.url for one in found} == {
        f"{container}/{place}"
        for place in ("run", "run/alone", "run/never-committed", "run/step-1", "run/step-2/inner")
    }
    assert all(one.save_id in path for one in found for path in one.blobs)
    assert sorted(blobs_below(container)) == sorted(keep + strays)  # that was a dry run

    assert prune(f"{container}/run", credential=KEY, grace=LONG, dry_run=False).remains == []
    assert sorted(blobs_below(container)) == sorted(keep + strays)

    deleted = prune(f"{container}/run", credential=KEY, grace=NOW, dry_run=False).remains
    assert deleted == found
    assert blobs_below(container) == keep
    for version, name in ((1, "run/step-1"), (2, "run/step-2"), (3, "run/step-2/inner"), (4, "other/step-1")):
        assert_right(load(f"{container}/{name}"), version)
    assert verify(f"{container}/run/step-1", credential=KEY).ok
    assert prune(f"{container}/run", credential=KEY, grace=NOW).remains == []
    tally.add("prune among 5 checkpoints and 10 other files", len(strays), "only remains deleted", len(strays))


def test_prune_of_one_checkpoint_and_of_a_whole_container(container: str) -> None:
    save(f"{container}/a", 1)
    save(container, 2)  # a checkpoint at the container's root
    inside, beside, at_root = remains(container, "a"), remains(container, "b"), remains(container, "")
    [found] = prune(f"{container}/a", credential=KEY, grace=NOW, dry_run=False).remains
    assert found.blobs == inside and found.url == f"{container}/a"
    everything = prune(container, credential=KEY, grace=NOW, dry_run=False).remains
    assert sorted(path for one in everything for path in one.blobs) == sorted(beside + at_root)
    assert_right(load(f"{container}/a"), 1)
    assert_right(load(container), 2)


def test_the_grace_period_goes_by_the_services_clock(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    [_, last] = remains(container, "a")
    store = BlobStore(BlobLocation.parse(container), Access(KEY))
    age = store.now() - store.stat(last).last_modified
    assert prune(f"{container}/a", credential=KEY, grace=age + LONG).remains == []
    assert proxy.log == []
    [found] = prune(f"{proxied_container}/a", credential=KEY, grace=age).remains  # by now it is that old
    assert found.last_modified is not None and last in found.blobs
    # The blobs, the time (one blob at most), and whether there is metadata by now.
    assert [seen.kind for seen in proxy.log] == ["List", "List", "Get Blob"]
    assert [seen.query.get("maxresults") for seen in proxy.requests("List")] == [None, "1"]


@pytest.mark.parametrize("name", [".metadata", "__1.metadata"])
def test_metadata_that_cannot_be_read_stops_a_prune_before_it_deletes(container: str, name: str) -> None:
    save(f"{container}/run/a")
    strays = remains(container, "run/a") + remains(container, "run/c")
    strays += remains(container, "run/b") + remains(container, "run/b")
    for data, expected in ((b"garbage", CorruptCheckpointError), (pickle.dumps(print), UnsafeMetadataError)):
        put(container, f"run/b/{name}", data)
        before = blobs_below(container)
        with pytest.raises(expected, match=name):
            prune(f"{container}/run", credential=KEY, grace=NOW, dry_run=False)
        assert blobs_below(container) == before and set(strays) <= set(before)


# ---- remove_checkpoint -----------------------------------------------------------------------------------------------


def test_remove_takes_the_metadata_first_and_leaves_the_rest(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/a", 1)
    save(f"{container}/a/inner", 2)
    put(container, "a/notes.txt")
    strays = remains(container, "a")
    inner = blobs_below(f"{container}/a/inner")
    data = data_path(f"{container}/a")
    remove_checkpoint(f"{proxied_container}/a", credential=KEY)
    deleted = [seen.path.partition(f"/{container.rpartition('/')[2]}/")[2] for seen in proxy.requests("Delete")]
    assert deleted == ["a/.metadata", data]
    assert sorted(blobs_below(container)) == sorted([*inner, "a/notes.txt", *strays])
    assert_right(load(f"{container}/a/inner"), 2)
    with pytest.raises(CheckpointNotFoundError):
        remove_checkpoint(f"{container}/a", credential=KEY)


def test_remove_of_an_empty_state_dict_and_of_ranks_without_collectives(container: str) -> None:
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/empty", credential=KEY))
    for rank in range(3):
        save_without_collectives(AzureBlobWriter(f"{container}/alone", credential=KEY), rank)
    assert len(blobs_below(f"{container}/alone")) == 6
    for name in ("empty", "alone"):
        remove_checkpoint(f"{container}/{name}", credential=KEY)
    assert blobs_below(container) == []


def test_a_checkpoint_that_was_replaced_meanwhile_stands(
    proxy: FaultProxy, container: str, proxied_container: str, tally: Tally
) -> None:
    save(f"{container}/a", 1)
    proxy.when("Delete").do(Call(lambda: save(f"{container}/a", 2), "request"))
    with pytest.raises(CheckpointReplacedError, match="the new one stands"):
        remove_checkpoint(f"{proxied_container}/a", credential=KEY)
    assert_right(load(f"{container}/a"), 2)
    assert len(blobs_below(container)) == 2
    tally.add("checkpoint replaced while it is removed", 1, "clear error, the new one stands", 1)


def test_metadata_that_cannot_be_read_is_not_removed(container: str) -> None:
    save(f"{container}/a")
    put(container, "a/.metadata", b"garbage")
    before = blobs_below(container)
    with pytest.raises(CorruptCheckpointError):
        remove_checkpoint(f"{container}/a", credential=KEY)
    assert blobs_below(container) == before


def test_data_that_could_not_be_removed_is_what_prune_finds(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/a")
    data = data_path(f"{container}/a")
    proxy.when("Delete", nth=2, times=None).do(Answer(403, "AuthorizationFailure"))
    remove_checkpoint(f"{proxied_container}/a", credential=KEY, options=TransferOptions(retry_seconds=0))
    assert blobs_below(container) == [data]
    with pytest.raises(CheckpointNotFoundError):
        AzureBlobReader(f"{container}/a", credential=KEY).read_metadata()
    [found] = prune(container, credential=KEY, grace=NOW, dry_run=False).remains
    assert found.blobs == [data]
    assert blobs_below(container) == []
