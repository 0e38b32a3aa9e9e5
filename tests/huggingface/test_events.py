"""Events, log lines and progress of saves and loads in the HuggingFace layout."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as dump
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import CheckpointReplacedError
from azure_torch_ckpt.events import TransferEvent, listening
from azure_torch_ckpt.progress import Progress
from tests.huggingface import small_llama as hf
from tests.support.faults import Answer, Call
from tests.support.proxy import FaultProxy
from tests.support.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture
def heard() -> Iterator[list[TransferEvent]]:
    events: list[TransferEvent] = []
    with listening(events.append):
        yield events


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

    # A file of another writer, which is replaced while it is read.
    def put(sign: int) -> None:
        hf.put(f"{container}/model", "model.safetensors", dump({"a": sign * state["a"]}))

    put(1)
    proxy.when("Get Blob", nth=2).do(Call(lambda: put(-1), at="answer"))
    with pytest.raises(CheckpointException):
        dcp.load(state, storage_reader=hf.reader(f"{proxied_container}/model"))
    assert isinstance(heard[2].error, CheckpointReplacedError) and len(heard) == 3


def events_of_columns(url: str) -> tuple[list[TransferEvent], list[Progress]]:
    events: list[TransferEvent] = []
    reports: list[Progress] = []
    with listening(events.append):
        hf.save_columns(url, progress=reports.append)
    return events, reports


def test_the_coordinators_event_includes_what_it_joins(container: str, ranks: Ranks) -> None:
    (first, reports), (second, none) = ranks(2).run(events_of_columns, f"{container}/model")
    [leads], [follows] = first, second
    size = sum(value.nbytes for value in hf.model().state_dict().values())
    joined = sum(value.nbytes for value in hf.model().state_dict().values() if value.dim() == 2)
    assert leads.checkpoint_bytes == size and follows.checkpoint_bytes is None
    assert leads.bytes + follows.bytes == size + joined
    assert none == [] and reports[0].done == 0
    assert reports[-1].done == reports[-1].total == leads.bytes
    assert [report.total for report in reports] == [leads.bytes] * len(reports)
