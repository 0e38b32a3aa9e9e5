"""`remove_checkpoint` deletes one checkpoint, its metadata first, and nothing else. Undeletable blobs stay."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Iterator

import pytest
import torch.distributed.checkpoint as dcp
from azure.storage.blob import BlobClient

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    BlobLocation,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
    RequestRefusedError,
    TransferOptions,
    remove_checkpoint,
    verify,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.catalog import list_checkpoints, prune
from tests.cli.command_process import cli
from tests.faults.tally import Tally
from tests.support.containers import paths_below, plant_leftovers, put
from tests.support.faults import Answer, Call
from tests.support.mixed_checkpoint import KEY, assert_right, data_path, load, save, save_without_collectives
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def test_remove_takes_the_metadata_first_and_leaves_the_rest(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/a", 1)
    save(f"{container}/a/inner", 2)
    put(container, "a/notes.txt")
    leftovers = plant_leftovers(container, "a")
    inner = paths_below(f"{container}/a/inner")
    data = data_path(f"{container}/a")
    remove_checkpoint(f"{proxied_container}/a", credential=KEY)
    deleted = [seen.path.partition(f"/{container.rpartition('/')[2]}/")[2] for seen in proxy.requests("Delete")]
    assert deleted == ["a/.metadata", data]
    assert sorted(paths_below(container)) == sorted([*inner, "a/notes.txt", *leftovers])
    assert_right(load(f"{container}/a/inner"), 2)
    with pytest.raises(CheckpointNotFoundError):
        remove_checkpoint(f"{container}/a", credential=KEY)


def test_remove_of_an_empty_state_dict_and_of_ranks_without_collectives(container: str) -> None:
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/empty", credential=KEY))
    save_without_collectives(f"{container}/alone", 0, 1, 2)
    assert len(paths_below(f"{container}/alone")) == 6
    for name in ("empty", "alone"):
        remove_checkpoint(f"{container}/{name}", credential=KEY)
    assert paths_below(container) == []


def test_a_checkpoint_that_was_replaced_meanwhile_stays(
    proxy: FaultProxy, container: str, proxied_container: str, tally: Tally
) -> None:
    save(f"{container}/a", 1)
    proxy.when("Delete").do(Call(lambda: save(f"{container}/a", 2), "request"))
    with pytest.raises(CheckpointReplacedError, match="replaced"):
        remove_checkpoint(f"{proxied_container}/a", credential=KEY)
    assert_right(load(f"{container}/a"), 2)
    assert len(paths_below(container)) == 2
    tally.add("checkpoint replaced while it is removed", 1, "clear error, the new one stands", 1)


def test_metadata_that_cannot_be_read_is_not_removed(container: str) -> None:
    save(f"{container}/a")
    put(container, "a/.metadata", b"garbage")
    before = paths_below(container)
    with pytest.raises(CorruptCheckpointError):
        remove_checkpoint(f"{container}/a", credential=KEY)
    assert paths_below(container) == before


def test_data_that_could_not_be_removed_is_what_prune_finds(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/a")
    data = data_path(f"{container}/a")
    proxy.when("Delete", nth=2, times=None).do(Answer(403, "AuthorizationFailure"))
    remove_checkpoint(f"{proxied_container}/a", credential=KEY, options=TransferOptions(retry_seconds=0))
    assert paths_below(container) == [data]
    with pytest.raises(CheckpointNotFoundError):
        AzureBlobReader(f"{container}/a", credential=KEY).read_metadata()
    [found] = prune(container, credential=KEY, grace=datetime.timedelta(0), dry_run=False).remains
    assert found.blobs == [data]
    assert paths_below(container) == []


NO_GRACE = datetime.timedelta(0)


@contextlib.contextmanager
def leased(url: str) -> Iterator[None]:
    location = BlobLocation.parse(url)
    blob = BlobClient(location.endpoint, location.container, location.path, credential=KEY)
    lease = blob.acquire_lease()
    try:
        yield
    finally:
        lease.release()


def data_of(container: str, step: int) -> str:
    """Return the URL of a checkpoint's data blob."""
    [path] = [path for path in paths_below(container) if f"/step-{step}/" in path and path.endswith(".distcp")]
    return f"{container}/{path}"


def steps(container: str) -> list[int | None]:
    return [entry.step for entry in list_checkpoints(container, credential=KEY) if entry.complete]


@pytest.fixture
def run(container: str) -> str:
    """The container with four checkpoints."""
    for step in range(4):
        save(f"{container}/run/step-{step}")
    return container


def test_every_prune_continues_past_leased_blobs(run: str) -> None:
    data = data_of(run, 1)
    with leased(f"{run}/run/step-0/.metadata"), leased(data):
        tried = prune(run, keep_last=1, grace=NO_GRACE, credential=KEY)
        assert [one.url for one in tried.undeleted] == [f"{run}/run/step-1"]
        for first in (True, False):
            report = prune(run, keep_last=1, grace=NO_GRACE, dry_run=False, credential=KEY)
            assert [entry.step for entry in report.removed] == ([2] if first else [])
            assert report.remains == []
            held, metadata = report.undeleted
            assert (held.url, held.blobs) == (f"{run}/run/step-1", [data.removeprefix(f"{run}/")])
            assert isinstance(held.error, RequestRefusedError) and "is leased" in str(held.error)
            assert (metadata.url, metadata.blobs) == (f"{run}/run/step-0", ["run/step-0/.metadata"])
            assert isinstance(metadata.error, RequestRefusedError) and metadata.error.error_code == "LeaseIdMissing"
            # Blobs that could not be deleted count neither as removed nor as freed.
            assert report.freed == sum(entry.size for entry in report.removed)
            assert not any("/step-2/" in path for path in paths_below(run))
            assert steps(run) == [0, 1, 3] == [entry.step for entry in report.kept]
            assert all(verify(f"{run}/run/step-{step}", credential=KEY).ok for step in (0, 1))
    report = prune(run, keep_last=1, grace=NO_GRACE, dry_run=False, credential=KEY)
    assert report.undeleted == [] and [entry.step for entry in report.removed] == [0, 1]
    assert steps(run) == [3] and len(paths_below(run)) == 2


def test_data_that_is_leased_after_the_listing_is_found_by_the_next_prune(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease comes between the listing and the removal: the listing is made to omit it."""
    data = data_of(run, 1)
    listed = BlobStore.list
    with leased(data), monkeypatch.context() as patch:
        patch.setattr(
            BlobStore, "list", lambda *args: (dataclasses.replace(one, leased=False) for one in listed(*args))
        )
        for first in (True, False):
            report = prune(run, keep_last=1, grace=NO_GRACE, dry_run=False, credential=KEY)
            assert [entry.step for entry in report.removed] == ([0, 1, 2] if first else [])
            assert [one.save_id for one in report.remains] == ([] if first else [data.split("/")[-2]])
            [left] = report.undeleted
            assert (left.url, left.blobs) == (f"{run}/run/step-1", [data.removeprefix(f"{run}/")])
            removed = sum(entry.size for entry in report.removed)
            assert report.freed == removed + (0 if first else left.size) - left.size
    assert prune(run, grace=NO_GRACE, dry_run=False, credential=KEY).undeleted == []
    assert steps(run) == [3] and len(paths_below(run)) == 2


def test_the_command_prune_exits_with_the_code_of_the_error(run: str) -> None:
    with leased(f"{run}/run/step-0/.metadata"):
        done = cli("prune", run, "--keep-last", "1", "--grace", "0s", "--yes")
        assert done.code == 7
        assert "removed 2 checkpoints" in done.err and "2 checkpoints stay" in done.err
        assert f"1 blob of {run}/run/step-0 could not be deleted" in done.err and "LeaseIdMissing" in done.err
        again = cli("prune", run, "--keep-last", "1", "--grace", "0s", "--yes", "--json")
        assert again.code == 7
        document = again.document("prune")
        [undeleted] = document["undeleted"]
        assert undeleted["blobs"] == ["run/step-0/.metadata"] and "LeaseIdMissing" in undeleted["error"]
        assert document["freed"] == 0 and document["removed"] == []
        assert cli("prune", run, "--keep-last", "1", "--grace", "0s").code == 0  # nothing was tried
    assert cli("prune", run, "--keep-last", "1", "--grace", "0s", "--yes").code == 0
    assert steps(run) == [3]


def test_the_command_rm_removes_the_others(run: str) -> None:
    urls = [f"{run}/run/step-{step}" for step in range(3)]
    with leased(f"{urls[0]}/.metadata"), leased(data_of(run, 1)):
        done = cli("rm", "--yes", "--json", *urls)
        assert done.code == 7
        document = done.document("rm")
        assert document["removed"] == urls[1:]
        assert [(one["url"], one["removed"]) for one in document["failed"]] == [(urls[0], False), (urls[1], True)]
        assert all("LeaseIdMissing" in one["error"] for one in document["failed"])
        assert steps(run) == [0, 3]
        said = cli("rm", "--yes", urls[0])
        assert said.code == 7 and f"{urls[0]} was not removed: could not delete" in said.err
        assert "removed 0 checkpoints" in said.err


def test_a_removal_returns_the_data_that_stays(run: str) -> None:
    data = data_of(run, 1)
    url = f"{run}/run/step-1"
    with leased(data):
        [(name, error)] = remove_checkpoint(url, credential=KEY).items()
        assert f"{url}/{name}" == data and isinstance(error, RequestRefusedError)
    assert steps(run) == [0, 2, 3]


def test_a_save_whose_predecessor_stays_succeeds(run: str, caplog: pytest.LogCaptureFixture) -> None:
    url, data = f"{run}/run/step-1", data_of(run, 1)
    with leased(data), caplog.at_level(logging.WARNING, "azure_torch_ckpt"):
        save(url, 1)
    assert f"could not remove {data}" in caplog.text and "LeaseIdMissing" in caplog.text
    assert_right(load(url), 1)


def test_a_save_over_leased_metadata_is_refused(run: str) -> None:
    url = f"{run}/run/step-1"
    with leased(f"{url}/.metadata"), pytest.raises(BaseException, match="412 LeaseIdMissing"):
        save(url, 1)
    assert_right(load(url))
