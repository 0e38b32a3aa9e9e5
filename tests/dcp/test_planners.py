"""Planners of users: torch's readers and writers ask them for one item after the other, and so do ours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType

from azure_torch_ckpt import (
    AzureBlobHuggingFaceReader,
    AzureBlobHuggingFaceWriter,
    AzureBlobReader,
    AzureBlobWriter,
    TransferOptions,
)
from azure_torch_ckpt.dcp.planners import keeps_its_memory, takes_any_order
from azure_torch_ckpt.objects.sharded import DedupSavePlanner
from tests.support.containers import KEY, upload
from tests.support.states import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

SMALL = TransferOptions(block_size=64 * 1024, concurrency=4, memory_budget=1024 * 1024)
LAYOUTS = pytest.mark.parametrize("layout", ["dcp", "hf", "torch's"])


def write(url: str, layout: str, folder: Path, state: dict[str, Any], planner: dcp.SavePlanner | None = None) -> None:
    if layout == "torch's":
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), planner=planner)
        upload(folder, url)
    else:
        kind = AzureBlobHuggingFaceWriter if layout == "hf" else AzureBlobWriter
        dcp.save(state, storage_writer=kind(url, credential=KEY, options=SMALL), planner=planner)


def reader(url: str, layout: str) -> AzureBlobReader:
    kind = AzureBlobHuggingFaceReader if layout == "hf" else AzureBlobReader
    return kind(url, credential=KEY, options=SMALL)


# Loading


class Scratch(dcp.DefaultLoadPlanner):
    """Gives the same memory for every tensor, and copies from it on commit."""

    def __init__(self, scratch: torch.Tensor) -> None:
        super().__init__()
        self.scratch = scratch

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.scratch[: read_item.lengths[0]]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.lookup_tensor(read_item.dest_index).copy_(tensor)


@LAYOUTS
def test_a_scratch_buffer(container: str, tmp_path: Path, layout: str) -> None:
    # In one batch, in several, and one that is more than the memory budget.
    sizes = {"a": 10, "b": 100_000, "c": 150_000, "d": 300_000, "e": 20}
    state = {key: torch.full((size,), float(value)) for value, (key, size) in enumerate(sizes.items())}
    write(f"{container}/run", layout, tmp_path, state)
    targets = {key: torch.full((size,), -1.0) for key, size in sizes.items()}
    scratch = torch.zeros(300_000)
    dcp.load(targets, storage_reader=reader(f"{container}/run", layout), planner=Scratch(scratch))
    for key, tensor in state.items():
        assert_same(targets[key], tensor, key)


class Quantising(dcp.DefaultLoadPlanner):
    """Gives a fresh tensor of another dtype, and keeps what it is told is filled."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.full(read_item.lengths, torch.nan, dtype=torch.float64)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        target = super().resolve_tensor(read_item)
        target.copy_((tensor * 2).round())


@LAYOUTS
def test_a_tensor_that_is_quantised_when_it_is_committed(container: str, tmp_path: Path, layout: str) -> None:
    state = {key: torch.arange(1000.0).reshape(20, 50) + 0.25 * value for value, key in enumerate("abc")}
    write(f"{container}/run", layout, tmp_path, state)
    targets = {key: torch.zeros(20, 50, dtype=torch.int32) for key in state}
    dcp.load(targets, storage_reader=reader(f"{container}/run", layout), planner=Quantising())
    for key, tensor in state.items():
        assert_same(targets[key], (tensor.double() * 2).round().int(), key)


class Noting(dcp.DefaultLoadPlanner):
    """Notes what it is asked, with the values that its tensor has when it is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        self.calls.append(("resolve", read_item.dest_index))
        tensor: torch.Tensor = super().resolve_tensor(read_item)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.calls.append(("commit", read_item.dest_index, tensor.tolist()))

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.calls.append(("bytes", read_item.dest_index))
        super().load_bytes(read_item, value)


@pytest.mark.parametrize("layout", ["dcp", "torch's"])
def test_the_calls_are_those_of_torchs_reader(container: str, tmp_path: Path, layout: str) -> None:
    state = {"a": torch.arange(5.0), "b": "text", "c": torch.arange(6).reshape(2, 3), "d": {"e": 1, "f": torch.ones(2)}}
    write(f"{container}/run", "dcp", tmp_path, state)
    write(f"{container}/torchs", "torch's", tmp_path, state)
    made: list[list[tuple[Any, ...]]] = []
    url = f"{container}/{'run' if layout == 'dcp' else 'torchs'}"
    for from_where in (dcp.FileSystemReader(tmp_path), reader(url, layout)):
        planner = Noting()
        target = {"a": torch.zeros(5), "b": "", "c": torch.zeros(2, 3).long(), "d": {"e": 0, "f": torch.zeros(2)}}
        dcp.load(target, storage_reader=from_where, planner=planner)
        made.append(planner.calls)
    assert made[0] == made[1]
    assert len(made[0]) == 8


def test_which_planners_take_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherPlan(dcp.DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            return super().create_local_plan()

    assert takes_any_order(dcp.DefaultLoadPlanner())
    assert takes_any_order(OtherPlan())
    assert not takes_any_order(Noting())
    patched = dcp.DefaultLoadPlanner()
    patched.commit_tensor = lambda *_: None  # type: ignore[method-assign]
    assert not takes_any_order(patched)
    monkeypatch.setattr(dcp.DefaultLoadPlanner, "transform_tensor", lambda self, item, tensor: tensor)
    assert not takes_any_order(dcp.DefaultLoadPlanner())


# Saving


class Reuses(dcp.DefaultSavePlanner):
    """Gives all tensors in the same memory, one after the other, and all objects in the same stream."""

    def __init__(self, size: int, strided: bool = False) -> None:
        super().__init__()
        self.memory = torch.zeros(size, 2)[:, 0] if strided else torch.zeros(size)
        self.stream = io.BytesIO()

    def resolve_data(self, write_item: WriteItem) -> Any:
        value = self.lookup_object(write_item.index)
        if write_item.type == WriteItemType.BYTE_IO:
            self.stream.seek(0)
            self.stream.truncate()
            torch.save(value, self.stream)
            return self.stream
        given = self.memory[: len(value)]
        given.copy_(value)
        return given


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("layout", ["dcp", "hf"])
def test_memory_that_is_used_for_the_next_item(container: str, tmp_path: Path, layout: str, strided: bool) -> None:
    sizes = {"a": 10, "b": 100_000, "c": 3, "d": 50_000, "e": 20}
    state: dict[str, Any] = {key: torch.rand(size) for key, size in sizes.items()}
    if layout == "dcp":
        state |= {f"object {number}": "x" * number for number in range(5)}
    write(f"{container}/run", layout, tmp_path, state, Reuses(100_000, strided))
    target: dict[str, Any] = {
        key: torch.zeros(len(value)) if isinstance(value, torch.Tensor) else "" for key, value in state.items()
    }
    dcp.load(target, storage_reader=reader(f"{container}/run", layout))
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert_same(target[key], value, key)
        else:
            assert target[key] == value


class Labelled(torch.Tensor):
    """A subclass, which torch.save writes."""


class ReusesLabelled(Reuses):
    def resolve_data(self, write_item: WriteItem) -> Any:
        return super().resolve_data(write_item).as_subclass(Labelled)


def test_memory_of_a_subclass_that_is_used_for_the_next_item(container: str, tmp_path: Path) -> None:
    state = {key: torch.rand(50_000) for key in "abc"}
    with torch.serialization.safe_globals([Labelled]):
        write(f"{container}/run", "dcp", tmp_path, state, ReusesLabelled(50_000))
        target = {key: torch.zeros(50_000) for key in state}
        dcp.load(target, storage_reader=reader(f"{container}/run", "dcp"))
    for key, value in state.items():
        assert_same(target[key], value, key)


def test_which_planners_keep_their_memory() -> None:
    assert keeps_its_memory(dcp.DefaultSavePlanner())
    assert keeps_its_memory(DedupSavePlanner(0))
    assert not keeps_its_memory(Reuses(1))
