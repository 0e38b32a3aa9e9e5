"""`Output`: tables for people or JSON for scripts on stdout; notes and progress bars on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes, format_duration
from azure_torch_ckpt.cli.tables import Table, printable
from azure_torch_ckpt.progress import Progress

__all__ = ["Output", "ReaderGoneError", "age", "local_time", "plural", "ranges", "zone"]

# Wider than any line: output to a pipe or a file is neither cut nor folded.
_NO_LIMIT = 100_000


class ReaderGoneError(Exception):
    """The reader of our stdout closed its pipe. (After an OSError, click would exit with 1.)"""


class Output:
    """Prints a command's results.

    Args:
        as_json: print one JSON document to stdout, and no tables.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
        if not self._out.is_terminal:
            self._out.width = _NO_LIMIT
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False)

    @property
    def interactive(self) -> bool:
        """Whether a person can answer a question."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def print(self, what: str | Text | Table = "", style: str = "") -> None:
        """Print a line or a table for people to stdout. A `Text` must be printable already."""
        if isinstance(what, str):
            what = Text(printable(what), style)
        text = Text("\n").join(what.lines(self._out.width)) if isinstance(what, Table) else what
        if not self._out.is_terminal:
            lines = str(text).splitlines()
        else:
            with self._out.capture() as captured:
                self._out.print(text, soft_wrap=True)
            lines = captured.get().splitlines()
        _write("".join(f"{line.rstrip()}\n" for line in lines or [""]))

    def note(self, text: str) -> None:
        """Print a remark to stderr."""
        self._err.print(text, soft_wrap=True)

    def json(self, **document: Any) -> None:
        """Print the command's result to stdout as one JSON document."""
        plain = {"version": 1, **{name: _plain(value) for name, value in document.items()}}
        _write(json.dumps(plain, indent=2) + "\n")

    def spinner(self, description: str) -> contextlib.AbstractContextManager[Any]:
        """Show a spinner on a terminal until the block ends."""
        return self._err.status(description, spinner="line" if self._err.options.ascii_only else "dots")

    @contextlib.contextmanager
    def progress_bar(self, description: str) -> Iterator[Callable[[Progress], None] | None]:
        """Show a bar with bytes, rate and time left on stderr; yield the callback for ``progress=``.

        Yields None if stderr is not a terminal. The bar disappears when the block ends: the command's result repeats
        its numbers.
        """
        if not self._err.is_terminal:
            yield None
            return
        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=None),
            _BytesColumn(),
            _RateColumn(),
            _TimeLeftColumn(),
        )
        with rich_progress.Progress(*columns, console=self._err, transient=True, expand=True) as bar:
            task = bar.add_task(description, total=None)
            yield lambda progress: bar.update(task, completed=progress.done, total=progress.total)


class _BytesColumn(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        total = "" if task.total is None else f" of {format_bytes(task.total)}"
        return Text(f"{format_bytes(task.completed)}{total}", justify="right")


class _RateColumn(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        return Text("" if task.speed is None else f"{format_bytes(task.speed)}/s", justify="right")


class _TimeLeftColumn(rich_progress.ProgressColumn):
    max_refresh = 0.5

    def render(self, task: rich_progress.Task) -> Text:
        left = task.time_remaining
        return Text(f"{format_duration(max(left, 1.0))} left" if left else "", justify="right")


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        # Characters that stdout cannot encode are escaped, as Python does for stderr.
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def local_time(moment: datetime.datetime) -> str:
    """``"2026-11-22 18:58:03"`` in the local time zone."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def zone() -> str:
    """The local time zone's name, such as ``"CET"``."""
    return datetime.datetime.now().astimezone().tzname() or "local time"


def age(moment: datetime.datetime) -> str:
    """``"3 hours ago"``, ``"just now"``."""
    seconds = (datetime.datetime.now(datetime.timezone.utc) - moment).total_seconds()
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        count = int(seconds // length)
        if count >= 1:
            return f"{plural(count, unit)} ago"
    return "just now"


def plural(count: int, noun: str) -> str:
    """``"1 blob"``, ``"2 blobs"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def ranges(numbers: set[int]) -> str:
    """``"0-3,7"`` for 0, 1, 2, 3 and 7."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in runs)


def _plain(value: Any) -> Any:
    """Convert a value for JSON: data classes to objects, times to UTC, CRC64 checksums to hexadecimal text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {
            name: f"{item:016x}" if name == "crc64" and item is not None else _plain(item)
            for name, item in fields.items()
        }
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no nan and no infinity
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)
