"""What the targets are about, computed from the measured steps: the costs of a coordinator, of a rank, of a job."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.benchmarks.ranks.models import Sharding
from tests.benchmarks.ranks.results import Results
from tests.benchmarks.ranks.run import REAL, SHARDINGS, Values
from tests.benchmarks.ranks.sides import BEFORE, OURS, PLANNER
from tests.benchmarks.spec import GIB

_MB = 1_000_000

COORDINATOR = [
    "coordinator_plan",
    "gather_plans",
    "create_global_plan",
    "prepare_global_plan",
    "scatter_plans",
    "gather_results",
    "finish",
    "broadcast",
]
RANK = ["plan", "pickle_plan", "finish_plan", "pickle_results", "receive"]
OUR_PART = ["prepare_global_plan", "gather_results", "finish", "broadcast"]
GATHERED = ["pickle_plan", "pickle_results"]
LOAD = ["read_metadata", "load_plan"]

FSDP = [sharding for sharding in SHARDINGS if sharding.pp == 1]


@dataclass(frozen=True)
class Figure:
    """A figure, and whether it was measured or follows from the slope of smaller numbers of ranks."""

    value: float
    measured: bool = True


def total(steps: dict[str, Values], under: str, names: Sequence[str], key: str = "seconds") -> float | None:
    """The sum over some steps; None if one of them was not run."""
    values = [steps.get(f"{under}.{name}", {}).get(key) for name in names]
    return None if None in values else math.fsum(value for value in values if value is not None)


def simulated(
    results: Results, side: str, sharding: Sharding, cost: Callable[[dict[str, Values]], float | None]
) -> Figure | None:
    """A cost with one sharding; if it was not measured, the line through the two largest smaller ones, in logarithms.

    Returns:
        None where fewer than two smaller ones were measured.
    """
    value = cost(results.steps("simulated", side, sharding))
    if value is not None:
        return Figure(value)
    if sharding not in FSDP:
        return None
    points = []
    for smaller in FSDP:
        found = cost(results.steps("simulated", side, smaller))
        if smaller.ranks < sharding.ranks and found:
            points.append((math.log(smaller.ranks), math.log(found)))
    if len(points) < 2:
        return None
    (x0, y0), (x1, y1) = points[-2:]
    return Figure(math.exp(y1 + (y1 - y0) / (x1 - x0) * (math.log(sharding.ranks) - x1)), measured=False)


@dataclass(frozen=True)
class Target:
    """A figure of the targets: before, now, and the bound."""

    what: str
    before: Figure | None
    now: Figure | None
    bound: float
    unit: str

    @property
    def is_met(self) -> bool | None:
        return None if self.now is None else self.now.value <= self.bound


def targets(results: Results, baseline: Results) -> list[Target]:
    """All targets at the largest number of ranks.

    Args:
        baseline: an earlier version's results, whose own side is the column before where this run has none.
    """
    has_before = any(one.side == BEFORE for one in results.measurements)
    earlier, its_side = (results, BEFORE) if has_before else (baseline, OURS)
    has_planner = any(one.side == PLANNER for one in results.measurements)
    best = PLANNER if has_planner else OURS
    largest = FSDP[-1]

    def target(
        what: str,
        cost: Callable[[dict[str, Values]], float | None],
        bound: float,
        unit: str,
        side: str = best,
        before: Callable[[dict[str, Values]], float | None] | None = None,
    ) -> Target:
        return Target(
            what,
            simulated(earlier, its_side, largest, before or cost),
            simulated(results, side, largest, cost),
            bound,
            unit,
        )

    def coordinator(under: str) -> Callable[[dict[str, Values]], float | None]:
        return lambda steps: total(steps, under, COORDINATOR)

    def rank(under: str) -> Callable[[dict[str, Values]], float | None]:
        return lambda steps: total(steps, under, RANK)

    def memory(steps: dict[str, Values]) -> float | None:
        return _scaled(total(steps, "load", ["rank_load"], "memory"), GIB)

    def gathered(under: str) -> Callable[[dict[str, Values]], float | None]:
        return lambda steps: _scaled(total(steps, under, GATHERED, "bytes"), _MB)

    # The planner before keeps nothing from one save to the next, so its second save is its first again.
    found = [
        target("save, coordinator, first, all steps", coordinator("first"), 12, "s"),
        target("save, coordinator, second", coordinator("second"), 2, "s", before=coordinator("first")),
        target("save, every other rank, first", rank("first"), 0.5, "s"),
        target("save, every other rank, second", rank("second"), 0.5, "s", before=rank("first")),
        target(
            "save, torch's default planner: our part of the coordinator's time",
            lambda steps: total(steps, "first", OUR_PART),
            8,
            "s",
            side=OURS,
        ),
        target("gathered from a rank, first save", gathered("first"), 0.1, "MB"),
        target("gathered from a rank, second save", gathered("second"), 0.03, "MB", before=gathered("first")),
        Target(
            "`.metadata` and index together",
            _per_item(earlier, its_side),
            _per_item(results, best),
            150,
            "B an item",
        ),
        target("load, a rank's time for metadata and plan", lambda steps: total(steps, "load", LOAD), 2, "s"),
        target("load, a rank's memory for them", memory, 0.4, "GiB"),
    ]
    what = f"load, bytes of metadata from the service, whole job ({REAL[-1].ranks} processes)"
    found.append(Target(what, _fetched(earlier, its_side), _fetched(results, best), 2, "x its size"))
    return found


def _scaled(value: float | None, unit: int) -> float | None:
    return None if value is None else value / unit


def _stored(steps: dict[str, Values]) -> float | None:
    stored = steps.get("first.stored")
    return None if stored is None else stored["metadata"] + stored["index"]


def _per_item(results: Results, side: str) -> Figure | None:
    """Of the largest number of ranks that was measured: it hardly depends on it."""
    for sharding in reversed(FSDP):
        size = _stored(results.steps("simulated", side, sharding))
        if size is not None:
            return Figure(size / (sharding.tensors * sharding.ranks))
    return None


def _fetched(results: Results, side: str) -> Figure | None:
    """Bytes of metadata that all processes of a real job fetched together, over its size."""
    steps = results.steps("real", side, REAL[-1])
    size, moved = _stored(steps), steps.get("load.job", {}).get("moved")
    if size is None or moved is None:
        return None
    return Figure((moved - steps["first.stored"]["data"]) / size)
