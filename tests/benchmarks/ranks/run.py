"""Runs the part ``ranks``: every measurement in a process of its own, with limits of its time and memory."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.endpoints import AzsinkEndpoint, Endpoint
from tests.benchmarks.processes import ROOT, median
from tests.benchmarks.ranks.models import Sharding
from tests.benchmarks.ranks.sides import BEFORE, OURS, PLANNER, STOCK, has_planner
from tests.benchmarks.spec import GIB, PLAIN, TLS

Values = dict[str, float]

# A step that takes more CPU seconds than the first, or a process that grows beyond the second, ends the measurement of
# its side. The third is the longest wait for a step, for one that hangs.
_STEP_SECONDS = 240.0
_MEMORY = 15 * GIB
_WAIT_SECONDS = 1800.0

# Up to so many ranks, planners that keep nothing save twice too; beyond, they would only take the same time again.
_SECOND_SAVE_RANKS = 256

_SMALL_COUNTS = (10, 100, 1000)
_SMALL_ROUNDS = 3
_SMALL_REPEATS = 5

SHARDINGS = [
    *(Sharding("Llama 3 70B", ranks) for ranks in (64, 128, 256, 512, 1024)),
    Sharding("Llama 3.1 405B", fsdp=32, tp=8, pp=16),
]
REAL = [Sharding("Llama 3 70B, one column", ranks) for ranks in (8, 16, 32)]

# The package is imported from one folder, and everything else from this tree.
_START = (
    "import sys; sys.path.insert(0, {package!r}); import azure_torch_ckpt; sys.path[0] = {root!r}; "
    "from tests.benchmarks.ranks import child; child.main()"
)


@dataclass(frozen=True)
class Measurement:
    """What one side cost with one sharding.

    Attributes:
        kind: ``simulated``, ``real`` or ``small``.
        sharding: the fields of a `Sharding`; none for ``small``.
        steps: seconds, bytes and memory (bytes) of each step, by its name.
        stopped: the step that was not finished, and why: empty if all were.
    """

    kind: str
    side: str
    sharding: dict[str, Any]
    steps: dict[str, Values]
    stopped: str = ""

    @property
    def name(self) -> str:
        return _name(self.kind, Sharding(**self.sharding) if self.sharding else None, self.side)


def measure(
    endpoint: Endpoint, before: Path | None, wanted: Callable[[str], bool], keep: Callable[[Measurement], None]
) -> list[str]:
    """Run everything whose `Measurement.name` is wanted. With `before`, the package in that folder is one more side.

    Args:
        keep: called with each measurement as soon as it is done.

    Returns:
        The errors of processes that failed.
    """
    with endpoint, tempfile.TemporaryDirectory(prefix="benchmark-ranks-") as folder:
        run = _Run(endpoint, Path(folder), before, wanted, keep)
        run.small()
        for sharding in REAL:
            run.real(sharding)
        for sharding in [*REAL, *SHARDINGS]:
            run.simulated(sharding)
    return run.errors


def _name(kind: str, sharding: Sharding | None, side: str) -> str:
    return ", ".join([kind, *([] if sharding is None else [sharding.name]), side])


class _Stopped(Exception):
    """A process was ended because of a limit, or failed."""


class _Run:
    def __init__(
        self,
        endpoint: Endpoint,
        folder: Path,
        before: Path | None,
        wanted: Callable[[str], bool],
        keep: Callable[[Measurement], None],
    ) -> None:
        self.errors: list[str] = []
        self._wanted = wanted
        self._keep = keep
        self._endpoint = endpoint
        self._folder = folder
        self._before = before
        self._sides = [*([] if before is None else [BEFORE]), OURS, *([PLANNER] if has_planner() else []), STOCK]
        self._number = 0

    def simulated(self, sharding: Sharding) -> None:
        for side in self._chosen("simulated", sharding):
            saves = 2 if side == PLANNER or sharding.ranks <= _SECOND_SAVE_RANKS else 1
            path = self._fresh()
            steps: dict[str, Values] = {}
            stopped = ""
            broadcast = str(self._folder / "broadcast")
            jobs: list[dict[str, Any]] = [
                {"job": "save", "path": path, "saves": saves, "broadcast": broadcast},
                *({"job": "receive", "under": under, "broadcast": broadcast} for under in ("first", "second")[:saves]),
                {"job": "load", "under": "load", "path": f"{path}-first"},
                {"job": "load", "under": "reshard", "path": f"{path}-first", "ranks": 2},
            ]
            for job in jobs:
                split = sharding if "ranks" not in job else _fewer(sharding)
                try:
                    self._child(side, {**job, "sharding": asdict(split)}, steps)
                except _Stopped as reason:
                    stopped = str(reason)
                    break
            self._keep(Measurement("simulated", side, asdict(sharding), steps, stopped))
            self._wipe()

    def real(self, sharding: Sharding) -> None:
        for side in self._chosen("real", sharding):
            steps: dict[str, Values] = {}
            stopped = ""
            try:
                self._child(side, {"job": "real", "path": self._fresh(), "sharding": asdict(sharding)}, steps)
            except _Stopped as reason:
                stopped = str(reason)
            self._keep(Measurement("real", side, asdict(sharding), steps, stopped))
            self._wipe()

    def small(self) -> None:
        """All sides in turn, several rounds."""
        seen: dict[str, dict[str, list[Values]]] = defaultdict(lambda: defaultdict(list))
        for _ in range(_SMALL_ROUNDS):
            for side in self._chosen("small", None):
                order = {"job": "small", "path": self._fresh(), "counts": _SMALL_COUNTS, "repeats": _SMALL_REPEATS}
                for name, values in self._reports(side, order):
                    seen[side][name].append(values)
                self._wipe()
        for side, steps in seen.items():
            self._keep(Measurement("small", side, {}, {name: median(values) for name, values in steps.items()}))

    def _chosen(self, kind: str, sharding: Sharding | None) -> list[str]:
        return [side for side in self._sides if self._wanted(_name(kind, sharding, side))]

    def _fresh(self) -> str:
        self._number += 1
        return f"{self._endpoint.root}/ranks-{self._number}"

    def _wipe(self) -> None:
        if isinstance(self._endpoint, AzsinkEndpoint):
            self._endpoint.command(PLAIN, "/__wipe")
        subprocess.run(["rm", "-rf", str(self._folder / self._endpoint.root)], check=True)

    def _child(self, side: str, order: dict[str, Any], steps: dict[str, Values]) -> None:
        for name, values in self._reports(side, order):
            steps[name] = values

    def _reports(self, side: str, order: dict[str, Any]) -> Iterator[tuple[str, Values]]:
        """The steps that a process reports, as it reports them.

        Raises:
            _Stopped: it exceeded a limit, or failed.
        """
        address = asdict(self._endpoint.address(PLAIN if False in self._endpoint.has_tls else TLS))
        order = {**order, "side": side, "address": address, "folder": str(self._folder)}
        package = self._before if side == BEFORE and self._before is not None else ROOT
        process = subprocess.Popen(
            [sys.executable, "-c", _START.format(package=str(package), root=str(ROOT)), json.dumps(order)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield from self._watched(process, side, order)
        finally:
            process.kill()
            process.wait()

    def _watched(
        self, process: subprocess.Popen[str], side: str, order: dict[str, Any]
    ) -> Iterator[tuple[str, Values]]:
        assert process.stdout is not None
        step, begin, cpu = "", time.monotonic(), 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=0.2):
                    line = process.stdout.readline()
                    if not line:
                        break
                    report = json.loads(line)
                    step, begin, cpu = report.get("begin", ""), time.monotonic(), _cpu_seconds(process.pid)
                    if "step" in report:
                        yield report.pop("step"), report
                elif step and _cpu_seconds(process.pid) - cpu > _STEP_SECONDS:
                    raise _Stopped(f"{step}: more than {_STEP_SECONDS:.0f} s")
                elif time.monotonic() - begin > _WAIT_SECONDS:
                    raise _Stopped(f"{step}: not done after {_WAIT_SECONDS:.0f} s")
                elif _resident(process.pid) > _MEMORY:
                    raise _Stopped(f"{step}: more than {_MEMORY // GIB} GiB")
        if process.wait() != 0:
            error = f"{order['job']} of {side} failed at {step or 'its start'}"
            self.errors.append(error)
            raise _Stopped(error)


def _fewer(sharding: Sharding) -> Sharding:
    """The same over half as many ranks: each wants two stored chunks of every tensor."""
    return Sharding(sharding.model, sharding.fsdp // 2, sharding.tp, sharding.pp)


def _resident(pid: int) -> int:
    """Of a process and its children."""
    total = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (pid, *map(int, children)):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        pass  # it has ended
    return total * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # it has ended
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # proc(5): utime, stime
