"""Copies are events and log lines, as saves and loads are; and `consolidate` refuses to write nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as dump
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobWriter,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    ConfigurationError,
)
from azure_torch_ckpt.catalog import consolidate, copy
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.events import TransferEvent, listening
from azure_torch_ckpt.progress import Progress
from tests.huggingface import small_llama as hf
from tests.support.faults import Answer, Call
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from tests.support.ranks import RankGroup

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

KEY = Azurite.account_key


@pytest.fixture
def heard() -> Any:
    events: list[TransferEvent] = []
    with listening(events.append):
        yield events


def save(url: str) -> None:
    dcp.save({"x": torch.arange(50_000.0), "step": 3}, storage_writer=AzureBlobWriter(url, credential=KEY))


def test_a_copy_is_an_event_and_a_line(
    container: str,
    proxied_container: str,
    proxy: FaultProxy,
    tmp_path: Path,
    heard: list[TransferEvent],
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(f"{container}/run/step-1")
    heard.clear()
    caplog.set_level(logging.INFO, "azure_torch_ckpt")
    proxy.when("Get Blob", nth=2).do(Answer(503, "ServerBusy"))
    report = copy(f"{proxied_container}/run", tmp_path / "run", credential=KEY)
    [event] = heard
    assert (event.operation, event.url, event.target) == ("copy", f"{proxied_container}/run", str(tmp_path / "run"))
    assert (event.items, event.bytes, event.error) == (report.blobs, report.bytes, None)
    assert (event.requests, event.retries) == (proxy.count(), 1)
    assert event.started < event.finished and event.seconds > 0
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("copied")]
    assert "requests, 1 retry) from" in line and line.endswith(f"/run to {tmp_path / 'run'}")
    again = copy(f"{container}/run", tmp_path / "run", credential=KEY)
    assert (heard[1].items, heard[1].bytes, again.skipped) == (0, 0, 2)
    assert "; 2 blobs were there already" in caplog.text


def test_between_containers_the_requests_of_both_ends_count(
    container: str, proxied_container: str, proxy: FaultProxy, heard: list[TransferEvent]
) -> None:
    save(f"{container}/run/step-1")
    heard.clear()
    copy(f"{proxied_container}/run", f"{proxied_container}/copy", credential=KEY)
    [event] = heard
    assert event.requests == proxy.count()


def test_copies_that_fail_are_events_with_their_errors(
    container: str, proxied_container: str, proxy: FaultProxy, tmp_path: Path, heard: list[TransferEvent]
) -> None:
    with pytest.raises(CheckpointNotFoundError):
        copy(f"{container}/nothing", tmp_path / "a", credential=KEY)
    with pytest.raises(CheckpointNotFoundError):
        consolidate(f"{container}/nothing", tmp_path / "a.pt", credential=KEY)
    assert [(event.operation, type(event.error), event.bytes) for event in heard] == [
        ("copy", CheckpointNotFoundError, 0),
        ("consolidate", CheckpointNotFoundError, 0),
    ]
    save(f"{container}/run")
    heard.clear()
    proxy.when("Get Blob", nth=2, times=None).do(Answer(403, "AuthorizationFailure"))
    with pytest.raises(AccessDeniedError):
        copy(f"{proxied_container}/run", tmp_path / "b", credential=KEY)
    assert isinstance(heard[0].error, AccessDeniedError) and heard[0].bytes == 0


def test_a_consolidation_is_an_event_and_a_line(
    container: str, tmp_path: Path, heard: list[TransferEvent], caplog: pytest.LogCaptureFixture
) -> None:
    save(f"{container}/run")
    heard.clear()
    caplog.set_level(logging.INFO, "azure_torch_ckpt")
    report = consolidate(f"{container}/run", tmp_path / "a.pt", credential=KEY)
    [event] = heard
    assert (event.operation, event.url, event.target) == ("consolidate", f"{container}/run", str(tmp_path / "a.pt"))
    assert (event.items, event.bytes) == (2, report.bytes)
    assert "consolidated 2" in caplog.text


def test_keys_that_accept_nothing_are_refused_and_nothing_is_written(container: str, tmp_path: Path) -> None:
    save(f"{container}/run")
    for target in (str(tmp_path / "a.pt"), f"{container}/a.safetensors"):
        with pytest.raises(ConfigurationError, match=r"none of the 2 keys of .*/run.*'x'"):
            consolidate(f"{container}/run", target, keys=lambda key: key.startswith("model."), credential=KEY)
    assert not list(tmp_path.iterdir())
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/empty", credential=KEY))
    with pytest.raises(ConfigurationError, match="is empty"):
        consolidate(f"{container}/empty", tmp_path / "b.pt", keys=lambda key: True, credential=KEY)


# The HuggingFace layout


def test_a_models_save_and_load_are_events_lines_and_progress(
    container: str,
    proxied_container: str,
    proxy: FaultProxy,
    heard: list[TransferEvent],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "azure_torch_ckpt")
    url = f"{proxied_container}/model"
    reports: list[Progress] = []
    state = {"a": torch.arange(50_000.0), "b": torch.ones(10)}
    proxy.when("Put Block").do(Answer(503, "ServerBusy"))
    dcp.save(state, storage_writer=hf.writer(url, progress=reports.append))
    saves = proxy.count()
    dcp.load(state, storage_reader=hf.reader(url, progress=reports.append))
    saved, loaded = heard
    assert (saved.operation, saved.url, saved.items, saved.bytes) == ("save", url, 2, 200_040)
    assert (saved.checkpoint_bytes, saved.requests, saved.retries) == (200_040, saves, 1)
    assert (loaded.operation, loaded.items, loaded.bytes) == ("load", 2, 200_040)
    assert loaded.requests == proxy.count() - saves
    for operation in ("save", "load"):
        mine = [report for report in reports if report.operation == operation]
        assert mine[0].done == 0 and mine[-1].done == mine[-1].total == 200_040
    assert "saved 200 kB in" in caplog.text and "loaded 200 kB in" in caplog.text


def test_models_that_cannot_be_saved_or_loaded_are_events(
    container: str, proxied_container: str, proxy: FaultProxy, heard: list[TransferEvent]
) -> None:
    state = {"a": torch.arange(50_000.0)}
    with pytest.raises(CheckpointException):
        dcp.save({**state, "step": 1}, storage_writer=hf.writer(f"{container}/model"))
    with pytest.raises(CheckpointException):
        dcp.load(state, storage_reader=hf.reader(f"{container}/model"))
    assert [(event.operation, event.error is None) for event in heard] == [("save", False), ("load", False)]

    # Somebody else's file, which is replaced while it is read.
    def put(sign: int) -> None:
        hf.put(f"{container}/model", "model.safetensors", dump({"a": sign * state["a"]}))

    put(1)
    proxy.when("Get Blob", nth=2).do(Call(lambda: put(-1), at="answer"))
    with pytest.raises(CheckpointException):
        dcp.load(state, storage_reader=hf.reader(f"{proxied_container}/model"))
    assert isinstance(heard[2].error, CheckpointReplacedError) and len(heard) == 3


def figures_of_columns(url: str) -> tuple[list[TransferEvent], list[Progress]]:
    events: list[TransferEvent] = []
    reports: list[Progress] = []
    with listening(events.append):
        hf.save_columns(url, progress=reports.append)
    return events, reports


def test_the_coordinators_figures_have_what_it_joins(container: str, ranks: Callable[[int], RankGroup]) -> None:
    from tests.catalog import test_catalog_events

    (first, reports), (second, none) = ranks(2).run(test_catalog_events.figures_of_columns, f"{container}/model")
    [leads], [follows] = first, second
    size = sum(value.nbytes for value in hf.model().state_dict().values())
    joined = sum(value.nbytes for value in hf.model().state_dict().values() if value.dim() == 2)
    assert leads.checkpoint_bytes == size and follows.checkpoint_bytes is None
    assert leads.bytes + follows.bytes == size + joined
    assert none == [] and reports[0].done == 0
    assert reports[-1].done == reports[-1].total == leads.bytes
    assert [report.total for report in reports] == [leads.bytes] * len(reports)
