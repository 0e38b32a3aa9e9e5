"""A load that would leave an element of a wanted tensor as it was, or get it twice, is an error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    AzureCheckpointError,
    BlobLocation,
    CorruptCheckpointError,
)
from azure_torch_ckpt.catalog import consolidate
from tests.support.containers import KEY, content, put

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


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
