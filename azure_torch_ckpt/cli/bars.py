"""Progress bars of bytes, with rate and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes, format_duration
from azure_torch_ckpt.cli.output import Output

__all__ = ["byte_bar"]


@contextlib.contextmanager
def byte_bar(output: Output, description: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr to be called with the bytes done and the bytes in all; None where stderr is no terminal.

    It is gone when the block ends: the command's result tells the figures.
    """
    if not output.err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), _Bytes(), _Rate(), _Left())
    with Progress(*columns, console=output.err, transient=True, expand=True) as progress:
        task = progress.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield show


class _Bytes(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f" of {format_bytes(task.total)}"
        return Text(f"{format_bytes(task.completed)}{total}", justify="right")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{format_bytes(task.speed)}/s", justify="right")


class _Left(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text(f"{format_duration(max(left, 1.0))} left" if left else "", justify="right")
