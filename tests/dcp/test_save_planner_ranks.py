"""Saves of real ranks with `AzureSavePlanner`, of every kind that torch has, and with every writer."""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from azure_torch_ckpt import AzureSavePlanner, CheckpointError
from azure_torch_ckpt.dcp import global_plan
from azure_torch_ckpt.dcp.metadata.front import read_front
from tests.dcp.metadata.virtual_saves import assert_same_metadata, described
from tests.dcp.test_async import SECONDS, begin
from tests.dcp.test_modes import load_without_collectives, own
from tests.dcp.test_ranks import save_all_layouts
from tests.dcp.test_save_planner import Part, row
from tests.support import sharded
from tests.support.columns import in_columns
from tests.support.containers import blob_names, contents, data_blobs, download
from tests.support.ranks import Ranks


def metadata_of(url: str) -> Metadata:
    """As torch's readers have it."""
    metadata: Metadata = pickle.loads(contents(url)[".metadata"])
    return metadata


def assert_has_index(url: str) -> None:
    assert read_front(contents(url)[".metadata"], url) is not None


# What is saved


@in_columns()
def load_every_layout(url: str) -> None:
    """Into tensors that are sharded by rows."""
    names = {key: key.partition(".")[0] for key in sharded.reader(url).read_metadata().state_dict_metadata}
    del names["scalar"]
    over = sharded.mesh(dist.get_world_size())
    state = {
        key: sharded.laid_out(torch.zeros_like(sharded.expected(name)), over, (Shard(0),))
        for key, name in names.items()
    }
    dcp.load(state, storage_reader=sharded.reader(url))
    for key, name in names.items():
        sharded.assert_same(state[key], sharded.expected(name), key)


@in_columns()
def save_every_layout(url: str, planner: dcp.SavePlanner) -> None:
    save_all_layouts(url, planner=planner)


def test_every_layout(ranks: Ranks, container: str) -> None:
    """Rows and columns, meshes of two dimensions with and without replicas, whole tensors, empty shards."""
    ranks(4).run(save_every_layout, f"{container}/ours", AzureSavePlanner())
    ranks(4).run(save_every_layout, f"{container}/torchs", dcp.DefaultSavePlanner())
    ours, torchs = metadata_of(f"{container}/ours"), metadata_of(f"{container}/torchs")
    assert described(ours) == described(torchs)
    assert ours.planner_data == torchs.planner_data
    assert_has_index(f"{container}/ours")
    assert_has_index(f"{container}/torchs")
    ranks(3).run(load_every_layout, f"{container}/ours")


def mixed(version: int) -> dict[str, Any]:
    """A nested state dict with tensors of all ranks, of some, and of one; a model has more than one of each."""
    rank = dist.get_rank()
    state: dict[str, Any] = {
        "model": sharded.rows(version),
        "list": [torch.full((3,), float(version)), {"deep.er": version, "lr": 0.5}, "text"],
        "7": {"0": torch.tensor(version)},
    }
    some = DeviceMesh("cpu", [1, 2])
    value = sharded.expected("even", version)
    state["some"] = sharded.laid_out(value, some, (Shard(0),)) if rank in (1, 2) else None
    if rank not in (1, 2):
        del state["some"]
    if rank == 2:
        state["mine"] = {"tensor": torch.full((2,), float(version)), "object": version}
    return state


@in_columns()
def save_mixed(url: str, version: int) -> Metadata:
    metadata: Metadata = dcp.save(mixed(version), storage_writer=sharded.writer(url), planner=AzureSavePlanner())
    return metadata


@in_columns()
def load_mixed(url: str, version: int, folder: str) -> None:
    for reader in (sharded.reader(url), dcp.FileSystemReader(folder)):
        state: dict[str, Any] = {
            "model": sharded.empty(sharded.rows()),
            "list": [torch.zeros(3), {"deep.er": 0, "lr": 0.0}, ""],
            "7": {"0": torch.tensor(0)},
            "some": torch.zeros_like(sharded.expected("even")),
            "mine": {"tensor": torch.zeros(2), "object": 0},
        }
        dcp.load(state, storage_reader=reader)
        for name in sharded.GLOBAL:
            sharded.assert_same(state["model"][name], sharded.expected(name, version), name)
        sharded.assert_same(state["some"], sharded.expected("even", version), "some")
        assert state["list"][1:] == [{"deep.er": version, "lr": 0.5}, "text"] and state["7"]["0"] == version
        assert state["mine"]["object"] == state["model"]["step"] == version
        for tensor in (state["list"][0], state["mine"]["tensor"]):
            assert set(tensor.tolist()) == {float(version)}


def test_a_nested_state_with_tensors_of_some_ranks(ranks: Ranks, container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    returned = ranks(3).run(save_mixed, url, 1)
    stored = metadata_of(url)
    assert stored.planner_data["list.1.deep.er"] == ("list", 1, "deep.er")
    assert stored.planner_data["mine.object"] == ("mine", "object")
    for metadata in returned:
        assert_same_metadata(metadata, stored)
    ranks(2).run(load_mixed, url, 1, os.fspath(download(url, tmp_path)))


def replicated(columns: int) -> dict[str, Any]:
    """On two ranks of four each, and on all."""
    over = sharded.mesh(2, 2)
    state: dict[str, Any] = {}
    for number in range(8):
        whole = torch.full((64, columns), float(number))
        state[f"hsdp.{number}"] = sharded.laid_out(whole, over, (Replicate(), Shard(0)))
        state[f"whole.{number}"] = whole
    return state


@in_columns()
def save_replicated(url: str, to_lowest: bool) -> None:
    planner = AzureSavePlanner(dedup_save_to_lowest_rank=to_lowest)
    dcp.save(replicated(100), storage_writer=sharded.writer(url), planner=planner)


def load_replicated(url: str) -> None:
    state = {name: torch.zeros_like(value) for name, value in replicated(100).items()}
    dcp.load(state, storage_reader=sharded.reader(url))
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        assert full.unique().tolist() == [float(name[-1])]


def test_replicas_are_spread_over_the_ranks(ranks: Ranks, container: str) -> None:
    for to_lowest in (False, True):
        url = f"{container}/{to_lowest}"
        ranks(4).run(save_replicated, url, to_lowest)
        ranks(4).run(load_replicated, url)
        sizes = {name[-len("0_0.distcp") :][0]: len(data) for name, data in contents(url).items() if "/" in name}
        if to_lowest:
            assert sizes.keys() == {"0", "1"} and sizes["0"] > 2 * sizes["1"]
        else:
            assert sizes.keys() == set("0123") and max(sizes.values()) < 1.02 * min(sizes.values())


# Again and again


@in_columns()
def save_again(url: str) -> list[int]:
    """How often it was planned anew, for each of seven saves."""
    counts = []
    writer = sharded.writer(url)
    for version in range(7):
        state = sharded.rows(version)
        if version in (2, 3) and dist.get_rank() == 1:
            state["extra"] = torch.ones(3)
        if version in (4, 5):
            state["even"] = state["even"].full_tensor()
        planner = AzureSavePlanner()
        with mock.patch.object(global_plan, "_join", wraps=global_plan._join) as join:
            dcp.save(state, storage_writer=writer, planner=planner)
        counts.append(join.call_count)
        sharded.assert_version(url, version)
        assert ("extra" in sharded.reader(url).read_metadata().state_dict_metadata) == (version in (2, 3))
        assert len(data_blobs(url)) == dist.get_world_size()
        dist.barrier()
    return counts


def test_only_what_has_changed_is_planned_anew(ranks: Ranks, container: str) -> None:
    assert ranks(3).run(save_again, f"{container}/run") == [[1, 0, 1, 0, 1, 0, 1], [0] * 7, [0] * 7]


# What must not be saved


def refuse(url: str, parts: Sequence[Part]) -> dict[int, BaseException]:
    save_version(url, 1)
    state = {"ok": torch.ones(2), "w.x": parts[dist.get_rank()]}
    return sharded.failures(lambda: dcp.save(state, storage_writer=sharded.writer(url), planner=AzureSavePlanner()))


def save_version(url: str, version: int) -> None:
    dcp.save(sharded.rows(version), storage_writer=sharded.writer(url), planner=AzureSavePlanner())


def check_version(url: str, version: int) -> None:
    sharded.assert_version(url, version)


@pytest.mark.parametrize(
    "parts",
    [[row(0, 3), row(1, 3)], [Part((8, 3), (0, 0), (5, 3)), Part((8, 3), (4, 0), (4, 3))]],
    ids=["missing", "overlapping"],
)
def test_shards_that_do_not_make_up_their_tensor(ranks: Ranks, container: str, parts: list[Part]) -> None:
    url = f"{container}/run"
    for failures in ranks(2).run(refuse, url, parts):
        assert failures.keys() == {0}
        assert isinstance(failures[0], CheckpointError) and "'w.x'" in str(failures[0])
    assert len(blob_names(url)) == 3
    ranks(2).run(check_version, url, 1)


def save_different(url: str, ours: bool) -> None:
    state = {"a": torch.ones(3 + dist.get_rank()), "b": torch.ones(2, dtype=[torch.int8, torch.int16][dist.get_rank()])}
    dcp.save(state, storage_writer=sharded.writer(url), planner=AzureSavePlanner() if ours else None)


def test_different_tensors_of_one_name(ranks: Ranks, container: str) -> None:
    """What torch's planner makes of them."""
    for ours in (True, False):
        ranks(2).run(save_different, f"{container}/{ours}", ours)
    assert described(metadata_of(f"{container}/True")) == described(metadata_of(f"{container}/False"))


# Ways to save


@in_columns()
def save_asynchronously(url: str, kind: AsyncCheckpointerType) -> None:
    writer = sharded.writer(url)
    for version in (1, 2):
        begin(version, writer, kind, planner=AzureSavePlanner()).result(SECONDS)
        sharded.assert_version(url, version)
        dist.barrier()
    assert len(blob_names(url)) == dist.get_world_size() + 1


@pytest.mark.parametrize("kind", [AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS])
def test_asynchronous_saves(ranks: Ranks, container: str, kind: AsyncCheckpointerType) -> None:
    ranks(2).run(save_asynchronously, f"{container}/run", kind, seconds=SECONDS)
    if kind is AsyncCheckpointerType.THREAD:  # the process has settings of its own
        assert_has_index(f"{container}/run")


@in_columns()
def save_without_collectives(url: str, version: int) -> None:
    dcp.save(own(version), storage_writer=sharded.writer(url), use_collectives=False, planner=AzureSavePlanner())


def test_without_collectives(ranks: Ranks, container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    ranks(2).run(save_without_collectives, url, 1)
    ranks(2).run(load_without_collectives, url, 1, None)
    ranks(2).run(load_without_collectives, url, 1, os.fspath(download(url, tmp_path)))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@in_columns()
def test_without_a_process_group(container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    state = {**sharded.plain(1), "nested": {"list": [torch.ones(2), 3]}}
    for _ in range(2):
        dcp.save(state, storage_writer=sharded.writer(url), planner=AzureSavePlanner())
    assert_has_index(url)
    for reader in (sharded.reader(url), dcp.FileSystemReader(download(url, tmp_path))):
        loaded = {**sharded.empty(sharded.plain()), "nested": {"list": [torch.zeros(2), 0]}}
        dcp.load(loaded, storage_reader=reader)
        for name in sharded.GLOBAL:
            sharded.assert_same(loaded[name], sharded.expected(name, 1), name)
        assert loaded["nested"]["list"][1] == 3 and loaded["nested"]["list"][0].tolist() == [1, 1]


# With torch's own writer


def assert_of_torch_alone(folder: Path) -> None:
    """A pickle that names nothing of this package."""
    named = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops((folder / ".metadata").read_bytes()):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name in ("STACK_GLOBAL", "GLOBAL"):
            named.add(" ".join(strings[-2:]))
    assert not any("azure" in name for name in named) and "azure_torch_ckpt" not in strings
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    assert type(metadata) is Metadata and type(metadata.storage_data) is dict
    assert all(
        type(entry.chunks) is list for entry in metadata.state_dict_metadata.values() if hasattr(entry, "chunks")
    )


def save_to_folder(folder: str, version: int) -> None:
    dcp.save(sharded.rows(version), storage_writer=dcp.FileSystemWriter(folder), planner=AzureSavePlanner())
    state = sharded.empty(sharded.rows())
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
    for name in sharded.GLOBAL:
        sharded.assert_same(state[name], sharded.expected(name, version), name)
    assert state["step"] == version


def test_with_torchs_writer(ranks: Ranks, tmp_path: Path) -> None:
    for version in (1, 2):
        folder = tmp_path / str(version)
        ranks(3).run(save_to_folder, os.fspath(folder), version)
        assert_of_torch_alone(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_with_torchs_writer_and_without_a_process_group(tmp_path: Path) -> None:
    dcp.save(sharded.plain(1), storage_writer=dcp.FileSystemWriter(tmp_path), planner=AzureSavePlanner())
    assert_of_torch_alone(tmp_path)
    state = sharded.empty(sharded.plain())
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path))
    for name in sharded.GLOBAL:
        sharded.assert_same(state[name], sharded.expected(name, 1), name)


class CachedPlanner(dcp.DefaultSavePlanner):
    """Has a cache of its own: torch keeps one per class of planner, for as long as the process lives."""


@in_columns()
def save_with_cached_plans(url: str, folder: str) -> None:
    for version in (1, 2, 3):
        planner = CachedPlanner(enable_plan_caching=True)
        dcp.save(sharded.rows(version), storage_writer=sharded.writer(url), planner=planner)
        sharded.assert_version(url, version)
        dist.barrier()
    if dist.get_rank() == 0:
        # A writer of torch's cannot use the plan that torch keeps of ours, but another planner of this metadata may.
        metadata = SavePlanner._cached_metadata[CachedPlanner.__name__]
        metadata.storage_data = {}
        Path(folder, ".metadata").write_bytes(pickle.dumps(metadata))


def test_cached_plans(ranks: Ranks, container: str, tmp_path: Path) -> None:
    ranks(2).run(save_with_cached_plans, f"{container}/run", os.fspath(tmp_path))
    assert_has_index(f"{container}/run")
    assert_of_torch_alone(tmp_path)


class ChangedPlanner(dcp.DefaultSavePlanner):
    """The same."""


@in_columns()
def save_with_both_writers(url: str, folder: str) -> None:
    """With another plan on every rank for each: torch's planner keeps what the writer has put into the plan before."""
    for version in range(4):
        planner = ChangedPlanner(enable_plan_caching=True)
        state = {**sharded.rows(version), f"extra.{version}.{dist.get_rank()}": torch.ones(2)}
        writer = dcp.FileSystemWriter(f"{folder}/{version}") if version % 2 else sharded.writer(url)
        dcp.save(state, storage_writer=writer, planner=planner)
        if version % 2 == 0:
            sharded.assert_version(url, version)
        dist.barrier()


def test_cached_plans_and_another_writer_in_between(ranks: Ranks, container: str, tmp_path: Path) -> None:
    ranks(2).run(save_with_both_writers, f"{container}/run", os.fspath(tmp_path))
    for version in (1, 3):
        assert_of_torch_alone(tmp_path / str(version))
