"""The results as charts in SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
# Without these, every run would write another file for the same figures.
matplotlib.rcParams |= {"svg.hashsalt": "azure_torch_ckpt", "font.size": 9, "axes.spines.top": False}
matplotlib.rcParams["axes.spines.right"] = False

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from tests.benchmarks.results import Part, Result  # noqa: E402
from tests.benchmarks.spec import GIB, PLAIN, SLOW, TLS  # noqa: E402
from tests.benchmarks.tables import CLIENTS  # noqa: E402

_STEPS = ("save", "load")
_COLOURS = {PLAIN.name: "#9ecae1", TLS.name: "#3182bd", SLOW.name: "#e6550d"}
_LINES = {"ours": "#3182bd", "climit": "#636363", "null": "#bdbdbd"}


def compare_charts(part: Part, folder: Path, prefix: str) -> None:
    """Speed and CPU time of all clients at the few big tensors."""
    _bars(part, "MBps", "MB/s", (PLAIN, TLS, SLOW), folder / f"{prefix}-speed.svg")
    _bars(part, "cpu_per_GiB", "client's CPU seconds per GiB", (PLAIN, TLS), folder / f"{prefix}-cpu.svg")


def async_chart(part: Part, folder: Path, prefix: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharex=True, sharey=True, layout="constrained")
    for axis, loop in zip(axes, ("python", "torch"), strict=True):
        results = [result for result in part.results if result.case["loop"] == loop]
        names = [
            f"{'ours' if result.case['writer'] == 'ours' else 'disk'}, {result.case['mode']}" for result in results
        ]
        axis.barh(names, [result.values["save"] for result in results], color="#d9d9d9", label="save under way")
        axis.barh(names, [result.values["lost"] for result in results], color="#e6550d", height=0.4, label="loop lost")
        axis.set(title={"python": "pure-Python loop", "torch": "torch loop on the CPU"}[loop], xlabel="seconds")
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False)
    write_chart(figure, folder / f"{prefix}-async.svg")


def growth_charts(part: Part, folder: Path, prefix: str) -> None:
    for work, label, x, y, unit in [
        ("bytes", "GiB", lambda one: one.values["payload"] / GIB, lambda one: one.values["seconds"], "seconds"),
        ("tensors", "tensors of 16 KiB", _count, lambda one: one.values["seconds"], "seconds"),
        ("connections", "connections", lambda one: one.case["connections"], lambda one: one.values["MBps"], "MB/s"),
    ]:
        results = [result for result in part.results if result.case["work"] == work]
        if results:
            _growth(results, label, x, y, unit, folder / f"{prefix}-growth-{work}.svg")


def _growth(
    results: list[Result],
    label: str,
    x: Callable[[Result], float],
    y: Callable[[Result], float],
    unit: str,
    path: Path,
) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for axis, step in zip(axes, _STEPS, strict=True):
        for client, colour in _LINES.items():
            points = [(x(result), y(result)) for result in results if _is(result, client, step)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=CLIENTS[client])
        largest = max((result for result in results if _is(result, "ours", step)), key=x)
        smallest = min((result for result in results if _is(result, "ours", step)), key=x)
        # From the first point for what should grow with connections, from the last for what should cost in proportion.
        origin = smallest if unit == "MB/s" else largest
        ends = [x(smallest), x(largest)]
        axis.plot(ends, [y(origin) / x(origin) * end for end in ends], ":", color="#31a354", label="in proportion")
        axis.set(title=step, xlabel=label, xscale="log", yscale="log")
    axes[0].set_ylabel(unit)
    axes[0].legend(frameon=False)
    write_chart(figure, path)


def _bars(part: Part, value: str, label: str, regimes: tuple[Any, ...], path: Path) -> None:
    clients = [client for client in CLIENTS if part.find(client=client, work="big", step="save", regime=TLS.name)]
    height = 0.8 / len(regimes)
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.4 + 0.5 * len(clients)), sharey=True, layout="constrained")
    for axis, step in zip(axes, _STEPS, strict=True):
        for number, regime in enumerate(regimes):
            for row, client in enumerate(clients):
                result = part.find(client=client, work="big", step=step, regime=regime.name)
                if result is not None:
                    bars = axis.barh(row + (number + 0.5) * height - 0.4, result.values[value], height)
                    bars[0].set_color(_COLOURS[regime.name])
                    axis.bar_label(bars, fmt="%.2f" if value == "cpu_per_GiB" else "%.0f", padding=2, fontsize=7)
        axis.set(title=f"{step}, few big tensors", xlabel=label)
        axis.set_yticks(range(len(clients)), [CLIENTS[client] for client in clients])
    axes[0].invert_yaxis()
    corner = "upper right" if value == "cpu_per_GiB" else "lower right"  # where the bars are short
    handles = [Patch(color=_COLOURS[regime.name]) for regime in regimes]
    axes[1].legend(handles, [regime.name for regime in regimes], frameon=False, loc=corner)
    write_chart(figure, path)


def _is(result: Result, client: str, step: str) -> bool:
    return bool(result.case["client"] == client and result.case["step"] == step)


def _count(result: Result) -> float:
    return float(result.case["tensors"].partition("x")[0])


def write_chart(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
