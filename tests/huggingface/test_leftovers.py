"""What a killed save of a model left behind: `prune` and the next save remove it, and never a file of a model."""

from __future__ import annotations

import datetime
import json
import signal
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    BlobLocation,
    CommitConflictError,
    CorruptCheckpointError,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.catalog import PruneReport, list_checkpoints, prune, verify
from azure_torch_ckpt.credentials import Access
from tests.huggingface import small_llama as hf
from tests.support import jobs
from tests.support.faults import Call, Flip, Kill
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

NO_GRACE = datetime.timedelta(0)


def pruned(url: str, **how: Any) -> PruneReport:
    return prune(url, credential=hf.KEY, **{"grace": NO_GRACE, "dry_run": False, **how})


def named(url: str) -> set[str]:
    return {*json.loads(hf.get(url, hf.INDEX))["weight_map"].values(), hf.INDEX}


def killed_save(url: str, proxied: str, proxy: FaultProxy, version: int = 1) -> None:
    """All files are there, and the index is not."""
    with jobs.Job(hf.save_alone, [(proxied, version)]) as job:
        proxy.when("Put Blob").do(Kill(job.pid(), at="request"))
        job.go()
        assert job.end().exitcode == -signal.SIGKILL


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_a_killed_save_go_and_the_model_stays(
    url: str, container: str, proxied: str, proxy: FaultProxy, overwrite: bool
) -> None:
    if overwrite:
        hf.save_alone(url, 0)
    before = set(hf.files(url))
    killed_save(url, proxied, proxy)
    left = set(hf.files(url)) - before
    assert left
    assert pruned(container, grace=datetime.timedelta(hours=1)).remains == []  # it may still run
    [found] = pruned(container, dry_run=True).remains
    assert {path.rpartition("/")[2] for path in found.blobs} == left and found.url == url
    assert set(hf.files(url)) == before | left
    assert [one.save_id for one in pruned(url).remains] == [found.save_id]
    assert set(hf.files(url)) == before
    if overwrite:
        hf.load_alone(url, 0)
    assert pruned(container).remains == []


def test_shards_that_were_to_be_joined_go(url: str) -> None:
    hf.save_alone(url)
    save_id = hf.files(url)[0].split("-")[1]
    hf.put(url, f"model-{save_id}-000001.shards", bytes(10))
    hf.put(url, f"model-{'a' * 16}-000000.shards", bytes(10))
    hf.put(url, "model-of-mine.safetensors", bytes(10))
    assert sum(one.size for one in pruned(url).remains) == 20
    assert set(hf.files(url)) == named(url) | {"model-of-mine.safetensors"}
    hf.load_alone(url)


def test_a_model_costs_no_request_and_one_in_doubt_costs_one(url: str, proxied: str, proxy: FaultProxy) -> None:
    hf.save_alone(url)
    assert pruned(proxied).remains == []
    assert proxy.count("Get Blob") == 0
    hf.put(url, f"model-{'a' * 16}-00001-of-00001.safetensors", b"")
    assert len(pruned(proxied).remains) == 1
    assert proxy.count("Get Blob") == 1
    hf.load_alone(url)


def test_files_that_an_index_of_another_name_names_stay(url: str) -> None:
    name = f"model-{'a' * 16}-00001-of-00001.safetensors"
    hf.put(url, name, bytes(10))
    hf.put(url, "text_encoder.safetensors.index.json", json.dumps({"weight_map": {"w": name}}).encode())
    assert pruned(url).remains == []
    assert name in hf.files(url)


def test_an_index_that_cannot_be_read_stops_all_removals(url: str) -> None:
    name = f"model-{'a' * 16}-00001-of-00001.safetensors"
    hf.put(url, hf.INDEX, b"{")
    hf.put(url, name, bytes(10))
    hf.put(url, name.replace("a" * 16, "b" * 16), bytes(10))
    with pytest.raises(CorruptCheckpointError, match="not JSON"):
        pruned(url)
    assert name in hf.files(url)


def test_a_save_that_is_committed_meanwhile_is_left_alone(url: str, proxied: str, proxy: FaultProxy) -> None:
    """Between the listing and the look at the index."""
    hf.save_alone(url, 0)
    index, old = hf.get(url, hf.INDEX), set(hf.files(url)) - {hf.INDEX}
    store = BlobStore(BlobLocation.parse(url), Access(hf.KEY))
    assert store.delete(BlobLocation.parse(url).join(hf.INDEX).path)
    proxy.when("Get Blob").do(Call(lambda: hf.put(url, hf.INDEX, index), at="request"))
    assert pruned(proxied).remains == []
    assert set(hf.files(url)) == old | {hf.INDEX}
    hf.load_alone(url, 0)


def test_a_damaged_answer_costs_no_file(url: str, proxied: str, proxy: FaultProxy) -> None:
    """One letter of a file's name changes in the index on its way: then that file must not pass for a leftover."""
    hf.save_alone(url)
    hf.put(url, f"model-{'a' * 16}-00001-of-00001.safetensors", b"left over")
    where = hf.get(url, hf.INDEX).index(b"-of-") - 2
    proxy.when("Get Blob").do(Flip(where))
    with pytest.raises(CorruptCheckpointError, match="MD5"):
        pruned(proxied)
    hf.load_alone(url)
    assert len(pruned(proxied).remains) == 1
    hf.load_alone(url)


# ---- What the next save does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_next_save_removes_what_a_killed_one_left(
    url: str, proxied: str, proxy: FaultProxy, overwrite: bool
) -> None:
    """Readers that list files would mix it with the new model."""
    if overwrite:
        hf.save_alone(url, 0)
    killed_save(url, proxied, proxy)
    hf.put(url, f"model-{'a' * 16}-000000.shards", bytes(10))
    hf.put(url, "model-of-mine.safetensors", bytes(10))
    hf.save_alone(url, 2)
    hf.load_alone(url, 2)
    assert set(hf.files(url)) == named(url) | {"model-of-mine.safetensors"}


def test_the_next_save_leaves_what_another_index_may_name(url: str) -> None:
    name = f"model-{'a' * 16}-00001-of-00001.safetensors"
    hf.put(url, name, bytes(10))
    hf.put(url, "text_encoder.safetensors.index.json", json.dumps({"weight_map": {"w": name}}).encode())
    hf.save_alone(url, 1)
    assert name in hf.files(url)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_saves_the_one_that_commits_first_may_remove_the_files_of_the_other(
    url: str, proxied: str, proxy: FaultProxy, overwrite: bool
) -> None:
    """The other has made all its files, and is about to write its index: its condition does not hold any more."""
    if overwrite:
        hf.save_alone(url, 0)
    proxy.when("Put Blob").do(Call(lambda: hf.save_alone(url, 1), at="request"))
    with pytest.raises(CheckpointException) as caught:
        hf.save_alone(proxied, 2)
    assert isinstance(caught.value.failures[0][0], CommitConflictError)
    hf.load_alone(url, 1)
    assert set(hf.files(url)) == named(url)


def test_ls_and_verify_tell_of_a_second_set_of_files(
    url: str, container: str, proxied: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    hf.save_alone(url, 0)
    sound = set(hf.files(url)) - {hf.INDEX}
    report = verify(url, credential=hf.KEY)
    assert report.ok and {blob.name for blob in report.blobs} == sound
    assert sum(blob.checked for blob in report.blobs) == len(hf.odd()) and not any(
        blob.without_checksum for blob in report.blobs
    )
    list_checkpoints(container, credential=hf.KEY)
    assert "vLLM" not in caplog.text
    killed_save(url, proxied, proxy)
    strays = set(hf.files(url)) - sound - {hf.INDEX}
    report = verify(url, credential=hf.KEY)
    assert {blob.name for blob in report.blobs if blob.problems} == strays and not report.ok
    list_checkpoints(container, credential=hf.KEY)
    assert f"{url} has files of several saves of a model" in caplog.text
    hf.save_alone(url, 2)
    assert verify(url, credential=hf.KEY).ok


def test_verify_finds_damage_in_a_model(url: str) -> None:
    hf.save_alone(url, 0)
    name = sorted(set(hf.files(url)) - {hf.INDEX})[0]
    data = bytearray(hf.get(url, name))
    data[-1] ^= 1
    hf.put(url, name, bytes(data))
    report = verify(url, credential=hf.KEY)
    assert [blob.name for blob in report.blobs if blob.problems] == [name]
    assert "CRC64" in report.problems[0]
