"""The project's targets for its speed, and whether a run met them."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from azure_torch_ckpt import TransferOptions
from tests.benchmarks.results import Part, Result
from tests.benchmarks.spec import MIB, PLAIN, SLOW, TLS

BUDGET_MIB = TransferOptions().memory_budget // MIB
_SLACK_MIB = 64


@dataclass(frozen=True)
class Target:
    """A figure and its bound.

    Attributes:
        what: the work and the figure, for a table.
        measured: None where the run did not have the cases.
        at_most: whether `bound` is an upper one.
        unit: of the figures.
    """

    what: str
    measured: float | None
    bound: float
    at_most: bool
    unit: str

    @property
    def is_met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def targets(part: Part) -> list[Target]:
    return [*_limit(part), *_tensors(part), *_latency(part), *_parts(part), *_memory(part), *_peers(part)]


def _limit(part: Part) -> Iterator[Target]:
    for regime, step, bound, bound_without in [
        (TLS.name, "save", 1.35, 1.15),
        (TLS.name, "load", 1.35, 1.2),
        (PLAIN.name, "save", 2.2, None),
        (PLAIN.name, "load", 1.8, None),
    ]:
        limit = part.find(client="climit", work="big", step=step, regime=regime)
        ours = part.find(client="ours", work="big", step=step, regime=regime)
        without = part.find(client="ours", work="big", step=step, regime=regime, checksums=False)
        yield Target(f"{step} big, {regime}: CPU", _ratio(ours, limit, "cpu_per_GiB"), bound, True, "x C")
        if bound_without is not None:
            ratio = _ratio(without, limit, "cpu_per_GiB")
            yield Target(f"{step} big, {regime}, checksums off: CPU", ratio, bound_without, True, "x C")
        if (regime, step) == (TLS.name, "load"):
            yield Target(f"{step} big, {regime}: MB/s", _ratio(ours, limit, "MBps"), 0.75, False, "x C")


def _tensors(part: Part) -> Iterator[Target]:
    for step in ("save", "load"):
        ours, null = (part.find(client=client, work="small", step=step, regime=TLS.name) for client in ("ours", "null"))
        above = None
        seconds = _of_rounds(ours, null, "seconds", operator.sub)
        if ours is not None and seconds is not None:
            above = seconds / int(ours.case["tensors"].partition("x")[0]) * 1e6
        yield Target(f"{step} small, TLS: time above planning", above, 40, True, "us a tensor")


def _latency(part: Part) -> Iterator[Target]:
    for connections, bound in [(16, 0.95), (32, 0.85)]:
        for step in ("save", "load"):
            found = {
                client: part.find(client=client, work="big", step=step, regime=SLOW.name, connections=connections)
                for client in ("ours", "climit")
            }
            ratio = _ratio(found["ours"], found["climit"], "MBps")
            yield Target(f"{step} big, {SLOW.name} a connection, {connections}: MB/s", ratio, bound, False, "x C")


def _parts(part: Part) -> Iterator[Target]:
    rows = part.find(client="ours", work="big", step="rows", regime=TLS.name)
    moved = requests = None
    if rows is not None and "moved" in rows.values:
        moved = rows.values["moved"] / rows.values["payload"]
        requests = rows.values["requests"] / int(rows.case["tensors"].partition("x")[0])
    yield Target("rows 1/8: bytes moved", moved, 1.02, True, "x wanted")
    yield Target("rows 1/8: requests", requests, 3, True, "a tensor")
    columns = part.find(client="ours", work="big", step="columns", regime=TLS.name)
    memory = None if columns is None else columns.values["rss"] / MIB
    yield Target("columns 1/8: memory above the tensors", memory, BUDGET_MIB, True, "MiB")


def _memory(part: Part) -> Iterator[Target]:
    ours = [result for result in part.results if result.case["client"] == "ours"]
    highest = max((result.values["rss"] / MIB for result in ours), default=None)
    yield Target("any case: memory above the tensors", highest, BUDGET_MIB + _SLACK_MIB, True, "MiB")


def _peers(part: Part) -> Iterator[Target]:
    for client, regime, work, step, bound in [
        ("adlfs", SLOW.name, "big", "save", 8),
        ("adlfs", SLOW.name, "big", "load", 15),
        ("adlfs", SLOW.name, "big", "rows", 40),
        ("adlfs", SLOW.name, "big", "columns", 40),
        ("adlfs", SLOW.name, "small", "twentieth", 40),
        ("azstoragetorch", TLS.name, "big", "save", 2.5),
        ("azstoragetorch", TLS.name, "big", "load", 6),
        ("azstoragetorch", SLOW.name, "big", "save", 2.5),
        ("azstoragetorch", SLOW.name, "big", "load", 6),
    ]:
        ours, other = (part.find(client=name, work=work, step=step, regime=regime) for name in ("ours", client))
        what = f"{step} {work}, {regime}: MB/s"
        yield Target(what, _ratio(ours, other, "MBps"), bound, False, f"x {client}")


def _ratio(ours: Result | None, other: Result | None, name: str) -> float | None:
    return _of_rounds(ours, other, name, operator.truediv)


def _of_rounds(
    ours: Result | None, other: Result | None, name: str, compare: Callable[[float, float], float]
) -> float | None:
    """The median of the comparisons within each round; None if a round lacks one of the two."""
    if ours is None or other is None or len(ours.by_round[name]) != len(other.by_round[name]):
        return None
    return statistics.median(map(compare, ours.by_round[name], other.by_round[name]))
