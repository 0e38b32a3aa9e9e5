"""Checkpoints by their ``azblob://`` URL, saved and loaded by torch and Lightning without this package's API."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.cloud_io import _atomic_save, _load, get_filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from azure_torch_ckpt.emulator import Azurite
from tests.filesystem.emulated_filesystem import azblob, connection_string, filesystem
from tests.support.faults import Answer
from tests.support.proxy import FaultProxy
from tests.support.sharded import assert_same, assert_version, empty, expected, failures, plain, rows

if TYPE_CHECKING:
    from tests.support.ranks import RankGroup

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Detected an existing checkpoint")

KEY = Azurite.account_key


@pytest.fixture(autouse=True)
def environment(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(container))


# Run by ranks


def save_by_url(url: str, version: int, sharded: bool, **save: Any) -> None:
    """Save as a program does that does not use this package."""
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = connection_string(url)
    dcp.save((rows if sharded else plain)(version), checkpoint_id=azblob(url), **save)


def load_by_url(url: str, version: int, sharded: bool) -> None:
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = connection_string(url)
    state = empty((rows if sharded else plain)(version))
    dcp.load(state, checkpoint_id=azblob(url))
    assert state.pop("step") == version
    for name, value in state.items():
        assert_same(value, expected(name, version), name)


def save_that_fails(url: str) -> list[str]:
    """Return the names of the errors that a save to a missing container raises, by rank."""
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = connection_string(url)
    return [type(error).__name__ for error in failures(lambda: dcp.save(rows(1), checkpoint_id=azblob(url))).values()]


def test_torch_saves_and_loads_by_url_alone(container: str):
    url = f"{container}/run/step-1"
    save_by_url(url, 0, False)
    load_by_url(url, 0, False)
    save_by_url(url, 1, False)
    load_by_url(url, 1, False)
    assert filesystem(container).find(azblob(url)) == [
        f"{azblob(url).removeprefix('azblob://')}/{name}" for name in (".metadata", "__0_0.distcp")
    ]
    assert_version(url, 1, plain)  # with our reader


def test_torch_loads_by_url_a_checkpoint_of_our_writer(container: str):
    url = f"{container}/run/step-1"
    dcp.save(plain(3), storage_writer=AzureBlobWriter(url, credential=KEY))
    load_by_url(url, 3, False)


def test_two_ranks_save_and_load_by_url_alone(container: str, ranks: Callable[[int], RankGroup]):
    url = f"{container}/run/step-1"
    for version in (0, 1):
        ranks(2).run(save_by_url, url, version, True)
        ranks(2).run(load_by_url, url, version, True)
    load_by_url(url, 1, False)


def test_a_failed_first_save_leaves_no_checkpoint(
    container: str, proxied_container: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    """The copy by which torch renames the metadata fails, on the service's side and through this machine."""
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(proxied_container))
    proxy.when(lambda seen: "x-ms-copy-source" in seen.headers, times=None).do(Answer(409, "PendingCopyOperation"))
    proxy.when("Get Blob").do(Answer(403, "AuthorizationFailure"))
    with pytest.raises(CheckpointException, match="AuthorizationFailure"):
        dcp.save(plain(0), checkpoint_id=f"{azblob(proxied_container)}/run")
    assert not filesystem(container).exists(f"{azblob(container)}/run/.metadata")
    with pytest.raises(CheckpointException):
        dcp.load(empty(plain(0)), checkpoint_id=f"{azblob(container)}/run")
    with pytest.raises(CheckpointException):
        dcp.load(empty(plain(0)), storage_reader=AzureBlobReader(f"{container}/run", credential=KEY))


def test_a_missing_checkpoint_is_an_error_on_every_rank(container: str, ranks: Callable[[int], RankGroup]):
    with pytest.raises(CheckpointException):
        dcp.load(empty(plain(0)), checkpoint_id=f"{azblob(container)}/none")
    names = ranks(2).run(save_that_fails, f"{container}missing/run")
    assert names[0] and names[0] == names[1]


def test_torch_converts_a_checkpoint_that_was_fetched(container: str, tmp_path: Path):
    """`format_utils` takes local folders only, so `get` and `put` copy the checkpoint."""
    fs = filesystem(container)
    url = f"{azblob(container)}/run"
    dcp.save(plain(2), checkpoint_id=url)
    fs.get(url, f"{tmp_path}/run", recursive=True)
    dcp_to_torch_save(tmp_path / "run", tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt")
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert_same(value, expected(name, 2), name)
    torch_save_to_dcp(tmp_path / "model.pt", tmp_path / "back")
    fs.put(f"{tmp_path}/back", f"{azblob(container)}/back", recursive=True)
    load_by_url(f"{container}/back", 2, False)
    with pytest.raises(CheckpointException):
        dcp_to_torch_save(url, tmp_path / "none.pt")


def test_a_checkpoint_is_a_path_as_lightning_expects(container: str):
    url = f"{azblob(container)}/run/epoch=1-step=2.ckpt"
    fs = get_filesystem(url)
    assert not fs.exists(url) and not fs.isdir(url)
    dcp.save(plain(0), checkpoint_id=url)
    assert fs.exists(url) and fs.isdir(url) and not fs.isfile(url) and fs.isfile(f"{url}/.metadata")
    fs.makedirs(url, exist_ok=True)
    assert [entry["name"].rpartition("/")[2] for entry in fs.ls(url)] == [".metadata", "__0_0.distcp"]
    fs.rm(url, recursive=True)
    assert not fs.exists(url) and fs.ls(azblob(container)) == []


def test_lightnings_own_files_are_written_whole_or_not_at_all(container: str):
    url = f"{azblob(container)}/last.ckpt"
    _atomic_save({"weights": torch.arange(10)}, url)
    assert torch.equal(_load(url, weights_only=True)["weights"], torch.arange(10))
    fs = get_filesystem(url)
    fs.rm(url, recursive=True)  # ModelCheckpoint removes files like this, too
    assert not fs.exists(url)


def test_a_removal_removes_the_metadata_first(container: str, proxied_container: str, proxy: FaultProxy):
    url = azblob(container) + "/run"
    dcp.save(plain(0), checkpoint_id=url)
    dcp.save(plain(0), storage_writer=AzureBlobWriter(f"{container}/run/other", credential=KEY))
    filesystem(proxied_container).rm(url, recursive=True)
    removed = [exchange.path.partition("/run/")[2] for exchange in proxy.requests("Delete")]
    assert {name.rpartition("/")[2] for name in removed[:2]} == {".metadata"}
    assert len(removed) == 4 and all(name.endswith(".distcp") for name in removed[2:])


def test_an_interrupted_removal_leaves_no_checkpoint(container: str, proxied_container: str, proxy: FaultProxy):
    url = azblob(container) + "/run"
    dcp.save(plain(0), checkpoint_id=url)
    proxy.when("Delete", nth=2).do(Answer(403, "AuthorizationFailure"))
    with pytest.raises(PermissionError):
        filesystem(proxied_container).rm(url, recursive=True)
    fs = filesystem(container)
    assert not fs.exists(f"{url}/.metadata") and fs.exists(f"{url}/__0_0.distcp")


def test_a_copy_writes_the_metadata_last(container: str, proxied_container: str, proxy: FaultProxy):
    dcp.save(plain(0), checkpoint_id=f"{azblob(container)}/run")
    filesystem(proxied_container).cp(f"{azblob(container)}/run", f"{azblob(container)}/copy", recursive=True)
    copied = [exchange.path.partition("/copy/")[2] for exchange in proxy.requests("Copy Blob")]
    assert copied == ["__0_0.distcp", ".metadata"]
    load_by_url(f"{container}/copy", 0, False)
