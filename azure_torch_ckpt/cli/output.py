"""`Output`: tables for people or JSON for scripts on stdout; notes and progress bars on stderr. `Table`: its tables."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import progress as rich_progress
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes, format_duration
from azure_torch_ckpt.progress import Progress

__all__ = ["Output", "ReaderGoneError", "Table", "age", "local_time", "plural", "printable", "ranges", "zone"]

# Wider than any line: output to a pipe or a file is neither cut nor folded.
_NO_LIMIT = 100_000


class ReaderGoneError(Exception):
    """The reader of our stdout closed its pipe. (After an OSError, click would exit with 1.)"""


class Output:
    """Prints a command's results: tables or, with `as_json`, one JSON document to stdout."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
        if not self._out.is_terminal:
            self._out.width = _NO_LIMIT
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False)

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
            _Column(_bytes),
            _Column(_rate),
            _Column(_time_left, max_refresh=0.5),
        )
        with rich_progress.Progress(*columns, console=self._err, transient=True, expand=True) as bar:
            task = bar.add_task(description, total=None)
            yield lambda progress: bar.update(task, completed=progress.done, total=progress.total)


class _Column(rich_progress.ProgressColumn):
    def __init__(self, text: Callable[[rich_progress.Task], str], max_refresh: float | None = None) -> None:
        super().__init__()
        self._text, self.max_refresh = text, max_refresh

    def render(self, task: rich_progress.Task) -> Text:
        return Text(self._text(task), justify="right")


def _bytes(task: rich_progress.Task) -> str:
    return format_bytes(task.completed) + ("" if task.total is None else f" of {format_bytes(task.total)}")


def _rate(task: rich_progress.Task) -> str:
    return "" if task.speed is None else f"{format_bytes(task.speed)}/s"


def _time_left(task: rich_progress.Task) -> str:
    return f"{format_duration(max(task.time_remaining, 1.0))} left" if task.time_remaining else ""


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


_GAP = "  "
# Least width of the first column if it has to be folded.
_LEAST = 24


class Table:
    """Rows of one-line cells without rules. The first cell of a row is a name, which may be folded.

    rich's own tables take 0.4 ms a row, mostly because they measure each cell three times. `right` holds the headings
    of the columns that are aligned to the right.
    """

    def __init__(self, *columns: str, right: Sequence[str] = ()) -> None:
        self._columns = columns
        self._right = [column in right for column in columns]
        self._rows: list[tuple[Text | str, ...]] = []

    def add_row(self, *cells: Text | str) -> None:
        """Add a row, with one cell for each column. A `Text` must be printable already."""
        self._rows.append(tuple(printable(cell) if isinstance(cell, str) else cell for cell in cells))

    def lines(self, width: int) -> Iterator[Text]:
        """Yield the table's lines, none longer than `width`.

        If the columns do not fit, each row becomes a record: a line with the first cell, which is then not folded so
        that it can be copied from the terminal, and lines with the other cells beside their headings.
        """
        plain = [[str(cell) for cell in row] for row in (self._columns, *self._rows)]
        widths = [max(map(cell_len, column)) for column in zip(*plain, strict=True)]
        others = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
        if others + min(widths[0], _LEAST) > width:
            yield from self._records(width)
            return
        widths[0] = min(widths[0], width - others)
        yield from self._row([Text(column, "bold") for column in self._columns], plain[0], widths)
        for row, texts in zip(self._rows, plain[1:], strict=True):
            yield from self._row(row, texts, widths)

    def _row(self, cells: Sequence[Text | str], texts: list[str], widths: list[int]) -> Iterator[Text]:
        names = [texts[0]] if cell_len(texts[0]) <= widths[0] else chop_cells(texts[0], widths[0])
        line = Text()
        for number, (cell, text, width) in enumerate(zip(cells, texts, widths, strict=True)):
            text = text if number else names[0]
            space = " " * (width - cell_len(text))
            if number:
                line.append(_GAP)
            if self._right[number]:
                line.append(space)
            line.append(text, cell.style if isinstance(cell, Text) else None)
            if not self._right[number]:
                line.append(space)
        yield line
        for name in names[1:]:
            yield Text(name)

    def _records(self, width: int) -> Iterator[Text]:
        for name, *cells in self._rows:
            yield Text(str(name), "bold")
            line = Text(_GAP)
            for heading, cell in zip(self._columns[1:], cells, strict=True):
                if not str(cell):
                    continue
                pair = Text.assemble((f"{heading} ", "dim"), cell)
                if len(line) > len(_GAP):
                    if line.cell_len + len(_GAP) + pair.cell_len <= width:
                        line.append(_GAP)
                    else:
                        yield line
                        line = Text(_GAP)
                line.append_text(pair)
            yield line


def printable(text: str) -> str:
    """Escape control characters, which a terminal would obey, and characters that stdout cannot encode.

    Names in a container may hold any character.
    """
    if text.isprintable() and _encodes(text):
        return text
    return "".join(
        char if char.isprintable() and _encodes(char) else char.encode("unicode_escape").decode() for char in text
    )


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
