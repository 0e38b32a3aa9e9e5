"""The benchmark's virtual ranks (`tests/benchmarks/ranks`) save what readers load, and report every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import StorageReader

from azure_torch_ckpt.emulator import Azurite
from tests.benchmarks.ranks.models import Parameter, Sharding, State, check_virtual
from tests.benchmarks.ranks.sides import OURS, PLANNER, STOCK, Side, has_planner, make_side
from tests.benchmarks.ranks.simulation import Coordinator, OtherRanks, load, receive
from tests.benchmarks.ranks.steps import Report, Steps
from tests.benchmarks.spec import Address
from tests.support.containers import download

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

# In 65 rows, the last of 4 shards is shorter than the others.
SHARDING = Sharding("tiny", fsdp=4)
SIDES = [STOCK, OURS, *([PLANNER] if has_planner() else [])]


def side_of(name: str, azurite: Azurite, container: str, folder: Path) -> Side:
    endpoint, _, bucket = container.rpartition("/")
    return make_side(name, Address(endpoint, bucket, azurite.account_key, "", None, counts=False), folder)


def make_job(side: Side, steps: Steps, with_data: bool) -> Coordinator:
    others = OtherRanks(side, SHARDING, "run/0", steps, with_data)
    return Coordinator(side, SHARDING, "run/0", steps, others, with_data)


def state(value: float) -> State:
    """The whole tensors, all of one value."""
    return SHARDING.state(0, lambda parameter: torch.full(parameter.sizes, value))


def assert_ranks(loaded: State) -> None:
    """Every rank's shard has the rank's number in all its elements."""

    def expected(parameter: Parameter) -> torch.Tensor:
        shards = [
            torch.full(SHARDING.chunk(parameter, rank)[1], float(rank), dtype=torch.float32)
            for rank in range(SHARDING.ranks)
        ]
        return torch.cat(shards)

    wanted = SHARDING.state(0, expected)
    for name, tensor in wanted["model"].items():
        assert torch.equal(loaded["model"][name], tensor), name
        for moment, value in wanted["optim"]["state"][name].items():
            assert torch.equal(loaded["optim"]["state"][name][moment], value), (name, moment)


@pytest.mark.parametrize("name", SIDES)
def test_saves_of_virtual_ranks_load_with_torchs_reader_and_ours(
    name: str, azurite: Azurite, container: str, tmp_path: Path
) -> None:
    side = side_of(name, azurite, container, tmp_path / "stock")
    coordinator = make_job(side, Steps(lambda report: None, counts=False), with_data=True)
    for path in ("run/1", "run/2"):
        coordinator.save(path, "save")
        readers: list[StorageReader] = [side.reader(path)]
        if name != STOCK:
            readers.append(dcp.FileSystemReader(download(side.url(path), tmp_path / name / path)))
        for reader in readers:
            loaded = state(-1.0)
            dcp.load(loaded, storage_reader=reader)
            assert_ranks(loaded)


@pytest.mark.parametrize("name", SIDES)
def test_a_save_and_loads_without_data_report_every_step(
    name: str, azurite: Azurite, container: str, tmp_path: Path
) -> None:
    reports: list[Report] = []
    steps = Steps(reports.append, counts=False)
    side = side_of(name, azurite, container, tmp_path)
    coordinator = make_job(side, steps, with_data=False)
    for number in ("first", "second"):
        receive(coordinator.save(f"run/{number}", number), steps)
    for under, ranks in (("load", 4), ("reshard", 2)):
        steps.under(under)
        load(side, Sharding("tiny", fsdp=ranks), "run/first", steps, coordinator=under == "load")
    found: dict[str, Any] = {report["step"]: report for report in reports if "step" in report}
    of_save = {
        "coordinator_plan", "plan", "pickle_plan", "gather_plans", "create_global_plan", "prepare_global_plan",
        "scatter_plans", "finish_plan", "write_data", "pickle_results", "gather_results", "finish", "broadcast",
        "coordinator", "receive",
    }  # fmt: skip
    of_rank = {"read_metadata", "load_plan", "rank_load", "pickle_load_plan", "finish_load_plan"}
    of_rank |= set() if name == STOCK else {"read_data"}
    of_leader = {"gather_load_plans", "global_load_plan", "scatter_load_plans"}
    wanted = {"first": of_save, "second": of_save, "load": of_rank | of_leader, "reshard": of_rank}
    assert found.keys() == {f"{under}.{step}" for under, names in wanted.items() for step in names}
    assert found["load.pickle_load_plan"]["items"] == SHARDING.tensors
    # torch's planner finds two stored chunks of each tensor at least. Our reader looks for them itself.
    assert found["reshard.pickle_load_plan"]["items"] >= (2 if name == STOCK else 1) * SHARDING.tensors


@pytest.mark.parametrize(
    "sharding",
    [SHARDING, Sharding("tiny", fsdp=64), Sharding("tiny", fsdp=2, tp=2, pp=2)],
    ids=lambda sharding: sharding.name,
)
def test_virtual_shards_have_the_plans_of_dtensors(sharding: Sharding) -> None:
    for rank in {0, sharding.ranks // 2, sharding.ranks - 1}:
        check_virtual(sharding, rank)
