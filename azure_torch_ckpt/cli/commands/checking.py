"""``verify`` and ``diff``: is a checkpoint sound, and is it the same as another?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes, format_duration, format_rate
from azure_torch_ckpt.cli.bars import byte_bar
from azure_torch_ckpt.cli.commands.looking import plural
from azure_torch_ckpt.cli.exit_codes import PROBLEM
from azure_torch_ckpt.cli.option_values import read_sas, share
from azure_torch_ckpt.cli.options import Session, session_options
from azure_torch_ckpt.cli.output import Output, printable
from azure_torch_ckpt.cli.tables import Table

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import CheckpointDiff, VerifyReport

__all__ = ["diff", "verify"]


@click.command(short_help="Read a checkpoint and compare all sizes and checksums.")
@click.argument("url")
@click.option(
    "--sample",
    type=share,
    metavar="SHARE",
    default="100%",
    show_default=True,
    help="Read this share of the tensors' shards and of the objects, chosen at random: 10%, 0.1. With 0, only "
    "the sizes of the blobs are compared.",
)
@session_options
def verify(session: Session, url: str, sample: float) -> None:
    """Read the checkpoint at URL and compare every size and checksum with its metadata.

    Nothing is written to disk. Checksums are those that AzureBlobWriter kept when it saved; what other writers saved
    has none, and then sizes are all that can be compared. If anything is wrong, the exit code is 1.

    \b
    Examples:
      azure-torch-ckpt verify azblob://myaccount/checkpoints/run-7/step-1000
      azure-torch-ckpt verify azblob://myaccount/checkpoints/run-7/step-1000 --sample 5%
    """
    from azure_torch_ckpt.catalog import verify as check

    output = session.output
    began = time.monotonic()
    done = [0]
    with byte_bar(output, "verifying") as bar:

        def progress(now: int, total: int) -> None:
            done[0] = now
            if bar is not None:
                bar(now, total)

        report = check(url, sample=sample, progress=progress, **session.access)
    if output.as_json:
        output.json(url=report.url, ok=report.ok, sample=sample, bytes_read=done[0], blobs=report.blobs)
    else:
        _print(output, report, done[0], time.monotonic() - began)
    if not report.ok:
        raise click.exceptions.Exit(PROBLEM)


def _print(output: Output, report: VerifyReport, nbytes: int, seconds: float) -> None:
    items = sum(blob.items for blob in report.blobs)
    checked = sum(blob.checked for blob in report.blobs)
    unknown = sum(blob.without_checksum for blob in report.blobs)
    if not report.ok:
        listed = Table("BLOB", "SIZE", "ITEMS", "COMPARED", "PROBLEMS", right=("SIZE", "ITEMS", "COMPARED", "PROBLEMS"))
        for blob in report.blobs:
            if blob.problems:
                size = "missing" if blob.size is None else format_bytes(blob.size)
                listed.add_row(
                    Text(printable(blob.name)), size, str(blob.items), str(blob.checked), str(len(blob.problems))
                )
        output.print(listed)
        output.print()
        for problem in report.problems:
            output.print(Text(printable(problem), style="red"))
        output.print()
    compared = f"{checked} of {plural(items, 'item')} in {plural(len(report.blobs), 'blob')} compared"
    took = f"{format_bytes(nbytes)} in {format_duration(seconds)} ({format_rate(nbytes, seconds)})"
    verdict = Text("sound", style="green") if report.ok else Text(plural(len(report.problems), "problem"), style="red")
    output.print(verdict.append(f": {compared}, {took}", style="not bold default"))
    if unknown:
        output.print(f"{plural(unknown, 'item')} without a checksum: whoever saved them kept none")


@click.command(short_help="Compare two checkpoints.")
@click.argument("a")
@click.argument("b")
@click.option("--values", is_flag=True, help="Compare the values as well, bit for bit; that reads what may differ.")
@click.option("--b-sas", metavar="SAS", help="SAS for B, where it needs another one than A. As for --sas.")
@session_options
def diff(session: Session, a: str, b: str, values: bool, b_sas: str | None) -> None:
    """Compare the checkpoints at A and B: keys, shapes and dtypes, whatever their sharding.

    Only the metadata is read. With --values, tensors with the same checksums count as the same without being read. If
    there is any difference, the exit code is 1.

    \b
    Examples:
      azure-torch-ckpt diff azblob://myaccount/checkpoints/run-7/step-1000 azblob://myaccount/checkpoints/run-8/step-1000
      azure-torch-ckpt diff azblob://myaccount/checkpoints/run-7/step-1000 azblob://archive/run-7/step-1000 --values
    """
    from azure_torch_ckpt import catalog

    output = session.output
    with byte_bar(output, "comparing") as bar:
        b_credential = read_sas(b_sas, "--b-sas")
        found = catalog.diff(a, b, values=values, progress=bar, b_credential=b_credential, **session.access)
    if output.as_json:
        output.json(same=found.same, values=values, diff=found)
    else:
        _print_diff(output, found, values)
    if not found.same:
        raise click.exceptions.Exit(PROBLEM)


def _print_diff(output: Output, found: CheckpointDiff, values: bool) -> None:
    compared = "keys, shapes, dtypes and values" if values else "keys, shapes and dtypes"
    if found.same:
        same = f"{plural(found.unchanged, 'key')} with the same {compared.removeprefix('keys, ')}"
        output.print(Text("no difference", style="green").append(f": {same}", style="default"))
        return
    listed = Table("KEY", "DIFFERENCE", "A", "B")
    for key in found.only_a:
        listed.add_row(Text(printable(key)), "only in A", "", "")
    for key in found.only_b:
        listed.add_row(Text(printable(key)), "only in B", "", "")
    for change in found.changed:
        what: str = change.what
        if change.elements is not None:
            largest = "" if change.max_abs_difference is None else f", by up to {change.max_abs_difference:.3g}"
            what = f"{plural(change.elements, 'element')}{largest}"
        listed.add_row(
            Text(printable(change.key)), what, *(Text(printable(each or "")) for each in (change.a, change.b))
        )
    output.print(listed)
    keys = len({change.key for change in found.changed}) + len(found.only_a) + len(found.only_b)
    output.note(f"{plural(keys, 'key')} differ, {found.unchanged} do not ({compared} compared)")
