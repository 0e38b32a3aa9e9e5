"""What the commands print: tables for people, JSON for scripts; notes and bars on stderr."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.text import Text

from azure_torch_ckpt.cli.tables import Table

__all__ = ["Output", "ReaderGoneError", "age", "local_time", "printable", "ranges", "zone"]

# Wider than any line: what goes into a pipe or a file is not cut or folded.
_NO_LIMIT = 100_000


class ReaderGoneError(Exception):
    """Who reads our output through a pipe has enough of it. (click would end with 1 after an OSError.)"""


class Output:
    """Where a command's results go.

    Args:
        as_json: print one JSON document to stdout, and no tables.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
        if not self._out.is_terminal:
            self._out.width = _NO_LIMIT
        self.err = Console(stderr=True, highlight=False, markup=False, emoji=False)

    @property
    def interactive(self) -> bool:
        """Whether a person can be asked."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def print(self, what: str | Text | Table = "") -> None:
        """A line or a table for people, on stdout."""
        text = Text("\n").join(what.lines(self._out.width)) if isinstance(what, Table) else what
        if not self._out.is_terminal:
            lines = str(text).splitlines()
        else:
            with self._out.capture() as captured:
                self._out.print(text, soft_wrap=True)
            lines = captured.get().splitlines()
        _write("".join(f"{line.rstrip()}\n" for line in lines or [""]))

    def note(self, text: str) -> None:
        """A remark, on stderr."""
        self.err.print(text, soft_wrap=True)

    def json(self, **document: Any) -> None:
        """The command's result as one JSON document on stdout."""
        plain = {"version": 1, **{name: _plain(value) for name, value in document.items()}}
        _write(json.dumps(plain, indent=2) + "\n")

    def waiting(self, for_what: str) -> AbstractContextManager[Any]:
        """Shows that something is being done, on a terminal, as long as the block lasts."""
        return self.err.status(for_what, spinner="line" if self.err.options.ascii_only else "dots")


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        # What stdout cannot encode is an escape, as Python has it for stderr.
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would obey and for what stdout cannot encode.

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
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


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
    """A value as JSON has it: data classes as objects, times in UTC, checksums (64 bits) as hexadecimal text."""
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
        return str(value)  # JSON has no word for it
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)
