"""The measurements of the part ``ranks`` as a file."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tests.benchmarks.ranks.models import Sharding
from tests.benchmarks.ranks.run import Measurement, Values
from tests.benchmarks.results import describe_machine, describe_software, rounded


@dataclass
class Results:
    """All measurements, and how they came about.

    Attributes:
        before: the commit of the side ``before``.
    """

    date: str = ""
    machine: str = ""
    software: str = ""
    before: str = ""
    measurements: list[Measurement] = field(default_factory=list)

    def keep(self, measurement: Measurement) -> None:
        """Add a measurement, or put it in the place of an earlier one of the same name."""
        self.measurements = [one for one in self.measurements if one.name != measurement.name] + [measurement]
        self.date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        self.machine, self.software = describe_machine(), describe_software()

    def steps(self, kind: str, side: str, sharding: Sharding | None) -> dict[str, Values]:
        """The steps of a measurement; none if there is no such measurement."""
        wanted = {} if sharding is None else asdict(sharding)
        for one in self.measurements:
            if (one.kind, one.side, one.sharding) == (kind, side, wanted):
                return one.steps
        return {}

    @property
    def waited(self) -> float:
        """Which share of the simulated steps' time was not CPU time: they waited for the server, or for a core."""
        steps = [values for one in self.measurements if one.kind == "simulated" for values in one.steps.values()]
        wall, cpu = (sum(values[key] for values in steps if "cpu" in values) for key in ("seconds", "cpu"))
        return 1 - cpu / wall if wall else 0.0

    def on_the_cpu(self) -> Results:
        """The same with the CPU seconds of every simulated step in the place of its seconds."""
        return replace(self, measurements=[replace(one, steps=in_cpu_seconds(one.steps)) for one in self.measurements])


def in_cpu_seconds(steps: dict[str, Values]) -> dict[str, Values]:
    """Steps with their CPU seconds in the place of their seconds, where both were measured."""
    return {name: {**values, "seconds": values["cpu"]} if "cpu" in values else values for name, values in steps.items()}


def read(path: Path) -> Results:
    """What is in a file; nothing if it does not exist."""
    if not path.exists():
        return Results()
    fields = json.loads(path.read_text(encoding="utf-8"))
    return Results(**{**fields, "measurements": [Measurement(**one) for one in fields["measurements"]]})


def write(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(asdict(results)), indent=1) + "\n", encoding="utf-8")
