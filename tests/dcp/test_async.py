"""Asynchronous saves, in a thread and in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import DTensor

from azure_torch_ckpt import AzureBlobWriter, CheckpointExistsError
from tests.support import sharded
from tests.support.containers import blob_names
from tests.support.ranks import Ranks

# A checkpoint process has to start and to import torch.
SECONDS = 90.0
BOTH = pytest.mark.parametrize(
    "kind", [AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS], ids=["thread", "process"]
)


def begin(version: int, writer: AzureBlobWriter, kind: AsyncCheckpointerType, **options: Any) -> Future[Any]:
    """Start a save and then train on: the values in memory are no longer those that are saved."""
    state = sharded.rows(version)
    future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kind, **options)
    assert isinstance(future, Future)
    for tensor in state.values():
        if isinstance(tensor, DTensor):
            tensor.to_local().zero_()
    return future


def save_several(url: str, kind: AsyncCheckpointerType) -> None:
    writer = sharded.writer(url)
    for version in (1, 2, 3):
        begin(version, writer, kind).result(SECONDS)
        sharded.assert_version(url, version)
        dist.barrier()
    assert len(blob_names(url)) == dist.get_world_size() + 1


@BOTH
def test_several_saves_in_a_row(ranks: Ranks, container: str, kind: AsyncCheckpointerType) -> None:
    ranks(2).run(save_several, f"{container}/run", kind, seconds=SECONDS)


class FailingPlanner(dcp.DefaultSavePlanner):
    """Raises on the last rank."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ZeroDivisionError("on purpose")
        return super().resolve_data(write_item)


def fail_and_go_on(url: str, kind: AsyncCheckpointerType) -> list[dict[int, BaseException]]:
    """What two saves that fail tell this rank: one in its planner, one because it must not overwrite."""
    writer = sharded.writer(url)
    begin(1, writer, kind).result(SECONDS)
    heard = []
    for failing, planner in [(writer, FailingPlanner()), (sharded.writer(url, overwrite=False), None)]:
        error = begin(2, failing, kind, planner=planner).exception(SECONDS)
        assert isinstance(error, CheckpointException)
        heard.append({rank: failure for rank, (failure, _) in error.failures.items()})
        sharded.assert_version(url, 1)
        dist.barrier()
    begin(3, writer, kind).result(SECONDS)
    sharded.assert_version(url, 3)
    return heard


@BOTH
def test_a_future_has_the_error_of_a_save_that_failed(
    ranks: Ranks, container: str, kind: AsyncCheckpointerType
) -> None:
    for in_planner, existing in ranks(2).run(fail_and_go_on, f"{container}/run", kind, seconds=SECONDS):
        assert {rank: type(error) for rank, error in in_planner.items()} == {1: ZeroDivisionError}
        assert {rank: type(error) for rank, error in existing.items()} == {0: CheckpointExistsError}


class LatePlanner(dcp.DefaultSavePlanner):
    """Gives its data only once the main thread has ended and the interpreter is on its way out."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        deadline = time.monotonic() + 60
        with ThreadPoolExecutor(1) as probe:
            while time.monotonic() < deadline:
                try:
                    probe.submit(threading.get_ident).result()
                except RuntimeError:  # no new work after interpreter shutdown
                    return super().resolve_data(write_item)
        raise TimeoutError("the main thread goes on")


def save_and_end(url: str) -> None:
    """What a script does whose last line starts a save."""
    tensors = {f"tensor {number}": torch.full((1000,), float(number)) for number in range(20)}
    dcp.async_save(tensors, storage_writer=sharded.writer(url), planner=LatePlanner(), no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_save_that_nobody_waits_for_is_committed_before_the_process_ends(container: str) -> None:
    url = f"{container}/run"
    script = f"from {__name__} import save_and_end; save_and_end({url!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    state = {f"tensor {number}": torch.zeros(1000) for number in range(20)}
    dcp.load(state, storage_reader=sharded.reader(url), no_dist=True)
    assert all(torch.equal(state[f"tensor {number}"], torch.full((1000,), float(number))) for number in range(20))
