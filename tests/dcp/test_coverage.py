"""A load that would leave an element of a wanted tensor as it was, or get it twice, is an error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    AzureCheckpointError,
    BlobLocation,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.catalog import consolidate
from tests.support import sharded
from tests.support.containers import KEY, content, put
from tests.support.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


# Saved by each rank for itself


def rows(value: float) -> dict[str, Any]:
    """12 rows, each with its number, on as many ranks as there are; and a tensor that each rank has."""
    whole = torch.arange(12.0).reshape(12, 1).expand(12, 4).contiguous()
    sharded_rows = distribute_tensor(whole, sharded.mesh(dist.get_world_size()), [Shard(0)])
    if value < 0:
        sharded_rows.to_local().fill_(value)
    return {"rows": sharded_rows, "same": torch.full((3,), abs(value))}


def save_without_collectives(url: str) -> None:
    dcp.save(rows(5), storage_writer=AzureBlobWriter(url, credential=KEY), use_collectives=False)


def load_as_saved(url: str) -> None:
    target = rows(-1)
    dcp.load(target, storage_reader=AzureBlobReader(url, credential=KEY))
    for key, tensor in rows(5).items():
        sharded.assert_same(target[key], tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, key)


def load_on_fewer(url: str, partial: bool) -> str:
    """What this rank is told; nothing of its tensors has changed."""
    target: dict[str, Any] = {**rows(-1), "same": torch.full((3,), -1.0)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=partial)
    try:
        dcp.load(target, storage_reader=AzureBlobReader(url, credential=KEY), planner=planner)
    except UnsupportedCheckpointError as error:  # without collectives torch does not wrap it
        assert target["rows"].to_local().unique().tolist() == [-1]
        assert target["same"].unique().tolist() == [-1]
        return str(error)
    pytest.fail(f"loaded {target}")


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("loaded_on", [1, 2])
def test_saved_without_collectives_and_loaded_on_fewer_ranks(
    ranks: Ranks, container: str, loaded_on: int, partial: bool
) -> None:
    url = f"{container}/run"
    ranks(3).run(save_without_collectives, url)
    ranks(3).run(load_as_saved, url)
    for rank, said in enumerate(ranks(loaded_on).run(load_on_fewer, url, partial)):
        assert f"__{rank}.metadata has not all of 'rows'" in said
        assert "as many ranks" in said


def load_the_same_on_fewer(url: str) -> None:
    """What each rank has whole can be loaded on any of them."""
    target = {"same": torch.zeros(3)}
    dcp.load(target, storage_reader=AzureBlobReader(url, credential=KEY))
    assert target["same"].unique().tolist() == [5]


def test_what_every_rank_saved_whole_is_loaded_on_fewer_ranks(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(3).run(save_without_collectives, url)
    ranks(2).run(load_the_same_on_fewer, url)


class Renaming(dcp.DefaultLoadPlanner):
    """Has other names than the checkpoint."""

    def create_local_plan(self) -> Any:
        state_dict = self.state_dict
        self.state_dict = {key.removeprefix("my "): tensor for key, tensor in state_dict.items()}
        plan = super().create_local_plan()
        self.state_dict = state_dict
        names = [replace(item.dest_index, fqn=f"my {item.dest_index.fqn}") for item in plan.items]
        return dcp.LoadPlan([replace(item, dest_index=name) for item, name in zip(plan.items, names, strict=True)])


# Metadata that contradicts itself


def damage(url: str, key: str, change: Callable[[Any], None]) -> None:
    path = BlobLocation.parse(url).join(".metadata").path
    metadata: Metadata = pickle.loads(content(url, path))
    change(metadata.state_dict_metadata[key])
    put(url, path, pickle.dumps(metadata))


def larger(entry: Any) -> None:
    entry.size = torch.Size([8, 5])


def without_chunks(entry: Any) -> None:
    entry.chunks.clear()


def twice(entry: Any) -> None:
    """As many elements as there should be, but of one half only."""
    entry.size = torch.Size([8, 5])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 5])) for _ in range(2)]


@pytest.mark.parametrize("planner", [None, "partial", "renaming", "nothing known"])
@pytest.mark.parametrize("change", [larger, without_chunks, twice])
def test_chunks_that_do_not_make_up_their_tensor(
    container: str, change: Callable[[Any], None], planner: str | None
) -> None:
    url = f"{container}/run"
    dcp.save({"a": torch.ones(4, 5), "b": torch.ones(4, 5)}, storage_writer=AzureBlobWriter(url, credential=KEY))
    damage(url, "b", change)
    rows_wanted = 4 if change is without_chunks else 8
    target: dict[str, Any] = {"a": torch.zeros(4, 5), "b": torch.zeros(rows_wanted, 5)}
    chosen: dcp.DefaultLoadPlanner | None = None
    if planner == "partial":
        target["not there"] = torch.zeros(3)
        chosen = dcp.DefaultLoadPlanner(allow_partial_load=True)
    elif planner == "renaming":
        if change is without_chunks:
            return  # nothing in the plan and no name in common: nobody can know
        target = {f"my {key}": tensor for key, tensor in target.items()}
        chosen = Renaming(flatten_state_dict=False)
    elif planner == "nothing known":
        target = {}
        chosen = dcp.default_planner._EmptyStateDictLoadPlanner()
    with pytest.raises(CheckpointException) as caught:
        dcp.load(target, storage_reader=AzureBlobReader(url, credential=KEY), planner=chosen)
    error = caught.value.failures[0][0]
    assert isinstance(error, CorruptCheckpointError)
    assert "'my b'" in str(error) if planner == "renaming" else "'b'" in str(error)
    if planner != "nothing known":
        assert not any(tensor.any() for tensor in target.values())
    # The rest of the checkpoint is as good as it was.
    rest = {"a": torch.zeros(4, 5)}
    dcp.load(rest, storage_reader=AzureBlobReader(url, credential=KEY))
    assert rest["a"].unique().tolist() == [1]


@pytest.mark.parametrize("change", [larger, without_chunks, twice])
def test_no_file_is_made_of_chunks_that_do_not_make_up_their_tensor(
    container: str, tmp_path: Any, change: Callable[[Any], None]
) -> None:
    url = f"{container}/run"
    dcp.save({"a": torch.ones(4, 5)}, storage_writer=AzureBlobWriter(url, credential=KEY))
    damage(url, "a", change)
    with pytest.raises(AzureCheckpointError, match="do not make it up"):
        consolidate(url, tmp_path / "whole.pt", credential=KEY)
    assert not list(tmp_path.iterdir())
