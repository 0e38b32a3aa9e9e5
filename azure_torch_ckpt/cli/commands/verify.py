"""``verify``: read a checkpoint and compare its checksums."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes, format_duration, format_rate
from azure_torch_ckpt.cli.errors import PROBLEM
from azure_torch_ckpt.cli.options import Session, session_options, share
from azure_torch_ckpt.cli.output import Output, Table, plural
from azure_torch_ckpt.progress import Progress

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import VerifyReport

__all__ = ["verify"]


@click.command(short_help="Read a checkpoint and compare all sizes and checksums.")
@click.argument("url")
@click.option(
    "--sample",
    type=share,
    metavar="SHARE",
    default="100%",
    show_default=True,
    help="Read this share of the tensors' shards and of the objects, chosen at random: 10%, 0.1. With 0, the "
    "command compares only the sizes of the blobs.",
)
@session_options
def verify(session: Session, url: str, sample: float) -> None:
    """Read the checkpoint at URL and compare every size and checksum with its metadata.

    The command writes nothing to disk. AzureBlobWriter stores a checksum with each item; other writers store none, so
    that only sizes can be compared. If anything is wrong, the exit code is 1.

    \b
    Examples:
      azure-torch-ckpt verify azblob://myaccount/checkpoints/run-7/step-1000
      azure-torch-ckpt verify azblob://myaccount/checkpoints/run-7/step-1000 --sample 5%
    """
    from azure_torch_ckpt.catalog import verify as check

    output = session.output
    began = time.monotonic()
    bytes_read = 0
    with output.progress_bar("verifying") as bar:

        def on_progress(progress: Progress) -> None:
            nonlocal bytes_read
            bytes_read = progress.done
            if bar is not None:
                bar(progress)

        report = check(url, sample=sample, progress=on_progress, **session.access)
    if output.as_json:
        output.json(url=report.url, ok=report.ok, sample=sample, bytes_read=bytes_read, blobs=report.blobs)
    else:
        _print(output, report, bytes_read, time.monotonic() - began)
    if not report.ok:
        raise click.exceptions.Exit(PROBLEM)


def _print(output: Output, report: VerifyReport, nbytes: int, seconds: float) -> None:
    items = sum(blob.items for blob in report.blobs)
    checked = sum(blob.checked for blob in report.blobs)
    without_checksum = sum(blob.without_checksum for blob in report.blobs)
    if not report.ok:
        table = Table("BLOB", "SIZE", "ITEMS", "COMPARED", "PROBLEMS", right=("SIZE", "ITEMS", "COMPARED", "PROBLEMS"))
        for blob in report.blobs:
            if blob.problems:
                size = "missing" if blob.size is None else format_bytes(blob.size)
                table.add_row(blob.name, size, str(blob.items), str(blob.checked), str(len(blob.problems)))
        output.print(table)
        output.print()
        for problem in report.problems:
            output.print(problem, style="red")
        output.print()
    compared = f"{checked} of {plural(items, 'item')} in {plural(len(report.blobs), 'blob')} compared"
    took = f"{format_bytes(nbytes)} in {format_duration(seconds)} ({format_rate(nbytes, seconds)})"
    verdict = Text("sound", style="green") if report.ok else Text(plural(len(report.problems), "problem"), style="red")
    output.print(verdict.append(f": {compared}, {took}", style="not bold default"))
    if without_checksum:
        output.print(f"{plural(without_checksum, 'item')} without a checksum: the writer stored none")
