"""Events and log lines of `copy` and `consolidate`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AccessDeniedError, AzureBlobWriter, CheckpointNotFoundError
from azure_torch_ckpt.catalog import consolidate, copy
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.events import TransferEvent, listening
from tests.support.faults import Answer
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

KEY = Azurite.account_key


@pytest.fixture
def heard() -> Iterator[list[TransferEvent]]:
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


def test_between_containers_the_requests_to_both_count(
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
