"""The ranks of a save without collectives agree on its id, without waiting for each other."""

from __future__ import annotations

from unittest import mock

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import CheckpointError, CommitConflictError
from azure_torch_ckpt.dcp import save_group
from azure_torch_ckpt.dcp.save_group import begin_group, raise_if_overtaken
from tests.support import sharded
from tests.support.containers import blob_names
from tests.support.ranks import Ranks


def group_ids(url: str) -> list[str]:
    """The ids of four saves, of which rank 1 misses the second and begins the third after rank 0."""
    rank, found = dist.get_rank(), [""] * 4
    for number in range(4):
        if (rank, number) == (1, 2):
            dist.barrier()
        if (rank, number) != (1, 1):
            group = begin_group(url, rank)
            assert group is not None and group.ranks == dist.get_world_size()
            found[number] = group.id
        if (rank, number) == (0, 2):
            dist.barrier()
        dist.barrier()  # as torch ends a save
    return found


def test_ranks_agree_on_the_save(ranks: Ranks, container: str) -> None:
    first, second = ranks(2).run(group_ids, f"{container}/run")
    assert len({*first}) == 4
    assert [first[0], *first[2:]] == [second[0], *second[2:]]
    others, _ = ranks(2).run(group_ids, f"{container}/other")
    again, _ = ranks(2).run(group_ids, f"{container}/run")
    assert not {*first} & {*again}
    assert {*others} <= {*first}  # only saves to one URL must differ
    alone = [begin_group("url", 0) for _ in range(2)]
    assert alone[0] != alone[1] and alone[0] is not None and alone[0].ranks == 1
    assert begin_group("url", 1) is None


def overtaken(url: str) -> None:
    rank = dist.get_rank()
    group = begin_group(url, rank)
    assert group is not None
    raise_if_overtaken(url, group)
    dist.barrier()
    if rank == 0:
        begin_group(url, rank)
    dist.barrier()
    if rank == 1:
        with pytest.raises(CommitConflictError, match="the next save"):
            raise_if_overtaken(url, group)


def test_metadata_of_an_earlier_save_is_not_committed_among_that_of_the_next(ranks: Ranks, container: str) -> None:
    ranks(2).run(overtaken, f"{container}/run")


class BrokenStore:
    def compare_set(self, *_: str) -> bytes:
        raise RuntimeError("connection lost")


def save_without_a_store(url: str) -> None:
    with mock.patch.object(save_group, "get_default_store", BrokenStore), pytest.raises(CheckpointError) as caught:
        dcp.save(sharded.plain(1), storage_writer=sharded.writer(url), use_collectives=False)
    assert "connection lost" in str(caught.value)


def test_a_store_that_does_not_answer(ranks: Ranks, container: str) -> None:
    ranks(2).run(save_without_a_store, f"{container}/run")
    assert not blob_names(f"{container}/run")
