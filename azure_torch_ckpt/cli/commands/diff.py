"""``diff``: compare two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.text import Text

from azure_torch_ckpt.cli.errors import PROBLEM
from azure_torch_ckpt.cli.options import Session, read_sas, session_options
from azure_torch_ckpt.cli.output import Output, Table, plural

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import CheckpointDiff

__all__ = ["diff"]


@click.command(short_help="Compare two checkpoints.")
@click.argument("a")
@click.argument("b")
@click.option("--values", is_flag=True, help="Also compare the values, bit for bit. Reads the tensors that may differ.")
@click.option("--b-sas", metavar="SAS", help="SAS for B, where it needs another one than A. As for --sas.")
@session_options
def diff(session: Session, a: str, b: str, values: bool, b_sas: str | None) -> None:
    """Compare the checkpoints at A and B: keys, shapes and dtypes, whatever their sharding.

    The command reads only the metadata. With --values, it reads the tensors too, except those with equal checksums. If
    there is any difference, the exit code is 1.

    \b
    Examples:
      azure-torch-ckpt diff azblob://myaccount/checkpoints/run-7/step-1000 azblob://myaccount/checkpoints/run-8/step-1000
      azure-torch-ckpt diff azblob://myaccount/checkpoints/run-7/step-1000 azblob://archive/run-7/step-1000 --values
    """
    from azure_torch_ckpt import catalog

    output = session.output
    b_credential = read_sas(b_sas, "--b-sas")
    with output.progress_bar("comparing") as bar:
        report = catalog.diff(a, b, values=values, progress=bar, b_credential=b_credential, **session.access)
    if output.as_json:
        output.json(same=report.same, values=values, diff=report)
    else:
        _print(output, report, values)
    if not report.same:
        raise click.exceptions.Exit(PROBLEM)


def _print(output: Output, report: CheckpointDiff, values: bool) -> None:
    compared = "keys, shapes, dtypes and values" if values else "keys, shapes and dtypes"
    if report.same:
        same = f"{plural(report.unchanged, 'key')} with the same {compared.removeprefix('keys, ')}"
        output.print(Text("no difference", style="green").append(f": {same}", style="default"))
        return
    table = Table("KEY", "DIFFERENCE", "A", "B")
    for key in report.only_a:
        table.add_row(key, "only in A", "", "")
    for key in report.only_b:
        table.add_row(key, "only in B", "", "")
    for change in report.changed:
        what: str = change.what
        if change.elements is not None:
            largest = "" if change.max_abs_difference is None else f", by up to {change.max_abs_difference:.3g}"
            what = f"{plural(change.elements, 'element')}{largest}"
        table.add_row(change.key, what, *(each or "" for each in (change.a, change.b)))
    output.print(table)
    keys = len({change.key for change in report.changed}) + len(report.only_a) + len(report.only_b)
    output.note(f"{plural(keys, 'key')} differ, {report.unchanged} do not ({compared} compared)")
