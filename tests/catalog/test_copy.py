"""`copy` within the service: the service moves the data, and an interrupted copy is invisible and continues."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobReader,
    AzureBlobWriter,
    BlobNotFoundError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CommitConflictError,
    CorruptCheckpointError,
    LocationError,
)
from azure_torch_ckpt.catalog import copy, list_checkpoints, verify
from azure_torch_ckpt.dcp.blob_names import new_save_id
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.progress import Progress
from tests.catalog.catalog_process import start
from tests.support.containers import container_sas, content, paths_below, plant, put, store_of
from tests.support.faults import Answer, Call, Kill
from tests.support.mixed_checkpoint import (
    KEY,
    assert_right,
    flip_in_storage,
    item_of,
    load,
    save,
    save_without_collectives,
)
from tests.support.proxy import FaultProxy, meet
from tests.support.put_block_from_url import FromUrlServer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

MIB = 1 << 20


def through(proxy: FaultProxy, url: str) -> str:
    return url.replace(url[: url.index("/devstoreaccount1")], proxy.endpoint.removesuffix("/devstoreaccount1"))


def test_the_service_moves_the_data_of_all_checkpoints_at_once(proxy: FaultProxy, container: str, other: str) -> None:
    for step in (1, 2):
        save(f"{container}/run/step-{step}", step)
    put(container, "run/step-1/meta.pt", b"a framework's own")
    put(container, f"run/step-1/{new_save_id()}/__0_0.distcp", b"of a failed save")
    put(container, f"run/step-3/{new_save_id()}/__0_0.distcp", b"of a running save")
    reports: list[Progress] = []
    report = copy(
        through(proxy, f"{container}/run"),
        through(proxy, f"{other}/deep/er"),
        credential=KEY,
        verify=False,
        progress=reports.append,
    )
    for step in (1, 2):
        assert_right(load(f"{other}/deep/er/step-{step}"), step)
    found = list_checkpoints(other, credential=KEY)
    assert [(entry.name, entry.complete, entry.blobs) for entry in found] == [
        ("deep/er/step-1", True, 3),
        ("deep/er/step-2", True, 2),
    ]
    assert content(other, "deep/er/step-1/meta.pt") == b"a framework's own"
    assert (report.blobs, report.skipped) == (5, 0)
    assert report.bytes == sum(entry.size for entry in found)
    data = report.bytes - sum(len(content(container, f"run/step-{step}/.metadata")) for step in (1, 2))
    assert (reports[0].operation, reports[0].url) == ("copy", through(proxy, f"{container}/run"))
    assert [(report.done, report.total) for report in (reports[0], reports[-1])] == [(0, data), (data, data)]
    # A listing of source and destination; for each checkpoint its metadata, read and written; and each other blob.
    assert [proxy.count(kind) for kind in ("List", "Get Blob", "Copy Blob", "Put Blob")] == [2, 2, 3, 2]
    assert proxy.count() == 9
    assert all(seen.kind == "Put Blob" for seen in proxy.log[-2:])  # the metadata, last


def test_a_second_copy_moves_nothing(proxy: FaultProxy, container: str, other: str) -> None:
    save(f"{container}/a", 1)
    copy(f"{container}/a", f"{other}/a", credential=KEY)
    reports: list[Progress] = []
    report = copy(
        through(proxy, f"{container}/a"),
        through(proxy, f"{other}/a"),
        credential=KEY,
        progress=reports.append,
    )
    assert (report.bytes, report.blobs, report.skipped) == (0, 0, 2)
    assert reports[-1].total == reports[-1].done > 0
    assert {seen.kind for seen in proxy.log} == {"List", "Get Blob"} and proxy.count("Get Blob") == 2


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_copy_that_is_killed_is_invisible_and_continues(
    proxy: FaultProxy, container: str, other: str, nth: int
) -> None:
    """Killed at the first blob, at the second one, and at the metadata."""
    url = f"{container}/alone"
    save_without_collectives(url, 0, 1)
    call = "copy(*args[:2], credential=args[2], options=TransferOptions(concurrency=1))"
    child = start(call, url, through(proxy, f"{other}/a"), KEY)
    kind = {1: "Copy Blob", 2: "Copy Blob", 3: "Put Blob"}[nth]
    proxy.when(kind, nth=2 if nth == 2 else 1).do(Kill(child.pid, "request"))  # type: ignore[arg-type]
    child.communicate(b"\n", timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert not any(entry.complete for entry in list_checkpoints(other, credential=KEY))
    report = copy(url, f"{other}/a", credential=KEY)
    assert report.skipped == nth - 1 and report.blobs == 4 - (nth - 1)
    assert [entry.complete for entry in list_checkpoints(other, credential=KEY)] == [True]
    assert verify(f"{other}/a", credential=KEY).ok
    assert len(paths_below(other)) == 4


def test_data_is_read_back_where_the_service_returns_no_checksum(proxy: FaultProxy, container: str, other: str) -> None:
    save(f"{container}/a")
    size = item_of(f"{container}/a", "large").length
    copy(f"{container}/a", through(proxy, f"{other}/a"), credential=KEY)
    assert sum(seen.sent for seen in proxy.requests("Get Blob")) > size
    flip_in_storage(f"{container}/a", item_of(f"{container}/a", "large"), 1000)
    with pytest.raises(CorruptCheckpointError, match="do not have the CRC64"):
        copy(f"{container}/a", f"{other}/b", credential=KEY)
    assert [entry.complete for entry in list_checkpoints(f"{other}/b", credential=KEY)] == [False]


@pytest.mark.parametrize("tells", [True, False])
def test_large_blobs_are_fetched_in_parts_by_the_service(
    azurite: Azurite, container: str, other: str, tells: bool
) -> None:
    state = {"x": torch.arange(20 * MIB, dtype=torch.int32)}
    dcp.save(state, storage_writer=AzureBlobWriter(f"{container}/a", credential=KEY))
    size = item_of(f"{container}/a", "x").length
    with FromUrlServer(azurite) as server:
        server.tells = tells
        source, target = (url.replace(azurite.endpoint, server.endpoint) for url in (container, other))
        copy(f"{source}/a", f"{target}/a", credential=KEY)
        assert sorted(server.fetched) == [(0, 64 * MIB), (64 * MIB, size - 64 * MIB)]
        # Nothing of the data came here, unless there was no other way to verify it.
        assert any(path.endswith(".distcp") for path in server.read) != tells
        assert verify(f"{other}/a", credential=KEY).ok
        server.damage = True
        with pytest.raises(CorruptCheckpointError):
            copy(f"{source}/a", f"{target}/b", credential=KEY)
        assert not any(entry.complete for entry in list_checkpoints(f"{other}/b", credential=KEY))


def test_what_the_service_cannot_fetch_goes_through_this_machine(
    proxy: FaultProxy, container: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As an emulator before Azurite 3.37 answers Put Block From URL."""
    proxy.when(lambda seen: "x-ms-copy-source" in seen.headers, times=None).do(Answer(501, "NotImplemented"))
    state = {"x": torch.arange(20 * MIB, dtype=torch.int32)}
    dcp.save(state, storage_writer=AzureBlobWriter(f"{container}/a", credential=KEY))
    with caplog.at_level(logging.INFO, "azure_torch_ckpt"):
        copy(f"{container}/a", through(proxy, f"{other}/a"), credential=KEY)
    [said] = [record.getMessage() for record in caplog.records if "goes through this machine" in record.getMessage()]
    assert "501" in said
    assert "sig=" not in caplog.text
    loaded = {"x": torch.zeros(20 * MIB, dtype=torch.int32)}
    dcp.load(loaded, storage_reader=AzureBlobReader(f"{other}/a", credential=KEY))
    assert torch.equal(loaded["x"], state["x"])


def test_between_two_services_with_credentials_of_their_own(
    azurite_tls: Azurite, container: str, token_credential: object, caplog: pytest.LogCaptureFixture
) -> None:
    save(f"{container}/a", 1)
    target = azurite_tls.create_container("to-" + container.rpartition("-")[2])
    place: dict[str, Any] = {"credential": token_credential, "ca_file": str(azurite_tls.certificate)}
    with caplog.at_level(logging.INFO, "azure_torch_ckpt"):
        report = copy(
            f"{container}/a",
            f"{target}/a",
            credential=KEY,
            dst_credential=token_credential,  # type: ignore[arg-type]
            ca_file=str(azurite_tls.certificate),
        )
    assert "goes through this machine" in caplog.text and "sig=" not in caplog.text
    assert report.blobs == 2
    assert_right(load(f"{target}/a", **place), 1)
    back = copy(
        f"{target}/a",
        f"{container}/b",
        credential=token_credential,  # type: ignore[arg-type]
        dst_credential=KEY,
        ca_file=str(azurite_tls.certificate),
    )
    assert back.blobs == 2
    assert_right(load(f"{container}/b"), 1)


def test_a_sas_in_each_url_suffices_and_stays_secret(
    container: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(f"{container}/run/step-1", 1)
    source = f"{container}/run?{container_sas(container, 'rl')}"
    target = f"{other}/run?{container_sas(other, 'rwdl')}"
    with caplog.at_level(logging.DEBUG, "azure_torch_ckpt"):
        report = copy(source, target, credential=False)
        [entry] = list_checkpoints(target, credential=False)
    assert report.blobs == 2
    assert entry.url == f"{other}/run/step-1"
    assert "sig=" not in caplog.text + repr(report) + repr(entry)
    with pytest.raises(AccessDeniedError) as caught:  # the source's SAS does not allow writing
        copy(target, source.replace("/run?", "/back?"), credential=False)
    assert "sig=" not in str(caught.value)


@pytest.fixture(scope="module")
def second_account() -> Iterator[tuple[str, str, str]]:
    """The URLs of a container in each of two accounts of one emulator, and the key of both."""
    with Accounts() as accounts:
        yield accounts.urls[0], accounts.urls[1], KEY


class Accounts:
    """One emulator with two accounts: a signature for one is not valid for the other."""

    def __enter__(self) -> Accounts:
        from azure_torch_ckpt._internal.azurite_installation import find_azurite

        node, script = find_azurite()
        options = ["--loose", "--skipApiVersionCheck", "--silent", "--inMemoryPersistence", "--disableTelemetry"]
        self._process = subprocess.Popen(
            [node, str(script), *options, "--blobPort", "0"],
            env={**os.environ, "AZURITE_ACCOUNTS": f"firstone:{KEY};secondone:{KEY}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        announced = (re.search(r"listens on (http://\S+:\d+)", line) for line in self._process.stdout)
        endpoint = next(match[1] for match in announced if match is not None)
        self.urls = [f"{endpoint}/{account}/data" for account in ("firstone", "secondone")]
        for url in self.urls:
            store_of(url).create_container()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def test_between_accounts_the_service_reads_the_source_with_a_signature(
    second_account: tuple[str, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    first, second, key = second_account
    save(f"{first}/a", 1)
    with caplog.at_level(logging.INFO, "azure_torch_ckpt"):
        assert copy(f"{first}/a", f"{second}/a", credential=key).blobs == 2
    assert "goes through this machine" not in caplog.text  # the service fetched; Azurite checks the SAS
    assert_right(load(f"{second}/a"), 1)


# ---- what the destination has ----------------------------------------------------------------------------------------


def test_another_checkpoint_is_replaced_only_on_request(container: str, other: str) -> None:
    save(f"{container}/a", 1)
    save(f"{other}/a", 2)
    save(f"{container}/b", 3)
    before = paths_below(other)
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        copy(container, other, credential=KEY)
    assert paths_below(other) == before  # not b either
    copy(f"{container}/a", f"{other}/a", credential=KEY, overwrite=True)
    assert_right(load(f"{other}/a"), 1)
    assert len(paths_below(other)) == 2  # the old data is gone


def test_a_save_that_was_committed_meanwhile_stays(proxy: FaultProxy, container: str, other: str) -> None:
    save(f"{container}/a", 1)
    proxy.when("Copy Blob").do(Call(lambda: save(f"{other}/a", 2), "request"))
    with pytest.raises(CommitConflictError):
        copy(f"{container}/a", through(proxy, f"{other}/a"), credential=KEY)
    assert_right(load(f"{other}/a"), 2)


@pytest.mark.parametrize("kind", ["Get Blob", "Copy Blob"])
def test_a_source_that_is_replaced_meanwhile_is_an_error(
    proxy: FaultProxy, container: str, other: str, kind: str
) -> None:
    save(f"{container}/a", 1)
    proxy.when(kind).do(Call(lambda: save(f"{container}/a", 2), "request"))  # type: ignore[arg-type]
    with pytest.raises((CheckpointReplacedError, BlobNotFoundError)):
        copy(through(proxy, f"{container}/a"), through(proxy, f"{other}/a"), credential=KEY)
    assert not any(entry.complete for entry in list_checkpoints(other, credential=KEY))
    copy(f"{container}/a", f"{other}/a", credential=KEY)
    assert_right(load(f"{other}/a"), 2)


def test_torchs_own_layout_is_hidden_while_it_is_replaced(
    proxy: FaultProxy, container: str, other: str, tmp_path: Path
) -> None:
    """Data of the same names: an interrupted copy would leave the old metadata over a mixture."""
    for version, where in ((1, container), (2, other)):
        dcp.save({"x": torch.full((9,), version)}, storage_writer=dcp.FileSystemWriter(tmp_path / str(version)))
        for file in (tmp_path / str(version)).iterdir():
            put(where, f"a/{file.name}", file.read_bytes())
    proxy.when("Copy Blob").do(Answer(412, "SourceConditionNotMet"))
    with pytest.raises(CheckpointReplacedError):
        copy(f"{container}/a", through(proxy, f"{other}/a"), credential=KEY, overwrite=True)
    assert [entry.complete for entry in list_checkpoints(other, credential=KEY)] == [False]
    copy(f"{container}/a", f"{other}/a", credential=KEY, overwrite=True)
    loaded = {"x": torch.zeros(9, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=AzureBlobReader(f"{other}/a", credential=KEY))
    assert loaded["x"].tolist() == [1] * 9


def test_metadata_of_the_other_kind_is_removed(container: str, other: str) -> None:
    for url in (f"{container}/a", f"{other}/b"):
        save_without_collectives(url, 0, 1)
    save(f"{other}/a", 1)
    save(f"{container}/b", 2)
    for name in ("a", "b"):
        copy(f"{container}/{name}", f"{other}/{name}", credential=KEY, overwrite=True)
    assert [path for path in paths_below(other) if path.endswith("metadata")] == [
        "a/__0.metadata",
        "a/__1.metadata",
        "b/.metadata",
    ]
    assert verify(f"{other}/a", credential=KEY).ok
    assert_right(load(f"{other}/b"), 2)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_source_without_all_its_data_is_refused_before_anything_is_copied(container: str, other: str) -> None:
    save(f"{container}/a")
    name = item_of(f"{container}/a", "large").relative_path
    data = content(container, f"a/{name}")
    put(container, f"a/{name}", data[:-1])
    with pytest.raises(CorruptCheckpointError, match=f"only {len(data) - 1} bytes long where {len(data)} are needed"):
        copy(container, other, credential=KEY)
    store_of(container).delete(f"a/{name}")
    with pytest.raises(CorruptCheckpointError, match="missing"):
        copy(container, other, credential=KEY)
    put(container, "a/.metadata", b"garbage")
    with pytest.raises(CorruptCheckpointError, match=r"a/\.metadata"):
        copy(container, other, credential=KEY)
    assert paths_below(other) == []


def test_nothing_to_copy_and_nowhere_to(container: str, other: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="No save"):
        copy(f"{container}/nothing", other, credential=KEY)
    put(container, f"a/{new_save_id()}/__0_0.distcp")
    with pytest.raises(CheckpointNotFoundError, match="1 incomplete save"):
        copy(container, other, credential=KEY)
    plant(container, ["run/step-1"])
    for src, dst in (("run", "run"), ("run", "run/copy"), ("run/step-1", "run")):
        with pytest.raises(LocationError, match="within the other"):
            copy(f"{container}/{src}", f"{container}/{dst}", credential=KEY)
    with pytest.raises(LocationError, match="both local paths"):
        copy(tmp_path / "a", tmp_path / "b")
    with pytest.raises(LocationError):
        copy("s3://bucket/run", tmp_path)
    copy(f"{container}/run", f"{container}/run-copy", credential=KEY)  # beside it, not within
    assert list_checkpoints(f"{container}/run-copy", credential=KEY)[0].complete


def test_an_empty_state_dict_can_be_copied(container: str, other: str) -> None:
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/empty", credential=KEY))
    report = copy(f"{container}/empty", f"{other}/empty", credential=KEY)
    assert (report.blobs, report.skipped) == (1, 0)
    assert verify(f"{other}/empty", credential=KEY).ok


def test_many_small_checkpoints_are_copied_in_parallel(proxy: FaultProxy, container: str, other: str) -> None:
    plant(container, [f"run/step-{step}" for step in range(100)])
    meet(proxy, 5, "Copy Blob")
    report = copy(f"{container}/run", through(proxy, f"{other}/run"), credential=KEY, verify=False)
    assert report.blobs == 200
    assert proxy.count() == 201
    assert len(list_checkpoints(other, credential=KEY)) == 100
