"""One rank fails: every rank hears of it, the old checkpoint stands, and the next save cleans up."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobWriter,
    CheckpointError,
    CommitConflictError,
    IncompleteSaveError,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp import removal
from tests.support import sharded
from tests.support.containers import KEY, blob_names
from tests.support.ranks import Ranks

WRONG_KEY = base64.b64encode(b"not the key of the emulator").decode()


class PlannedError(RuntimeError):
    """What a planner of these tests raises."""


class FailingPlanner(dcp.DefaultSavePlanner):
    """Raises on one rank: when it plans, or at the last of the items that it writes."""

    def __init__(self, rank: int, where: str) -> None:
        super().__init__()
        self.fails = dist.get_rank() == rank
        self.where = where
        self.left = -1

    def create_local_plan(self) -> SavePlan:
        if self.fails and self.where == "plan":
            raise PlannedError("in the plan")
        return super().create_local_plan()

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.left = len(new_plan.items)
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.left -= 1
        if self.fails and self.where == "write" and self.left == 0:
            raise PlannedError("at the last item")
        return super().resolve_data(write_item)


class ForgetfulPlanner(dcp.DefaultSavePlanner):
    """Drops an item on the last rank, after the coordinator has counted on it."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        if dist.get_rank() == dist.get_world_size() - 1:
            plan.items.pop()
        return plan


class RacingPlanner(dcp.DefaultSavePlanner):
    """Lets another save commit at the same URL between the plan and the commit of this one."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        if dist.get_rank() == 0:
            dcp.save(sharded.plain(100), storage_writer=sharded.writer(self.url), no_dist=True)
        return super().finish_plan(new_plan)


def save(url: str, version: int, planner: dcp.DefaultSavePlanner | None = None) -> None:
    dcp.save(sharded.rows(version), storage_writer=sharded.writer(url), planner=planner)


# Each returns the types of the errors that this rank heard of, by the rank that they happened on.
def fail_in_planner(url: str, rank: int, where: str, version: int) -> dict[int, str]:
    """Fail with a writer that has saved before or not; then save with the same one."""
    writer = sharded.writer(url)
    if version:
        dcp.save(sharded.rows(version), storage_writer=writer)
    stood = blob_names(url)
    dist.barrier()
    heard = sharded.failures(
        lambda: dcp.save(
            sharded.rows(version + 1), storage_writer=writer, planner=FailingPlanner(rank=rank, where=where)
        )
    )
    dist.barrier()
    if version:
        sharded.assert_version(url, version)
    left = blob_names(url)
    assert [name for name in left if name.endswith(".metadata")] == [".metadata"] * bool(version)
    assert set(stood) <= set(left)
    # The other ranks' blobs are there, for they had written theirs before they heard of the error.
    orphans = set(left) - set(stood)
    assert len(orphans) == (0 if where == "plan" else dist.get_world_size() - 1)
    dist.barrier()
    dcp.save(sharded.rows(version + 2), storage_writer=writer)
    sharded.assert_version(url, version + 2)
    after = blob_names(url)
    assert len(after) == dist.get_world_size() + 1
    assert not orphans & set(after)
    return {number: type(error).__name__ for number, error in heard.items()}


@pytest.mark.parametrize("version", [0, 1], ids=["nothing stood there", "a checkpoint stood there"])
@pytest.mark.parametrize("where", ["plan", "write"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_planner_that_raises_on_one_rank(ranks: Ranks, container: str, rank: int, where: str, version: int) -> None:
    heard = ranks(3).run(fail_in_planner, f"{container}/run", rank, where, version)
    assert heard == [{rank: "PlannedError"}] * 3


def fail_with_wrong_key(url: str, rank: int) -> dict[int, BaseException]:
    save(url, 1)
    stood = blob_names(url)
    dist.barrier()
    writer = AzureBlobWriter(url, credential=WRONG_KEY if dist.get_rank() == rank else KEY)
    heard = sharded.failures(lambda: dcp.save(sharded.rows(2), storage_writer=writer))
    dist.barrier()
    sharded.assert_version(url, 1)
    assert set(stood) <= set(blob_names(url))
    return heard


@pytest.mark.parametrize("rank", [0, 2])
def test_a_wrong_credential_on_one_rank(ranks: Ranks, container: str, rank: int) -> None:
    for heard in ranks(3).run(fail_with_wrong_key, f"{container}/run", rank):
        assert list(heard) == [rank]
        assert isinstance(heard[rank], AccessDeniedError)
        assert heard[rank].status == 403
        assert WRONG_KEY not in str(heard[rank])


def fail_incomplete(url: str) -> dict[int, BaseException]:
    save(url, 1)
    dist.barrier()
    stood = blob_names(url)
    dist.barrier()
    heard = sharded.failures(lambda: save(url, 2, ForgetfulPlanner()))
    assert blob_names(url) == stood
    sharded.assert_version(url, 1)
    return heard


def test_a_result_that_is_missing(ranks: Ranks, container: str) -> None:
    for heard in ranks(2).run(fail_incomplete, f"{container}/run"):
        assert list(heard) == [0]
        assert isinstance(heard[0], IncompleteSaveError)
        assert "1 of the planned items" in str(heard[0])


def lose_the_race(url: str, version: int) -> dict[int, BaseException]:
    if version:
        save(url, version)
    heard = sharded.failures(lambda: save(url, 50, RacingPlanner(url)))
    # The winner's two blobs, and nothing of the loser's.
    assert len(blob_names(url)) == 2
    sharded.assert_version(url, 100)
    return heard


@pytest.mark.parametrize("version", [0, 1], ids=["nothing stood there", "a checkpoint stood there"])
def test_another_save_that_commits_first(ranks: Ranks, container: str, version: int) -> None:
    for heard in ranks(2).run(lose_the_race, f"{container}/run", version):
        assert list(heard) == [0]
        assert isinstance(heard[0], CommitConflictError)


@pytest.mark.parametrize("broken", [(BlobStore, "delete"), (removal, "run_all")], ids=["a request", "the threads"])
def test_nothing_after_the_commit_fails_a_save(
    container: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: tuple[Any, str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("can't start new thread")

    dcp.save(sharded.plain(0), storage_writer=sharded.writer(container), no_dist=True)
    monkeypatch.setattr(*broken, fail)
    dcp.save(sharded.plain(1), storage_writer=sharded.writer(container), no_dist=True)
    assert "can't start new thread" in caplog.text
    sharded.assert_version(container, 1, sharded.plain, no_dist=True)


def save_apart(container: str) -> str:
    """Each rank to a URL of its own, as two overlapping saves whose collectives get mixed up would have it."""
    url = f"{container}/of-rank-{dist.get_rank()}"
    with pytest.raises(CheckpointException) as caught:
        dcp.save(sharded.rows(1), storage_writer=sharded.writer(url))
    assert not blob_names(url)
    error = caught.value.failures[0][0]
    assert isinstance(error, CheckpointError)
    return str(error)


def test_ranks_that_save_to_different_places(ranks: Ranks, container: str) -> None:
    for said in ranks(2).run(save_apart, container):
        assert re.match(
            r"Rank 1 saves to [\w/-]+/of-rank-1, and the coordinator to [\w/-]+/of-rank-0. Give all ranks", said
        )
