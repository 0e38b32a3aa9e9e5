"""``ls``: list checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes
from azure_torch_ckpt.cli.options import Session, session_options
from azure_torch_ckpt.cli.output import Output, Table, local_time, plural, zone

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import CheckpointEntry

__all__ = ["ls", "print_checkpoints"]


@click.command(short_help="List checkpoints.")
@click.argument("url")
@click.option("--complete", "only", flag_value="complete", help="Only checkpoints that can be loaded.")
@click.option("--incomplete", "only", flag_value="incomplete", help="Only saves that are running or have failed.")
@session_options
def ls(session: Session, url: str, only: str | None) -> None:
    """List the checkpoints at and below URL.

    The command reads one listing of the container's blobs. A checkpoint is complete when it has metadata; verify checks
    its data. Steps are sorted as numbers. Times are in the local time zone.

    \b
    Examples:
      azure-torch-ckpt ls azblob://myaccount/checkpoints
      azure-torch-ckpt ls azblob://myaccount/checkpoints/run-7 --incomplete
      azure-torch-ckpt ls azblob://myaccount/checkpoints --json | jq -r '.checkpoints[] | select(.step > 1000) | .url'
    """
    from azure_torch_ckpt.catalog import list_checkpoints

    output = session.output
    with output.spinner("listing"):
        entries = list_checkpoints(url, **session.access)
    if only is not None:
        entries = [entry for entry in entries if entry.complete == (only == "complete")]
    if output.as_json:
        output.json(checkpoints=entries)
    elif entries:
        print_checkpoints(output, entries)
    else:
        output.note(f"no {only + ' ' if only else ''}checkpoints at or below this URL")


def print_checkpoints(output: Output, entries: list[CheckpointEntry]) -> None:
    """Print a table of checkpoints, and a note with their number and size."""
    any_step = any(entry.step is not None for entry in entries)
    columns = ["CHECKPOINT", "STEP", "SIZE", "BLOBS", f"WRITTEN ({zone()})", "STATE"]
    table = Table(*(column for column in columns if any_step or column != "STEP"), right=("STEP", "SIZE", "BLOBS"))
    for entry in entries:
        cells: list[str | Text] = [entry.name or "."]
        if any_step:
            cells.append("-" if entry.step is None else str(entry.step))
        state: str | Text = "complete" if entry.complete else Text("incomplete", style="yellow")
        table.add_row(*cells, format_bytes(entry.size), str(entry.blobs), local_time(entry.modified), state)
    output.print(table)
    size = format_bytes(sum(entry.size for entry in entries))
    incomplete = sum(not entry.complete for entry in entries)
    note = f"{plural(len(entries), 'checkpoint')}, {size}" + (f"; {incomplete} incomplete" if incomplete else "")
    output.note(note)
