"""The tables and the chart of docs/scale.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from tests.benchmarks.charts import write_chart
from tests.benchmarks.ranks import costs
from tests.benchmarks.ranks.costs import Figure, simulated, total
from tests.benchmarks.ranks.models import Sharding
from tests.benchmarks.ranks.results import Results, in_cpu_seconds
from tests.benchmarks.ranks.run import REAL, SHARDINGS, Values
from tests.benchmarks.ranks.sides import BEFORE, OURS, PLANNER, STOCK
from tests.benchmarks.spec import KIB, MIB
from tests.benchmarks.tables import markdown_table

_SIDES = {
    STOCK: "torch's own: DefaultSavePlanner, FileSystemWriter",
    BEFORE: "before: DefaultSavePlanner, AzureBlobWriter",
    OURS: "DefaultSavePlanner, AzureBlobWriter",
    PLANNER: "AzureSavePlanner, AzureBlobWriter",
}
_COLOURS = {STOCK: "#636363", BEFORE: "#9ecae1", OURS: "#3182bd", PLANNER: "#e6550d"}
_COORDINATOR, _RANK = "coordinator", "a rank"
_SAVE = {
    "plan": (_RANK, "makes its plan"),
    "pickle_plan": (_RANK, "pickles it"),
    "coordinator_plan": (_COORDINATOR, "makes its own plan, looks at the URL"),
    "gather_plans": (_COORDINATOR, "unpickles all plans"),
    "create_global_plan": (_COORDINATOR, "`create_global_plan`"),
    "prepare_global_plan": (_COORDINATOR, "`prepare_global_plan`"),
    "scatter_plans": (_COORDINATOR, "pickles all plans"),
    "finish_plan": (_RANK, "unpickles its plan, `finish_plan`"),
    "write_data": (_RANK, "`write_data` without the data"),
    "pickle_results": (_RANK, "pickles its results"),
    "gather_results": (_COORDINATOR, "unpickles all results"),
    "finish": (_COORDINATOR, "`finish`"),
    "broadcast": (_COORDINATOR, "pickles the metadata"),
    "receive": (_RANK, "unpickles the metadata"),
}
_LOAD = {
    "read_metadata": (_RANK, "`read_metadata`"),
    "load_plan": (_RANK, "makes its plan"),
    "pickle_load_plan": (_RANK, "pickles it"),
    "gather_load_plans": (_COORDINATOR, "unpickles all plans"),
    "global_load_plan": (_COORDINATOR, "global plan"),
    "scatter_load_plans": (_COORDINATOR, "pickles all plans"),
    "finish_load_plan": (_RANK, "unpickles its plan"),
    "read_data": (_RANK, "`read_data` without the data"),
}
# On quiet cores, virtual ranks wait for the server only, for so small a share of their time.
_QUIET = 0.1
_SHOWN = [SHARDINGS[0], SHARDINGS[2], SHARDINGS[4], SHARDINGS[5]]


def tables(results: Results, baseline: Results) -> dict[str, str]:
    """The texts for the places of the page, by their names."""
    busy = max(results.waited, baseline.waited) > _QUIET
    if busy:
        results, baseline = results.on_the_cpu(), baseline.on_the_cpu()
    found = {"targets": _targets(results, baseline, busy), "growth": _growth(results)}
    for title, under, steps in (
        ("first save", "first", _SAVE),
        ("load", "load", _LOAD),
        ("resharded", "reshard", _LOAD),
    ):
        of_shardings = (_steps(results, sharding, under, steps) for sharding in _SHOWN)
        found[title] = "\n".join(filter(None, of_shardings))
    return found | {"second save": _second(results), "processes": _processes(results), "small": _small(results)}


def _targets(results: Results, baseline: Results, busy: bool) -> str:
    rows = []
    for target in costs.targets(results, baseline):
        verdict = {True: "yes", False: "**no**", None: ""}[target.is_met]
        bound = f"<= {target.bound:g} {target.unit}"
        rows.append(
            [target.what, _figure(target.before, target.unit), _figure(target.now, target.unit), bound, verdict]
        )
    rows += _small_targets(results, baseline)
    return _header(results, busy) + markdown_table(["figure", "before", "now", "target", "met"], rows)


def _header(results: Results, busy: bool) -> str:
    clock = ""
    if busy:
        clock = " The machine was busy with other work, so all seconds of virtual ranks are CPU seconds."
    return f"Measured on {results.date}: {results.machine}. {results.software}.{clock}\n\n"


def _growth(results: Results) -> str:
    rows = [
        [str(sharding.ranks), sharding.name, _SIDES[side], *cells]
        for sharding in SHARDINGS
        for side in _sides(results)
        if any(cells := [_figure(simulated(results, side, sharding, cost), "s") for _, cost in _COSTS])
    ]
    return markdown_table(["ranks", "sharding", "with", *(f"{title}, s" for title, _ in _COSTS)], rows)


def _steps(results: Results, sharding: Sharding, under: str, steps: dict[str, tuple[str, str]]) -> str:
    sides = [side for side in _sides(results) if results.steps("simulated", side, sharding)]
    if not sides:
        return ""
    rows = []
    for name, (where, title) in steps.items():
        cells = [_step(results.steps("simulated", side, sharding), f"{under}.{name}") for side in sides]
        if any(cells):
            rows.append([where, title, *cells])
    if under != "load" and under != "reshard":
        rows.append(
            [_COORDINATOR, "memory of all its steps", *_memory(results, sides, sharding, f"{under}.coordinator")]
        )
        rows.append(["storage", "`.metadata` and others", *(_stored(results, side, sharding) for side in sides)])
    else:
        rows.append([_RANK, "memory of the first two", *_memory(results, sides, sharding, f"{under}.rank_load")])
    stops = [
        f"{_SIDES[one.side]}: {one.stopped}.\n"
        for one in results.measurements
        if one.kind == "simulated" and one.stopped and Sharding(**one.sharding) == sharding
    ]
    title = f"**{sharding.name}: {sharding.ranks:,} ranks, {sharding.tensors:,} tensors**\n\n"
    table = markdown_table(["where", "step", *(_SIDES[side] for side in sides)], rows)
    return title + table + ("\nNot run: " + " ".join(stops) if stops else "")


def _memory(results: Results, sides: Sequence[str], sharding: Sharding, name: str) -> list[str]:
    found = [results.steps("simulated", side, sharding).get(name) for side in sides]
    return ["" if one is None else _bytes(one["memory"]) for one in found]


def _stored(results: Results, side: str, sharding: Sharding) -> str:
    stored = results.steps("simulated", side, sharding).get("first.stored")
    if stored is None:
        return ""
    return _bytes(stored["metadata"]) + (f" and {_bytes(stored['index'])}" if stored["index"] else "")


def _second(results: Results) -> str:
    """The steps of the second save at the largest number of ranks where both saves were measured."""
    for sharding in reversed(SHARDINGS[:-1]):
        if any(
            f"second.{name}" in results.steps("simulated", side, sharding) for side in (OURS, PLANNER) for name in _SAVE
        ):
            return _steps(results, sharding, "second", _SAVE)
    return ""


def _processes(results: Results) -> str:
    """CPU seconds of each step in real processes, and in the simulation of as many ranks."""
    text = ""
    for side in _sides(results):
        shardings = [sharding for sharding in REAL if results.steps("real", side, sharding)]
        measured = [
            (in_cpu_seconds(results.steps("simulated", side, one)), results.steps("real", side, one))
            for one in shardings
        ]
        rows = []
        for under, steps in (("first", _SAVE), ("load", _LOAD)):
            names = [name for name in steps if measured and all(f"{under}.{name}" in real for _, real in measured)]
            for name in names:
                cells = [_cpu(one.get(f"{under}.{name}")) for pair in measured for one in pair]
                rows.append([*steps[name], *cells])
            where = _COORDINATOR if under == "first" else _RANK
            added = [name for name in names if steps[name][0] == where]
            sums = [total(one, under, added) for pair in measured for one in pair]
            rows.append([where, f"all its steps of the {'save' if under == 'first' else 'load'}", *map(_sum, sums)])
        if measured:
            columns = [f"{sharding.ranks} {what}" for sharding in shardings for what in ("simulated", "real")]
            text += f"**{_SIDES[side]}**\n\n" + markdown_table(["where", "step", *columns], rows) + "\n"
    return text


def _sum(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s"


def _cpu(values: Values | None) -> str:
    if values is None:
        return ""
    size = f", {_bytes(values['bytes'])}" if "bytes" in values else ""
    return f"{values['seconds']:.3f} s{size}"


def _small(results: Results) -> str:
    sides = _sides(results)
    names = next((list(steps) for side in sides if (steps := results.steps("small", side, None))), [])
    rows = []
    for name in names:
        _, count, step = name.split(".")
        seconds = [results.steps("small", side, None).get(name, {}).get("seconds") for side in sides]
        rows.append([step, f"{int(count):,}", *("" if one is None else f"{one * 1000:.1f} ms" for one in seconds)])
    return markdown_table(["step", "tensors", *(_SIDES[side] for side in sides)], rows)


def _small_targets(results: Results, baseline: Results) -> list[list[str]]:
    before = results.steps("small", BEFORE, None) or baseline.steps("small", OURS, None)
    now = results.steps("small", OURS, None)
    rows = []
    for name in sorted(before.keys() & now.keys(), key=lambda name: (name.split(".")[2], int(name.split(".")[1]))):
        _, count, step = name.split(".")
        old, new = before[name]["seconds"], now[name]["seconds"]
        # Medians of some ten calls differ by a tenth from one run to the next.
        verdict = "yes" if new <= 1.1 * old else "**no**"
        rows.append(
            [f"{step} of {count} tensors", f"{old * 1000:.1f} ms", f"{new * 1000:.1f} ms", "not slower", verdict]
        )
    return rows


def _sides(results: Results) -> list[str]:
    return [side for side in _SIDES if any(one.side == side for one in results.measurements)]


def _step(steps: dict[str, Values], name: str) -> str:
    values = steps.get(name)
    if values is None:
        return ""
    cells = [_seconds(values["seconds"])]
    if values.get("memory", 0) >= MIB:
        cells.append(f"+{_bytes(values['memory'])}")
    if "bytes" in values:
        cells.append(f"({_bytes(values['bytes'])})")
    if "requests" in values:
        cells.append(f"[{values['requests']:.0f} requests, {_bytes(values.get('moved', 0))}]")
    return " ".join(cells)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def _bytes(size: float) -> str:
    for unit, name in ((MIB * KIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:.0f} {name}"
    return f"{size:.0f} B"


def _figure(figure: Figure | None, unit: str) -> str:
    """A figure that was not measured has a ``~``."""
    if figure is None:
        return ""
    return f"{'' if figure.measured else '~'}{figure.value:.3g} {unit}"


_COSTS: list[tuple[str, Callable[[dict[str, Values]], float | None]]] = [
    ("first save, coordinator", lambda steps: total(steps, "first", costs.COORDINATOR)),
    ("second save, coordinator", lambda steps: total(steps, "second", costs.COORDINATOR)),
    ("save, every other rank", lambda steps: total(steps, "first", costs.RANK)),
    ("load, a rank", lambda steps: total(steps, "load", costs.LOAD)),
]


def chart(results: Results, path: Path) -> None:
    """Cost against ranks. A circle was measured, a line that goes on dotted follows from the slope."""
    if results.waited > _QUIET:
        results = results.on_the_cpu()
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, (title, cost) in zip(axes.flat, _COSTS, strict=True):
        for side in _sides(results):
            _lines(axis, results, side, cost)
        axis.set(title=title, xscale="log", yscale="log")
        axis.set_xticks([one.ranks for one in SHARDINGS], [f"{one.ranks:,}" for one in SHARDINGS])
        axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("ranks (4,096: a 405B model, triangles)")
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds")
    axes[0][0].legend(frameon=False, fontsize=7)
    write_chart(figure, path)


def _lines(axis: Any, results: Results, side: str, cost: Callable[[dict[str, Values]], float | None]) -> None:
    found = [(one.ranks, simulated(results, side, one, cost)) for one in costs.FSDP]
    measured = [(ranks, figure.value) for ranks, figure in found if figure is not None and figure.measured]
    guessed = [(ranks, figure.value) for ranks, figure in found if figure is not None and not figure.measured]
    if measured:
        axis.plot(*zip(*measured, strict=True), marker="o", markersize=4, color=_COLOURS[side], label=_SIDES[side])
    if measured and guessed:
        axis.plot(*zip(*[measured[-1], *guessed], strict=True), ":", color=_COLOURS[side])
    other = simulated(results, side, SHARDINGS[-1], cost)
    if other is not None:
        axis.plot([SHARDINGS[-1].ranks], [other.value], marker="^", color=_COLOURS[side], linestyle="none")
