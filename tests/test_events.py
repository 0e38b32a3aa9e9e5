"""Listeners are called for every save and load, including failed ones."""

from __future__ import annotations

import datetime
import functools
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobHuggingFaceReader,
    AzureBlobHuggingFaceWriter,
    AzureBlobReader,
    AzureBlobWriter,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitConflictError,
    CorruptCheckpointError,
    TransferOptions,
)
from azure_torch_ckpt.dcp.report import report_abandoned
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.events import TransferEvent, add_listener, listening, remove_listener
from tests.support import sharded
from tests.support.containers import container_sas, store_of
from tests.support.faults import Answer, Call
from tests.support.proxy import FaultProxy
from tests.support.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEY = Azurite.account_key
BLOCKS = TransferOptions(block_size=64 * 1024)


def state() -> dict[str, Any]:
    return {"weight": torch.arange(100_000.0), "step": 7}


def save(url: str, **options: Any) -> None:
    dcp.save(state(), storage_writer=AzureBlobWriter(url, credential=KEY, options=BLOCKS, **options))


def load(url: str) -> None:
    dcp.load(state(), storage_reader=AzureBlobReader(url, credential=KEY, options=BLOCKS))


def test_a_save_and_a_load_are_an_event_each(proxy: FaultProxy, proxied_container: str) -> None:
    url = f"{proxied_container}/run/step-1"
    heard: list[TransferEvent] = []
    before, began = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
    with listening(heard.append):
        save(url)
        requests = proxy.count()
        load(url)
    took = time.monotonic() - began
    saved, loaded = heard
    assert (saved.operation, loaded.operation) == ("save", "load")
    for event in heard:
        assert (event.url, event.rank, event.items, event.error, event.retries) == (url, 0, 2, None, 0)
        assert 400_000 < event.bytes < 410_000
        assert before <= event.started < event.finished <= datetime.datetime.now(datetime.timezone.utc)
        assert event.seconds > 0
    assert saved.seconds + loaded.seconds <= took
    assert saved.checkpoint_bytes == saved.bytes and loaded.checkpoint_bytes is None
    assert (saved.requests, loaded.requests) == (requests, proxy.count() - requests)


def test_retries_are_counted(proxy: FaultProxy, proxied_container: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "azure_torch_ckpt")
    proxy.when("Put Block", times=2).do(Answer(503, "ServerBusy"))
    proxy.when("Put Blob").do(Answer(500, "InternalError"))
    heard: list[TransferEvent] = []
    with listening(heard.append):
        save(f"{proxied_container}/run")
    assert (heard[0].retries, heard[0].requests) == (3, proxy.count())
    assert "requests, 3 retries) to" in caplog.text


def test_a_save_that_is_refused_is_an_event_with_its_error(container: str) -> None:
    save(f"{container}/run")
    heard: list[TransferEvent] = []
    with listening(heard.append), pytest.raises(CheckpointException):
        save(f"{container}/run", overwrite=False)
    (event,) = heard
    assert isinstance(event.error, CheckpointExistsError) and (event.bytes, event.checkpoint_bytes) == (0, None)


def test_a_save_that_breaks_off_tells_how_far_it_came(proxy: FaultProxy, proxied_container: str) -> None:
    proxy.when("Put Block", nth=4, times=None).do(Answer(403, "AuthorizationFailure"))
    heard: list[TransferEvent] = []
    with listening(heard.append), pytest.raises(CheckpointException):
        save(f"{proxied_container}/run")
    (event,) = heard
    assert isinstance(event.error, AccessDeniedError)
    assert event.items == 2 and event.bytes in {blocks * 64 * 1024 for blocks in range(4)}


def test_the_loser_of_a_race_is_an_event_with_its_error(proxy: FaultProxy, proxied_container: str) -> None:
    heard: list[TransferEvent] = []
    url = f"{proxied_container}/run"
    proxy.when("Put Blob").do(Call(functools.partial(save, url), "request"))
    with listening(heard.append), pytest.raises(CheckpointException):
        save(url)
    won, lost = heard
    assert won.error is None and isinstance(lost.error, CommitConflictError)
    assert lost.bytes == won.bytes and lost.checkpoint_bytes is None


def test_a_load_of_nothing_is_one_event_with_its_error(container: str) -> None:
    heard: list[TransferEvent] = []
    with listening(heard.append), pytest.raises(CheckpointException):
        load(f"{container}/nothing")
    (event,) = heard
    assert event.operation == "load" and isinstance(event.error, CheckpointNotFoundError)


@pytest.mark.parametrize("reader", [AzureBlobReader, AzureBlobHuggingFaceReader])
def test_metadata_that_cannot_be_read_is_one_event_for_each_call(container: str, reader: type[AzureBlobReader]) -> None:
    for name in ("run/.metadata", "run/model.safetensors"):
        store_of(container).put(name, b"garbage")
    heard: list[TransferEvent] = []
    with listening(heard.append):
        with pytest.raises(CheckpointException):
            dcp.load(state(), storage_reader=reader(f"{container}/run", credential=KEY))
        with pytest.raises(CorruptCheckpointError):
            reader(f"{container}/run", credential=KEY).read_metadata()
    assert [(event.operation, type(event.error)) for event in heard] == [("load", CorruptCheckpointError)] * 2


class EndsEarly(dcp.DefaultLoadPlanner):
    """Raises in one of its steps."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self._step = step

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name == self._step:
            raise ZeroDivisionError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("step", ["missing key", "create_local_plan", "create_global_plan", "finish_plan"])
def test_a_load_that_its_planner_ends_is_an_event_when_the_thread_begins_another(container: str, step: str) -> None:
    save(f"{container}/run")
    heard: list[TransferEvent] = []
    wanted = {"other": torch.zeros(1)} if step == "missing key" else state()
    reader = AzureBlobReader(f"{container}/run", credential=KEY)
    with listening(heard.append):
        with pytest.raises(CheckpointException):
            dcp.load(wanted, storage_reader=reader, planner=EndsEarly(step))
        load(f"{container}/run")
        load(f"{container}/run")
    ended, loaded, _ = heard
    assert ended.operation == "load" and ended.url == f"{container}/run" and loaded.error is None
    assert isinstance(ended.error, CheckpointError) and "broken off, by an error of its planner" in str(ended.error)
    assert ended.started <= ended.finished <= loaded.started


def test_a_save_that_its_planner_ends_is_an_event_and_reading_metadata_is_none(container: str) -> None:
    class Planner(dcp.DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            raise ZeroDivisionError

    heard: list[TransferEvent] = []
    with listening(heard.append):
        with pytest.raises(CheckpointException):
            dcp.save(state(), storage_writer=AzureBlobWriter(f"{container}/run", credential=KEY), planner=Planner())
        with pytest.raises(CheckpointError, match="use_collectives"):
            writer = AzureBlobHuggingFaceWriter(f"{container}/run", credential=KEY)
            dcp.save({"w": torch.ones(1)}, storage_writer=writer, use_collectives=False)
        save(f"{container}/run")
        AzureBlobReader(f"{container}/run", credential=KEY).read_metadata()  # that is all that is wanted
        load(f"{container}/run")
    events = [(event.operation, type(event.error)) for event in heard]
    ended = ("save", CheckpointError)
    assert events == [ended, ended, ("save", type(None)), ("load", type(None))]


def test_what_was_broken_off_is_told_at_the_end_of_the_process(container: str) -> None:
    save(f"{container}/run")
    code = (
        "import torch, torch.distributed.checkpoint as dcp\n"
        "from azure_torch_ckpt import AzureBlobReader\n"
        "from azure_torch_ckpt.events import add_listener\n"
        "add_listener(lambda event: print(event.operation, type(event.error).__name__, flush=True))\n"
        f"reader = AzureBlobReader({container + '/run'!r}, credential={KEY!r})\n"
        "dcp.load({'other': torch.zeros(1)}, storage_reader=reader)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and "Missing key" in done.stderr
    assert done.stdout == "load CheckpointError\n"


def test_a_listener_that_raises_is_logged_and_the_others_are_called(
    container: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[TransferEvent] = []

    def broken(event: TransferEvent) -> None:
        raise ZeroDivisionError("no database")

    with listening(broken), listening(heard.append):
        save(f"{container}/run")
    assert len(heard) == 1
    assert "a listener failed on the save of" in caplog.text and "ZeroDivisionError: no database" in caplog.text


def test_a_removed_listener_hears_nothing(container: str) -> None:
    heard: list[TransferEvent] = []
    add_listener(heard.append)
    remove_listener(heard.append)
    save(f"{container}/run")
    assert not heard
    with pytest.raises(ValueError, match="not in list"):
        remove_listener(heard.append)


def test_no_event_has_a_secret(container: str) -> None:
    sas = container_sas(container, "rwdl")
    heard: list[TransferEvent] = []
    with listening(heard.append):
        dcp.save(state(), storage_writer=AzureBlobWriter(f"{container}/run?{sas}"))
        with pytest.raises(CheckpointException):
            dcp.save(state(), storage_writer=AzureBlobWriter(f"{container}/run?{sas}", overwrite=False))
    signature = sas.rpartition("sig=")[2]
    assert [event.url for event in heard] == [f"{container}/run"] * 2
    for event in heard:
        assert "sig=" not in repr(event) and signature.encode() not in pickle.dumps(event)


class FailingPlanner(dcp.DefaultSavePlanner):
    """Raises on the last rank."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ZeroDivisionError("on purpose")
        return super().resolve_data(write_item)


def events_of_this_rank(url: str) -> list[tuple[str, int, int, int | None, str]]:
    report_abandoned(threading.current_thread())  # what an earlier test in this process has left
    heard: list[TransferEvent] = []
    with listening(heard.append):
        dcp.save(sharded.rows(1), storage_writer=sharded.writer(url))
        dcp.load(sharded.empty(sharded.rows(1)), storage_reader=sharded.reader(url))
        dist.barrier()
        try:
            dcp.save(sharded.rows(2), storage_writer=sharded.writer(url), planner=FailingPlanner())
        except CheckpointException:
            heard.append(heard[-1])  # a mark: nothing of this rank comes after it
        dcp.save(sharded.rows(3), storage_writer=sharded.writer(f"{url}-3"), use_collectives=False)
    return [
        (event.operation, event.rank, event.bytes, event.checkpoint_bytes, type(event.error).__name__)
        for event in heard
    ]


def test_every_rank_has_its_own_event_and_the_coordinator_knows_the_whole(ranks: Ranks, container: str) -> None:
    first, second = ranks(2).run(events_of_this_rank, f"{container}/run")
    assert [event[1] for event in first] == [0] * len(first) and {event[1] for event in second} == {1}
    # The coordinator's own part of the failed save succeeded; it learns of the failure when it saves again.
    assert [(event[0], event[4]) for event in first] == [
        ("save", "NoneType"),
        ("load", "NoneType"),
        ("load", "NoneType"),
        ("save", "CheckpointError"),
        ("save", "NoneType"),
    ]
    assert [(event[0], event[4]) for event in second] == [
        ("save", "NoneType"),
        ("load", "NoneType"),
        ("save", "ZeroDivisionError"),
        ("save", "ZeroDivisionError"),
        ("save", "NoneType"),
    ]
    assert first[0][3] == first[0][2] + second[0][2] and second[0][3] is None
    assert first[-1][3] == first[-1][2] and second[-1][3] == second[-1][2]  # each commits its own


def test_a_listener_of_a_file_survives_a_thread_of_its_own(container: str, tmp_path: Path) -> None:
    """An asynchronous save tells in the thread that saves."""
    heard = tmp_path / "heard"
    with listening(lambda event: heard.write_text(event.url)):
        writer = AzureBlobWriter(f"{container}/run", credential=KEY)
        dcp.async_save(state(), storage_writer=writer, no_dist=True).result(60)  # type: ignore[union-attr]
        assert heard.read_text() == f"{container}/run"


def test_the_example_writes_what_tensorboard_reads(container: str, tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "metrics.py"
    path = os.pathsep.join([str(example.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, example, f"{container}/run"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2  checkpoint/save/failed  0" in done.stdout and "step 3  checkpoint/load/retries  0" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    board = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in board.Scalars("checkpoint/save/bytes")] == [1, 2, 3]
    assert board.Scalars("checkpoint/save/bytes")[0].value > 4_000_000
