"""Every way that torch offers to save: many times, with cached plans, on part of the ranks, with other planners."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from azure_torch_ckpt import CheckpointExistsError
from tests.support import sharded
from tests.support.containers import blob_names, data_blobs, download
from tests.support.ranks import Ranks


def metadata_of(url: str) -> Metadata:
    return sharded.reader(url).read_metadata()


# ---- One writer, many saves ----------------------------------------------------------------------------------------


def save_again_and_again(url: str, times: int, cached: bool) -> list[set[str]]:
    """Save new values at the same URL with one writer; returns the data blobs after each save."""
    writer = sharded.writer(url)
    stood = []
    for version in range(1, times + 1):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=cached)
        dcp.save(sharded.rows(version), storage_writer=writer, planner=planner)
        stood.append(data_blobs(url))
        sharded.assert_version(url, version)
    return stood


@pytest.mark.parametrize("cached", [False, True], ids=["planned anew", "cached plans"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_each_save_has_blobs_of_its_own_and_removes_the_old_ones(
    ranks: Ranks, container: str, world_size: int, cached: bool
) -> None:
    stood = ranks(world_size).run(save_again_and_again, f"{container}/run", 4, cached)[0]
    assert len(set.union(*stood)) == 4 * world_size
    assert [len(names) for names in stood] == [world_size] * 4


class GrowingPlanner(dcp.DefaultSavePlanner):
    """Has a cache of its own: torch keeps one per class of planner, for as long as the process lives."""


def save_what_grows(url: str) -> None:
    writer = sharded.writer(url)
    # The same plan twice; a new key on one rank only, so that the other ranks' plans come from the cache; and again.
    for version, keys in enumerate([0, 0, 1, 1, 2]):
        state = sharded.rows(version)
        state["common"] = torch.full((3,), float(version))
        if dist.get_rank() == 1:
            state |= {f"extra {number}": torch.full((2,), float(version)) for number in range(keys)}
        dcp.save(state, storage_writer=writer, planner=GrowingPlanner(enable_plan_caching=True))
        sharded.assert_version(url, version)
        extra = {f"extra {number}": torch.zeros(2) for number in range(keys)}
        dcp.load(extra, storage_reader=sharded.reader(url))
        assert all(torch.equal(tensor, torch.full((2,), float(version))) for tensor in extra.values())
        found = {name for name in metadata_of(url).state_dict_metadata if name.startswith("extra")}
        assert found == set(extra)
        assert len(data_blobs(url)) == dist.get_world_size()
        dist.barrier()


def test_plans_that_change_on_one_rank_only(ranks: Ranks, container: str) -> None:
    ranks(3).run(save_what_grows, f"{container}/run")


def save_at_many_urls(container: str, cached: bool) -> None:
    writer = sharded.writer(f"{container}/run/step-0")
    for version in (1, 2, 3):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=cached)
        url = f"{container}/run/step-{version}"
        dcp.save(sharded.rows(version), storage_writer=writer, checkpoint_id=url, planner=planner)
    assert not blob_names(f"{container}/run/step-0")
    reader = sharded.reader(f"{container}/run/step-0")
    for version in (1, 2, 3):
        url = f"{container}/run/step-{version}"
        assert len(blob_names(url)) == dist.get_world_size() + 1
        state = sharded.empty(sharded.rows())
        dcp.load(state, storage_reader=reader, checkpoint_id=url)
        for name in sharded.GLOBAL:
            sharded.assert_same(state[name], sharded.expected(name, version), name)


@pytest.mark.parametrize("cached", [False, True], ids=["planned anew", "cached plans"])
def test_one_writer_and_one_reader_for_many_urls(ranks: Ranks, container: str, cached: bool) -> None:
    ranks(2).run(save_at_many_urls, container, cached)


# ---- Part of the ranks ---------------------------------------------------------------------------------------------


def save_alone(container: str) -> None:
    rank = dist.get_rank()
    url = f"{container}/rank-{rank}"
    dcp.save(sharded.plain(rank + 1), storage_writer=sharded.writer(url), no_dist=True)
    sharded.assert_version(url, rank + 1, sharded.plain, no_dist=True)


def test_each_rank_by_itself(ranks: Ranks, container: str) -> None:
    ranks(2).run(save_alone, container)
    for rank in (0, 1):
        names = blob_names(f"{container}/rank-{rank}")
        assert len(names) == 2
        assert ".metadata" in names


def save_on_a_group(url: str, members: list[int]) -> bool:
    group = dist.new_group(members)
    inside = dist.get_rank() in members
    if inside:
        state: dict[str, Any] = {**sharded.plain(4), "leader": f"rank {dist.get_rank()}"}
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        dcp.save(state, storage_writer=sharded.writer(url), process_group=group, planner=planner)
        sharded.assert_version(url, 4, sharded.plain, process_group=group)
    dist.barrier()
    # And the whole world reads what a part of it wrote.
    sharded.assert_version(url, 4)
    found = {"leader": ""}
    dcp.load(found, storage_reader=sharded.reader(url))
    assert found["leader"] == f"rank {members[0]}"
    return inside


def test_a_group_without_rank_0(ranks: Ranks, container: str) -> None:
    assert ranks(3).run(save_on_a_group, f"{container}/group", [1, 2]) == [False, True, True]


# ---- Without collectives -------------------------------------------------------------------------------------------


def own(version: int) -> dict[str, Any]:
    """What differs from rank to rank: without collectives nothing is shared."""
    rank = dist.get_rank()
    return {"tensor": sharded.values(f"rank {rank}", (5, 3), torch.float32, version), "object": f"{rank}:{version}"}


def save_without_collectives(url: str, version: int) -> None:
    dcp.save(own(version), storage_writer=sharded.writer(url), use_collectives=False)


def load_without_collectives(url: str, version: int, folder: str | None) -> None:
    """With our reader, or with torch's where the blobs have been copied to a folder."""
    state: dict[str, Any] = {"tensor": torch.zeros(5, 3), "object": ""}
    dcp.load(state, storage_reader=sharded.reader(url) if folder is None else dcp.FileSystemReader(folder))
    wanted = own(version)
    sharded.assert_same(state["tensor"], wanted["tensor"], "tensor")
    assert state["object"] == wanted["object"]


def test_without_collectives(ranks: Ranks, container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    for version in (1, 2):
        ranks(2).run(save_without_collectives, url, version)
        names = blob_names(url)
        assert {name for name in names if "/" not in name} == {"__0.metadata", "__1.metadata"}
        data = [name for name in names if "/" in name]
        assert sorted(name.rpartition("/")[2] for name in data) == ["__0_0.distcp", "__1_0.distcp"]
        ranks(2).run(load_without_collectives, url, version, None)
    download(url, tmp_path)
    ranks(2).run(load_without_collectives, url, 2, os.fspath(tmp_path))


def refuse_without_collectives(url: str) -> None:
    with pytest.raises(CheckpointExistsError, match="use_collectives=False"):
        dcp.save(own(2), storage_writer=sharded.writer(url), use_collectives=False)
    dist.barrier()
    sharded.assert_version(url, 1)


def save_rows(url: str, version: int) -> None:
    dcp.save(sharded.rows(version), storage_writer=sharded.writer(url))


def test_without_collectives_is_refused_where_a_checkpoint_of_all_ranks_stands(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_rows, url, 1)
    stood = blob_names(url)
    ranks(2).run(refuse_without_collectives, url)
    assert blob_names(url) == stood


# ---- Planners ------------------------------------------------------------------------------------------------------


class RenamePlanner(dcp.DefaultSavePlanner):
    """Rewrites the state dict, as in the docstring of torch's `SavePlanner`."""

    def set_up_planner(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_up_planner({f"renamed {key}": value for key, value in state_dict.items()}, *args, **kwargs)


def save_renamed(url: str) -> None:
    dcp.save(sharded.rows(3), storage_writer=sharded.writer(url), planner=RenamePlanner())
    state = {f"renamed {key}": value for key, value in sharded.empty(sharded.rows()).items()}
    dcp.load(state, storage_reader=sharded.reader(url))
    assert state["renamed step"] == 3
    for name in sharded.GLOBAL:
        sharded.assert_same(state[f"renamed {name}"], sharded.expected(name, 3), name)


def test_a_planner_that_renames(ranks: Ranks, container: str) -> None:
    ranks(2).run(save_renamed, f"{container}/run")


class HalfPlanner(dcp.DefaultSavePlanner):
    """Saves floating point as float16, and says so in the plan if `planned`."""

    def __init__(self, planned: bool) -> None:
        super().__init__()
        self.planned = planned

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            data = item.tensor_data
            if self.planned and data is not None and data.properties.dtype.is_floating_point:
                data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        value = super().resolve_data(write_item)
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return value.to(torch.float16)
        return value


def save_half(url: str, planned: bool) -> None:
    dcp.save(sharded.rows(2), storage_writer=sharded.writer(url), planner=HalfPlanner(planned))
    state = sharded.empty(sharded.rows())
    dcp.load(state, storage_reader=sharded.reader(url))
    for name, (_, dtype) in sharded.GLOBAL.items():
        wanted = sharded.expected(name, 2)
        if dtype.is_floating_point:
            wanted = wanted.to(torch.float16).to(dtype)
        sharded.assert_same(state[name], wanted, name)
    entry = metadata_of(url).state_dict_metadata["even"]
    assert isinstance(entry, TensorStorageMetadata)
    assert entry.properties.dtype == (torch.float16 if planned else torch.float32)


@pytest.mark.parametrize("planned", [True, False], ids=["as planned", "behind the plan's back"])
def test_a_planner_that_changes_the_dtype(ranks: Ranks, container: str, planned: bool) -> None:
    ranks(2).run(save_half, f"{container}/run", planned)


class BalancingPlanner(dcp.DefaultSavePlanner):
    """Deals the items of the first rank out to all ranks, as in the docstring of torch's `SavePlanner`."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        items = all_plans[0].items
        dealt = [replace(plan, items=items[rank :: len(all_plans)]) for rank, plan in enumerate(all_plans)]
        return super().create_global_plan(dealt)


def save_balanced(url: str) -> None:
    dcp.save(sharded.plain(5), storage_writer=sharded.writer(url), planner=BalancingPlanner())
    sharded.assert_version(url, 5, sharded.plain)


def test_a_planner_that_balances_the_load(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(4).run(save_balanced, url)
    stored = metadata_of(url).storage_data
    written_by = [
        {index.fqn for index, info in stored.items() if f"/__{rank}_" in info.relative_path} for rank in range(4)
    ]
    assert [len(names) for names in written_by] == [2, 2, 2, 2]
    assert set.union(*written_by) == {*sharded.GLOBAL, "step"}


class ExtraDataPlanner(dcp.DefaultSavePlanner):
    """Brings data of each rank into the metadata, as in the docstring of torch's `SavePlanner`."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=[f"rank {rank}" for rank in range(len(plans))])


def save_with_extra_data(url: str) -> None:
    dcp.save(sharded.rows(6), storage_writer=sharded.writer(url), planner=ExtraDataPlanner())
    sharded.assert_version(url, 6)


def test_a_planner_that_adds_metadata(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_with_extra_data, url)
    assert metadata_of(url).planner_data == ["rank 0", "rank 1"]


def save_on_lowest_rank(url: str) -> None:
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(sharded.plain(7), storage_writer=sharded.writer(url), planner=planner)
    sharded.assert_version(url, 7, sharded.plain)


def test_ranks_without_anything_to_save(ranks: Ranks, container: str) -> None:
    """All that is replicated goes to the first rank; the others write nothing, not even an empty blob."""
    url = f"{container}/run"
    ranks(3).run(save_on_lowest_rank, url)
    assert [name.rpartition("/")[2] for name in data_blobs(url)] == ["__0_0.distcp"]


NESTED = {"layers": [1, {2: "two"}, (3.5, None)], "empty": {}, 7: "seven"}


def save_not_flattened(url: str) -> None:
    # With flatten_sharded_tensors, torch's planners rebuild the state dict: empty dicts and loaded objects get lost.
    as_it_is = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    state = {**sharded.rows(8), "nested": NESTED}
    dcp.save(state, storage_writer=sharded.writer(url), planner=dcp.DefaultSavePlanner(**as_it_is))
    loaded = {**sharded.empty(sharded.rows()), "nested": None}
    dcp.load(loaded, storage_reader=sharded.reader(url), planner=dcp.DefaultLoadPlanner(**as_it_is))
    assert loaded["nested"] == NESTED
    assert loaded["step"] == 8
    for name in sharded.GLOBAL:
        sharded.assert_same(loaded[name], sharded.expected(name, 8), name)


def test_without_flattening(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_not_flattened, url)
    assert set(metadata_of(url).state_dict_metadata) == {*sharded.GLOBAL, "step", "nested"}
