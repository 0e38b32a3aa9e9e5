"""What the fault tests counted, as JSON lines: the table of docs/reliability.md is made of them.

    RELIABILITY_LOG=counts.jsonl pytest tests

adds a line such as ``{"fault": "first save: SIGKILL", "tried": 18, "outcome": "nothing", "count": 12}`` for each kind
of outcome. The lines of one fault have the same `tried`, and their counts add up to it.

    python -m tests.faults.tally counts.jsonl docs/reliability.md

puts them into the table, between its marks.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path


class Tally:
    """Appends to the file that the environment variable RELIABILITY_LOG names; without it, only checks its callers."""

    def __init__(self) -> None:
        path = os.environ.get("RELIABILITY_LOG")
        self._path = Path(path) if path else None

    def add(self, fault: str, tried: int, outcome: str, count: int) -> None:
        assert 0 < count <= tried, f"{fault}: {count} times {outcome!r} in {tried} tries"
        if self._path is not None:
            line = json.dumps({"fault": fault, "tried": tried, "outcome": outcome, "count": count})
            with self._path.open("a", encoding="utf-8") as log:
                log.write(line + "\n")

    def add_all(self, fault: str, outcomes: Counter[str]) -> None:
        """One line for each outcome of a fault."""
        for outcome, count in sorted(outcomes.items()):
            self.add(fault, outcomes.total(), outcome, count)


def table(lines: list[str]) -> str:
    """A row for each fault: how often it was tried, and what came of it."""
    outcomes: dict[str, list[str]] = {}
    tried: dict[str, int] = {}
    for entry in map(json.loads, lines):
        outcomes.setdefault(entry["fault"], []).append(f"{entry['outcome']}: {entry['count']}")
        tried[entry["fault"]] = entry["tried"]
    rows = [f"| {fault} | {tried[fault]} | {'; '.join(outcomes[fault])} |" for fault in sorted(outcomes)]
    return "\n".join(["| fault | tried | what happened |", "|---|--:|---|", *rows])


def main(log: str, document: str) -> None:
    page = Path(document)
    rows = table(Path(log).read_text(encoding="utf-8").splitlines())
    text = page.read_text(encoding="utf-8")
    between = re.compile(r"(<!-- table -->\n).*?(\n<!-- end -->)", re.DOTALL)
    page.write_text(between.sub(lambda marks: marks[1] + rows + marks[2], text), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
