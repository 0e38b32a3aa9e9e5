"""`Steps`: measures one step of a save or a load after the other, and reports each as soon as it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.measure import Meter, process_memory
from tests.benchmarks.spec import Address

Report = dict[str, Any]


class Steps:
    """Measures ``with`` blocks.

    Args:
        emit: called with ``{"begin": name}`` when a step begins and, when it has ended, with ``{"step": name,
            "seconds": ..., "cpu": ..., "memory": ...}`` and what the block put into its record. Memory is how many
            bytes the resident memory rose above its level when the step began.
        counts: whether requests are counted, for which `Meter` may change the process for good.
    """

    def __init__(self, emit: Callable[[Report], None], *, counts: bool = True) -> None:
        self._emit = emit
        self._counts = counts
        self._prefix = ""
        self._peak = 0

    def under(self, prefix: str) -> None:
        """Let the names of what follows begin with `prefix` and a dot."""
        self._prefix = f"{prefix}."

    def note(self, name: str, **values: float) -> None:
        """Report what was counted, not measured."""
        self._emit({"step": self._prefix + name, **values})

    @contextlib.contextmanager
    def step(self, name: str, address: Address | None = None) -> Iterator[Report]:
        """Measure a block; with an `address`, its requests and bytes too."""
        self._emit({"begin": self._prefix + name})
        record: Report = {}
        meter = Meter(address if self._counts else None, collect=False)
        before = process_memory("VmRSS")
        with meter:
            yield record
        values = meter.values
        self._peak = max(self._peak, before + int(values["rss"]))
        counted: Report = {key: values[key] for key in ("requests", "moved") if key in values}
        self._emit(
            {
                "step": self._prefix + name,
                "seconds": values["end"] - values["start"],
                "cpu": values["cpu"],
                "memory": values["rss"],
                **counted,
                **record,
            }
        )

    @contextlib.contextmanager
    def together(self, name: str) -> Iterator[None]:
        """Report the highest memory of the steps in a block, above its level when the block began."""
        before = self._peak = process_memory("VmRSS")
        yield
        self.note(name, memory=max(self._peak - before, 0))
