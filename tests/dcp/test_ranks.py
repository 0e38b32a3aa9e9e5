"""A checkpoint of any sharding on any number of ranks loads with any other, on any other number, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from azure_torch_ckpt.catalog import inspect
from tests.support import sharded
from tests.support.ranks import Ranks

SIZES = (1, 2, 3, 4)


# ---- Tensors -------------------------------------------------------------------------------------------------------


def save_all_layouts(url: str, use_collectives: bool = True, planner: dcp.SavePlanner | None = None) -> None:
    """Every tensor in every layout that this world has, each under a key of its own."""
    state: dict[str, Any] = {"scalar": torch.tensor(2.5)}
    for name, (sizes, _) in sharded.GLOBAL.items():
        for number, (over, placements) in enumerate(sharded.layouts(len(sizes))):
            state[f"{name}.{number}"] = sharded.laid_out(sharded.expected(name), over, placements)
        state[f"{name}.plain"] = sharded.expected(name)
        if name != "none":
            state[f"{name}.sharded_tensor"] = sharded.sharded_tensor(sharded.expected(name))
    dcp.save(state, storage_writer=sharded.writer(url), use_collectives=use_collectives, planner=planner)


def load_all_layouts(url: str) -> None:
    """Fill every stored tensor; round by round into other layouts, until each layout of this world was a target."""
    keys = [tensor.key for tensor in inspect(url, credential=sharded.KEY).tensors]
    most = max(len(sharded.layouts(len(sizes))) for sizes, _ in sharded.GLOBAL.values()) + 2
    fewest = len([key for key in keys if key.startswith("none.")])
    for shift in range(0, most, fewest):
        state = {key: _target(key, place + shift) for place, key in enumerate(keys)}
        dcp.load(state, storage_reader=sharded.reader(url))
        for key, value in state.items():
            name = key.partition(".")[0]
            wanted = torch.tensor(2.5) if name == "scalar" else sharded.expected(name)
            if isinstance(value, ShardedTensor):
                sharded.assert_same_shards(value, wanted, key)
            else:
                sharded.assert_same(value, wanted, key)


def _target(key: str, turn: int) -> torch.Tensor:
    name = key.partition(".")[0]
    if name == "scalar":
        return torch.tensor(0.0)
    zeros = torch.zeros_like(sharded.expected(name))
    layouts = sharded.layouts(zeros.dim())
    turn %= len(layouts) + 2
    if turn < len(layouts):
        return sharded.laid_out(zeros, *layouts[turn])
    return zeros if turn == len(layouts) or name == "none" else sharded.sharded_tensor(zeros)


@pytest.mark.parametrize("saved_on", SIZES)
@pytest.mark.parametrize("loaded_on", SIZES)
def test_every_layout_loads_into_every_other(ranks: Ranks, container: str, saved_on: int, loaded_on: int) -> None:
    url = f"{container}/run/step-1"
    ranks(saved_on).run(save_all_layouts, url)
    ranks(loaded_on).run(load_all_layouts, url)


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"), [(1, 1), (1, 4), (2, 1), (2, 2), (2, 3), (3, 2), (3, 4), (4, 1), (4, 3), (4, 4)]
)
def test_every_layout_saved_without_collectives_loads_into_every_other(
    ranks: Ranks, container: str, saved_on: int, loaded_on: int
) -> None:
    url = f"{container}/run/step-1"
    ranks(saved_on).run(save_all_layouts, url, False)
    ranks(loaded_on).run(load_all_layouts, url)


# ---- Models and optimizers -----------------------------------------------------------------------------------------


def build(kind: str, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.BatchNorm1d(5))
    world = dist.get_world_size()
    columns_and_rows = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if kind == "tensor parallel":
        parallelize_module(model, sharded.mesh(world), columns_and_rows)
    elif kind == "fsdp":
        fully_shard(model, mesh=sharded.mesh(world))
    elif kind == "fsdp of tensor parallel":
        square = sharded.mesh(2, world // 2)
        parallelize_module(model, square["inner"], columns_and_rows)
        fully_shard(model, mesh=square["outer"])
    else:
        assert kind == "replicated"
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(state, list):
        for number, value in enumerate(state):
            yield from leaves(value, f"{path}/{number}")
    else:
        yield path, state


def with_values(state: Any, path: str = "") -> Any:
    """The same structure with whole tensors of known values."""
    if isinstance(state, dict):
        return {key: with_values(value, f"{path}/{key}") for key, value in state.items()}
    if isinstance(state, torch.Tensor):
        return sharded.values(path, tuple(state.shape), state.dtype)
    return state


def save_model(url: str, kind: str) -> None:
    model, optimizer = build(kind, lr=0.25)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=with_values(of_model, "/model"),
        optim_state_dict=with_values(of_optimizer, "/optimizer"),
        options=StateDictOptions(full_state_dict=True),
    )
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, storage_writer=sharded.writer(url))


def load_model(url: str, kind: str) -> int:
    model, optimizer = build(kind, lr=0.5)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, storage_reader=sharded.reader(url))
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    of_model, of_optimizer = get_state_dict(model, optimizer)
    tensors = 0
    for path, value in leaves({"model": of_model, "optimizer": of_optimizer}):
        if isinstance(value, torch.Tensor):
            tensors += 1
            sharded.assert_same(value, sharded.values(path, tuple(value.shape), value.dtype), path)
    return tensors


@pytest.mark.parametrize(
    ("saved_on", "saved_as", "loaded_on", "loaded_as"),
    [
        (1, "replicated", 4, "fsdp of tensor parallel"),
        (2, "fsdp", 3, "tensor parallel"),
        (2, "tensor parallel", 4, "fsdp"),
        (2, "fsdp of tensor parallel", 2, "fsdp"),
        (3, "fsdp", 4, "fsdp of tensor parallel"),
        (3, "tensor parallel", 2, "fsdp of tensor parallel"),
        (4, "fsdp", 1, "fsdp"),
        (4, "fsdp of tensor parallel", 1, "replicated"),
        (4, "fsdp of tensor parallel", 3, "fsdp"),
        (4, "fsdp of tensor parallel", 4, "tensor parallel"),
    ],
)
def test_model_and_optimizer(
    ranks: Ranks, container: str, saved_on: int, saved_as: str, loaded_on: int, loaded_as: str
) -> None:
    url = f"{container}/model"
    ranks(saved_on).run(save_model, url, saved_as)
    # 10 parameters and buffers of the model (3 of them of the batch norm), and 3 tensors of AdamW for each parameter.
    assert ranks(loaded_on).run(load_model, url, loaded_as) == [8 + 3 + 3 * 8] * loaded_on


# ---- Objects -------------------------------------------------------------------------------------------------------


class Counter:
    """A `Stateful` with nested state of every kind."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.history = torch.arange(count)
        self.loads = 0

    def state_dict(self) -> dict[str | int, Any]:
        return {"count": self.count, "history": self.history, "tags": ["a", {"b": (1, None)}], 3: "an int key"}

    def load_state_dict(self, state: dict[str | int, Any]) -> None:
        self.count, self.history = state["count"], state["history"]
        assert state["tags"] == ["a", {"b": (1, None)}]
        self.loads += 1


def save_objects(url: str) -> None:
    rank = dist.get_rank()
    state = {"counter": Counter(7), "common": {"text": "é", "big": 1 << 70}, "who": f"rank {rank}"}
    state[f"only on {rank}"] = {"tensor": torch.full((2, 2), float(rank)), "object": rank}
    dcp.save(state, storage_writer=sharded.writer(url), planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True))


def load_objects(url: str, saved_on: int) -> None:
    counter = Counter(0)
    counter.history = torch.zeros(7, dtype=torch.int64)
    state: dict[str, Any] = {"counter": counter, "common": {"text": "", "big": 0}, "who": f"not {dist.get_rank()}"}
    for rank in range(saved_on):
        state[f"only on {rank}"] = {"tensor": torch.zeros(2, 2), "object": None}
    dcp.load(state, storage_reader=sharded.reader(url))
    assert (counter.count, counter.loads) == (7, 1)
    sharded.assert_same(counter.history, torch.arange(7), "history")
    assert state["common"] == {"text": "é", "big": 1 << 70}
    # As torch does it, the first rank's object stands for those of all ranks.
    assert state["who"] == "rank 0"
    for rank in range(saved_on):
        loaded = state[f"only on {rank}"]
        assert loaded["object"] == rank
        sharded.assert_same(loaded["tensor"], torch.full((2, 2), float(rank)), f"only on {rank}")


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 3), (3, 1), (3, 4), (4, 2)])
def test_objects_and_keys_of_single_ranks(ranks: Ranks, container: str, saved_on: int, loaded_on: int) -> None:
    url = f"{container}/objects"
    ranks(saved_on).run(save_objects, url)
    ranks(loaded_on).run(load_objects, url, saved_on)
