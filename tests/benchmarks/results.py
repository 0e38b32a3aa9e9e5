"""The results of a run as a file: what the tables and charts of the documents are made of."""

from __future__ import annotations

import datetime
import json
import os
import platform
import ssl
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import median
from tests.benchmarks.spec import GIB, AsyncCase, Case

_COMPARED = ["seconds", "MBps", "cpu_per_GiB"]
_PACKAGES = ["torch", "azure-storage-blob", "adlfs", "fsspec", "obstore"]


@dataclass(frozen=True)
class Result:
    """The measurements of one case.

    Attributes:
        case: the fields of the case.
        values: the median of its rounds, by name: ``seconds``, ``MBps``, ``cpu_per_GiB`` (user and system seconds of
            the client), ``rss``, ``payload``, ``moved`` (bytes), ``requests``, ``connections``; of an `AsyncCase` what
            `tests.benchmarks.loops.run` returns.
        lowest: the lowest ``MBps`` (of an `AsyncCase` ``lost``) of the rounds.
        highest: the highest.
        by_round: ``seconds``, ``MBps`` and ``cpu_per_GiB`` of every round, in their order. A machine's speed changes by
            a third from one minute to the next, so two cases are compared round by round.
    """

    case: dict[str, Any]
    values: dict[str, float]
    lowest: float
    highest: float
    by_round: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """All results of one kind (``compare``, ``async``, ``growth``) and how they came about."""

    date: str
    machine: str
    software: str
    scale: float
    rounds: int
    results: list[Result]

    def find(self, **fields: Any) -> Result | None:
        """The result whose case has these fields, and the defaults in all others."""
        defaults = {"connections": 16, "ranks": 1, "checksums": True}
        wanted = defaults | fields
        for result in self.results:
            if all(result.case.get(name) == value for name, value in wanted.items()):
                return result
        return None


def part(cases: Sequence[Case | AsyncCase], seen: dict[str, list[dict[str, float]]], scale: float, rounds: int) -> Part:
    results = []
    for case in cases:
        values = seen.get(case.name)
        if values:
            key = "lost" if isinstance(case, AsyncCase) else "MBps"
            rates = [one[key] for one in values]
            by_round = {name: [one[name] for one in values] for name in _COMPARED if name in values[0]}
            results.append(Result(asdict(case), median(values), min(rates), max(rates), by_round))
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Part(date, describe_machine(), describe_software(), scale, rounds, results)


def read(path: Path) -> dict[str, Part]:
    """The parts in a file; none if the file does not exist."""
    if not path.exists():
        return {}
    parts: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Part(**{**fields, "results": [Result(**result) for result in fields["results"]]})
        for name, fields in parts.items()
    }


def write(path: Path, parts: dict[str, Part]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {name: rounded(asdict(part)) for name, part in parts.items()}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Five digits of every figure: more would be noise in the file's history."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return round(value) if abs(value) >= 10_000 else float(f"{value:.5g}")
    return value


def describe_machine() -> str:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB, Linux {platform.release().partition('-')[0]}"


def describe_software() -> str:
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in _PACKAGES)
    openssl = " ".join(ssl.OPENSSL_VERSION.split()[:2])
    return f"Python {platform.python_version()}, {openssl}, {packages}"
