"""`AzureSavePlanner` plans what torch's planner plans, in fewer bytes, and refuses what would not make up a tensor."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from azure_torch_ckpt import AzureSavePlanner, CheckpointError
from azure_torch_ckpt.dcp import global_plan
from azure_torch_ckpt.dcp.base import SaveTicket
from azure_torch_ckpt.dcp.plan_columns import LocalItems, PlannedItems
from tests.dcp.metadata.virtual_saves import NAMES, described

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class Part:
    """A rank's chunk of a tensor, in a state dict of a process that plans for all ranks."""

    def __init__(self, size: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], kind: str = "SHARD") -> None:
        self.size, self.offsets, self.sizes = map(torch.Size, (size, offsets, sizes))
        self.kind = WriteItemType[kind]
        self.properties = TensorProperties(dtype=torch.float32)

    def __create_write_items__(self, name: str, part: Part) -> list[WriteItem]:
        data = TensorWriteData(ChunkStorageMetadata(self.offsets, self.sizes), self.properties, self.size)
        return [WriteItem(MetadataIndex(name, self.offsets), self.kind, tensor_data=data)]


def row(rank: int, ranks: int, size: Sequence[int] = (8, 3)) -> Part:
    """As torch shards by rows: the last ranks may have fewer, or none."""
    each = -(-size[0] // ranks)
    first = min(rank * each, size[0])
    tail = [0] * (len(size) - 1)
    return Part(size, (first, *tail), (min(each, size[0] - first), *size[1:]))


State = dict[str, Any]
Planned = tuple[list[SavePlan], Metadata]


def planned(states: Sequence[State], make: Callable[[], SavePlanner] = AzureSavePlanner) -> Planned:
    """The plans of all ranks, as they have gone from rank to rank, and the metadata."""
    planners = [make() for _ in states]
    local = []
    for rank, (planner, state) in enumerate(zip(planners, states, strict=True)):
        planner.set_up_planner(state, None, rank == 0)
        local.append(pickle.loads(pickle.dumps(planner.create_local_plan())))
    plans, metadata = planners[0].create_global_plan(local)
    sent = [pickle.loads(pickle.dumps(plan)) for plan in plans]
    return [planner.finish_plan(plan) for planner, plan in zip(planners, sent, strict=True)], metadata


def assert_consistent(plans: list[SavePlan], metadata: Metadata) -> None:
    """Every chunk and object is written once, and hints name the chunks."""
    items = [item for plan in plans for item in plan.items]
    wanted = {
        MetadataIndex(name, *place)
        for name, entry in metadata.state_dict_metadata.items()
        for place in (
            [(chunk.offsets,) for chunk in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [()]
        )
    }
    assert Counter(item.index for item in items) == Counter(wanted)
    for item in items:
        entry = metadata.state_dict_metadata[item.index.fqn]
        if isinstance(entry, TensorStorageMetadata):
            assert item.tensor_data is not None and item.index.index is not None
            assert entry.chunks[item.index.index] == item.tensor_data.chunk
            assert entry.chunks[item.index.index].offsets == item.index.offset


def assert_planned_as_by_torch(states: Sequence[State], *, same_ranks: bool = False, **options: Any) -> None:
    plans, metadata = planned(states, lambda: AzureSavePlanner(**options))
    torchs, wanted = planned(states, lambda: dcp.DefaultSavePlanner(**options))
    assert described(metadata) == described(wanted)
    assert metadata.planner_data == wanted.planner_data
    assert_consistent(plans, metadata)
    if same_ranks:
        assert [{item.index for item in plan.items} for plan in plans] == [
            {item.index for item in plan.items} for plan in torchs
        ]


# The same as torch's


@st.composite
def ranks_states(draw: st.DrawFn) -> list[State]:
    """State dicts of ranks: shards by rows, with and without replicas, tensors and objects of all ranks or of some."""
    ranks = draw(st.integers(1, 6))
    states: list[State] = [{} for _ in range(ranks)]
    for name in draw(st.lists(NAMES.filter(lambda name: "." not in name), unique=True, max_size=6)):
        kind = draw(st.sampled_from(["rows", "replicated rows", "whole", "scalar", "object", "some", "on one"]))
        size = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
        some = draw(st.sets(st.integers(0, ranks - 1), min_size=1))
        groups = draw(st.integers(1, ranks))
        for rank, state in enumerate(states):
            if kind == "rows":
                state[name] = row(rank, ranks, size)
            elif kind == "replicated rows":
                state[name] = row(rank % groups, groups, size)
            elif kind == "whole":
                state[name] = torch.empty(size)
            elif kind == "scalar":
                state[name] = torch.tensor(1.5)
            elif kind == "object":
                state[name] = {"deep": [1, "x", torch.ones(2)], "empty": {}}
            elif kind == "some" and rank in some:
                state[name] = torch.empty(size, dtype=torch.int64)
            elif kind == "on one" and rank == min(some):
                state[name] = "mine"
    return states


@settings(max_examples=150)
@given(ranks_states(), st.booleans())
def test_any_state_is_planned_as_by_torch(states: list[State], to_lowest: bool) -> None:
    assert_planned_as_by_torch(states, dedup_save_to_lowest_rank=to_lowest, same_ranks=to_lowest)


@pytest.mark.parametrize("options", [{"flatten_state_dict": False}, {"flatten_sharded_tensors": False}])
def test_other_options(options: dict[str, Any]) -> None:
    states = [{"a": row(rank, 3), "b": {"c": [torch.ones(2), 3]}, "d.e": 1} for rank in range(3)]
    assert_planned_as_by_torch(states, **options)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"o": 1},
        {"s": torch.tensor(1)},
        {"o": 1, "s": torch.tensor(1)},
        {"e": torch.empty(0, 3)},
        {"e": torch.empty(0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_little_states(state: State, ranks: int) -> None:
    assert_planned_as_by_torch([state] * ranks)
    assert_planned_as_by_torch([state, *[{}] * ranks])


def test_shards_that_come_in_another_order() -> None:
    """Of ranks, and of dimensions: two of a square are side by side."""
    cells = [((0, 0), (2, 3)), ((2, 0), (2, 3)), ((0, 3), (2, 2)), ((2, 3), (2, 2))]
    for order in itertools.permutations(cells):
        states = [{"w": Part((4, 5), *cell), "v": row(3 - rank, 4)} for rank, cell in enumerate(order)]
        assert_planned_as_by_torch(states)


def test_irregular_shards() -> None:
    """Chunks that are no grid."""
    cells = [((0, 0), (1, 5)), ((1, 0), (3, 2)), ((1, 2), (1, 3)), ((2, 2), (2, 1)), ((2, 3), (2, 2))]
    assert_planned_as_by_torch([{"w": Part((4, 5), *cell)} for cell in cells])


def test_many_irregular_shards() -> None:
    """More than are compared one by one: every second row is cut at another column."""
    states = []
    for rank in range(5000):
        where = 1 + rank // 2 % 2
        first, count = (0, where) if rank % 2 == 0 else (where, 3 - where)
        states.append({"w": Part((2500, 3), (rank // 2, first), (1, count))})
    plans, metadata = planned(states)
    assert_consistent(plans, metadata)
    states[-1] = {"w": Part((2500, 3), (2499, 1), (1, 2))}
    with pytest.raises(CheckpointError, match=r"have some twice"):
        planned(states)


def test_several_shards_of_a_rank() -> None:
    class Parts(Part):
        def __create_write_items__(self, name: str, part: Part) -> list[WriteItem]:
            parts = [Part((4, 3), (first, 0), (1, 3)) for first in (self.offsets[0], self.offsets[0] + 1)]
            return [item for one in parts for item in one.__create_write_items__(name, one)]

    assert_planned_as_by_torch([{"w": Parts((4, 3), (2 * rank, 0), (2, 3)), "o": 1} for rank in range(2)])


def test_replicas_are_spread_evenly() -> None:
    """All ranks write about as many bytes: what only they have, and their part of what all have."""
    states = []
    for rank in range(8):
        state: State = {f"replicated.{number}": torch.empty(number % 13 + 1, 10) for number in range(100)}
        state |= {f"two.{number}": row(rank % 2, 2, (40, 10)) for number in range(16)}
        state |= {f"rows.{number}": row(rank, 8, (9, 10)) for number in range(3)}  # 2, 2, 2, 2, 1, 0, 0, 0 of them
        states.append(state)
    plans, metadata = planned(states)
    assert_consistent(plans, metadata)
    nbytes = [sum(item.tensor_storage_size() or 0 for item in plan.items) for plan in plans]
    assert max(nbytes) - min(nbytes) <= 20 * 10 * 4  # the largest
    plans, metadata = planned([{f"o{number}": number for number in range(16)}] * 8)
    assert [len(plan.items) for plan in plans] == [2] * 8 and len(metadata.state_dict_metadata) == 16


# What is sent


def model(rank: int, ranks: int) -> State:
    """The parameters of Llama 3 70B and two moments of each, as FSDP shards them."""
    shapes: list[tuple[int, ...]] = [
        (8192, 8192),
        (1024, 8192),
        (1024, 8192),
        (8192, 8192),
        (28672, 8192),
        (28672, 8192),
        (8192, 28672),
    ]
    shapes += [(8192,), (8192,)]
    layers = {
        f"model.layers.{layer}.part{part}.weight": size for layer in range(80) for part, size in enumerate(shapes)
    }
    layers |= {
        "model.embed_tokens.weight": (128256, 8192),
        "model.norm.weight": (8192,),
        "lm_head.weight": (128256, 8192),
    }
    state = {f"model.{name}": row(rank, ranks, size) for name, size in layers.items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        state |= {f"optim.state.{name}.{moment}": row(rank, ranks, size) for name, size in layers.items()}
    return state


def test_the_plan_of_a_rank_of_a_thousand_is_small() -> None:
    sent = []
    for rank in (0, 1, 700, 1023):
        planner = AzureSavePlanner()
        planner.set_up_planner(model(rank, 1024), None, rank == 0)
        plan = dataclasses.replace(
            planner.create_local_plan(), storage_data=SaveTicket("x" * 20, "y" * 20, rank, "z" * 50)
        )
        assert len(plan.items) == 2169
        sent.append(pickle.dumps(plan))
    assert max(map(len, sent)) < 10_000  # and the results have fewer than 25,000: test_written_items.py


def test_what_comes_back_is_small() -> None:
    states = [model(rank, 4) for rank in range(4)]
    local = []
    for rank, state in enumerate(states):
        planner = AzureSavePlanner()
        planner.set_up_planner(state, None, rank == 0)
        local.append(planner.create_local_plan())
    plans, _ = planner.create_global_plan([pickle.loads(pickle.dumps(plan)) for plan in local])
    assert max(len(pickle.dumps(plan)) for plan in plans) < 1000


def test_columns_are_the_items() -> None:
    planner = AzureSavePlanner()
    planner.set_up_planner({"w": row(1, 3), "s": torch.tensor(1.5), "o": 3, "v": torch.ones(2, 3, 4)}, None, True)
    plan = planner.create_local_plan()
    assert type(plan.items) is LocalItems
    sent = pickle.loads(pickle.dumps(plan)).items
    assert type(sent) is PlannedItems
    assert list(sent) == list(plan.items) and len(sent) == 4
    assert (sent[1], sent[-1], sent[1:3]) == (plan.items[1], plan.items[-1], plan.items[1:3])
    assert type(pickle.loads(pickle.dumps(sent))) is PlannedItems


# Plans that are kept


def joins(states: Sequence[State], make: Callable[[], SavePlanner] = AzureSavePlanner) -> tuple[Planned, int]:
    with mock.patch.object(global_plan, "_join", wraps=global_plan._join) as join:
        return planned(states, make), join.call_count


def test_equal_plans_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_plan, "_latest", [])
    states = [{"w": row(rank, 3), "v": torch.ones(4), "o": rank} for rank in range(3)]
    (plans, metadata), count = joins(states)
    assert count == 1
    metadata.storage_data = {"of": "the first save"}
    metadata.state_dict_metadata["w"].size = torch.Size([1])  # type: ignore[union-attr]
    (again, other), count = joins(states)
    assert count == 0 and again == plans and other.storage_data is None
    assert described(other) == described(planned(states, dcp.DefaultSavePlanner)[1])
    # A model and its optimizer, in turn.
    optimizer = [{"m": row(rank, 3)} for rank in range(3)]
    assert [joins(turn)[1] for turn in (optimizer, states, optimizer, states)] == [1, 0, 0, 0]
    changes: list[Callable[[State], object]] = [
        lambda state: state.update(x=1),
        lambda state: state.pop("o"),
        lambda state: state.update(v=torch.ones(4, dtype=torch.int64)),
        lambda state: state.update(v=torch.ones(4, requires_grad=True)),
    ]
    for change in changes:
        changed = [dict(state) for state in states]
        for state in changed if change is changes[2] else changed[1:2]:
            change(state)
        assert joins(changed)[1] == 1
        if change is not changes[3]:  # torch takes it from the rank that writes the tensor
            assert_planned_as_by_torch(changed)
    monkeypatch.setattr(global_plan, "_latest", [])
    joins(states)
    assert joins(states[::-1])[1] == 1
    assert joins([*states[:2], {"w": row(2, 3)}])[1] == 1
    monkeypatch.setattr(global_plan, "_latest", [])
    joins(states)
    assert joins(states, lambda: AzureSavePlanner(dedup_save_to_lowest_rank=True))[1] == 1


def test_paths_are_those_of_each_save() -> None:
    """The same keys of another structure."""
    for state in ({"a": {"b": 1}}, {"a.b": 1}, {"a": {"b": 1}}):
        assert_planned_as_by_torch([state] * 2)


# What ranks do not agree on


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (torch.ones(3), torch.ones(4)),
        (torch.ones(3), torch.ones(3, dtype=torch.float64)),
        (torch.ones(3), torch.ones(3, requires_grad=True)),
        (torch.ones(1, 3), torch.ones(3, 1)),
        (torch.ones(3), torch.tensor(1.0)),
        (torch.ones(1), 1),
        (torch.tensor(1.0), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("to_lowest", [True, False])
def test_different_tensors_of_one_name(here: Any, there: Any, to_lowest: bool) -> None:
    for states in ([{"a": here}, {"a": there}], [{"a": there}, {"a": here, "b": 1}, {"a": here}]):
        makers = [lambda: AzureSavePlanner(dedup_save_to_lowest_rank=to_lowest)]
        makers.append(lambda: dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=to_lowest))  # type: ignore[arg-type,return-value]
        ends: list[Any] = []
        for make in makers:
            try:
                plans, metadata = planned(states, make)
                ends.append((described(metadata), sorted(item.index.fqn for plan in plans for item in plan.items)))
            except Exception as error:
                ends.append((type(error), str(error)))
        assert ends[0] == ends[1]


BAD: dict[str, tuple[list[Part], str]] = {
    "a shard is missing": ([row(0, 4), row(1, 4), row(3, 4)], "18 elements where the tensor has 24"),
    "two overlap": ([Part((8, 3), (0, 0), (5, 3)), Part((8, 3), (4, 0), (4, 3))], "or have some twice"),
    "two overlap, and as many are missing": (
        [Part((9, 3), (0, 0), (3, 3)), Part((9, 3), (2, 0), (3, 3)), Part((9, 3), (6, 0), (3, 3))],
        "or have some twice",
    ),
    "of one place and two sizes": ([Part((8, 3), (0, 0), (5, 3)), Part((8, 3), (0, 0), (4, 3))], "differ in size"),
    "outside": ([Part((8, 3), (0, 0), (4, 3)), Part((8, 3), (6, 0), (4, 3))], "outside of the tensor"),
    "outside in the second dimension": ([Part((8, 3), (0, 0), (8, 2)), Part((8, 3), (0, 2), (8, 2))], "outside"),
    "a scalar of none": ([Part((2,), (2,), (0,)), Part((2,), (2,), (0,))], "0 elements where the tensor has 2"),
}


@pytest.mark.parametrize(("parts", "message"), BAD.values(), ids=BAD)
def test_shards_that_do_not_make_up_their_tensor(parts: list[Part], message: str) -> None:
    states: list[State] = [{"ok": torch.ones(2), "w.x": part} for part in parts]
    with pytest.raises(CheckpointError, match=message) as raised:
        planned(states)
    assert "'w.x'" in str(raised.value) and "Nothing was saved" in str(raised.value)


def test_one_rank_may_save_a_part() -> None:
    """As torch has it with one rank, so with no_dist=True on each of several."""
    assert_planned_as_by_torch([{"w": row(1, 4)}])


# Planners of users


class Plain(AzureSavePlanner):
    """Changes the plan, and so its items are no columns."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[item for item in plan.items if "secret" not in item.index.fqn])


class Properties(TensorProperties):
    """Of a user."""


class OfSubclass(Part):
    def __create_write_items__(self, name: str, part: Part) -> list[WriteItem]:
        self.properties = Properties(dtype=torch.float32)
        return super().__create_write_items__(name, part)


class WithHint(Part):
    def __create_write_items__(self, name: str, part: Part) -> list[WriteItem]:
        (item,) = super().__create_write_items__(name, part)
        return [dataclasses.replace(item, index=MetadataIndex(name, self.offsets, 3))]


@pytest.mark.parametrize("kind", [OfSubclass, WithHint])
@pytest.mark.parametrize("on", [(0, 1), (0,), (1,)])
def test_items_that_columns_cannot_hold(kind: type[Part], on: tuple[int, ...]) -> None:
    parts = [Part((8, 3), (4 * rank, 0), (4, 3)) for rank in range(2)]
    parts = [kind(part.size, part.offsets, part.sizes) if rank in on else part for rank, part in enumerate(parts)]
    assert_planned_as_by_torch([{"w": part, "a": {"b": torch.ones(2)}} for part in parts])


def test_a_subclass_that_changes_the_plan() -> None:
    state = {"secret": 1, "a": {"b": torch.ones(2), "c": 1}}
    plans, metadata = planned([state] * 2, Plain)
    assert set(metadata.state_dict_metadata) == {"a.b", "a.c"}
    assert metadata.planner_data["a.b"] == ("a", "b")
    assert_consistent(plans, metadata)


class OwnPaths(AzureSavePlanner):
    """Says itself where keys come from, on the first rank."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, planner_data={"a.b": ("mine",)}) if self.is_coordinator else plan


def test_a_subclass_with_paths_of_its_own() -> None:
    plans, metadata = planned([{"a": {"b": 1, "c": 2}}] * 3, OwnPaths)
    assert metadata.planner_data == {"a.b": ("mine",), "a.c": ("a", "c")}
    assert_consistent(plans, metadata)
