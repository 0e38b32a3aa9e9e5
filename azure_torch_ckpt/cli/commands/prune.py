"""``prune``: remove the checkpoints that no rule keeps, and the leftovers of failed saves."""

from __future__ import annotations

import datetime
import functools
from typing import TYPE_CHECKING

import click

from azure_torch_ckpt._internal.units import format_bytes
from azure_torch_ckpt.cli.commands.ls import print_checkpoints
from azure_torch_ckpt.cli.errors import exit_code
from azure_torch_ckpt.cli.options import Session, confirm_removal, duration, session_options
from azure_torch_ckpt.cli.output import Output, Table, local_time, plural, zone
from azure_torch_ckpt.location import BlobLocation

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import PruneReport

__all__ = ["prune"]


@click.command(short_help="Remove old checkpoints, and what failed saves left.")
@click.argument("url")
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the N newest of each run.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="Keep steps that are a multiple of N.")
@click.option("--older-than", type=duration, metavar="TIME", help="Keep those completed less than TIME ago: 30d, 12h.")
@click.option(
    "--grace",
    type=duration,
    metavar="TIME",
    default="1d",
    show_default=True,
    help="Keep incomplete saves that wrote data less than TIME ago: they may be running.",
)
@click.option("--delete", is_flag=True, help="Remove, after asking.")
@click.option("-y", "--yes", is_flag=True, help="Remove, without asking.")
@session_options
def prune(
    session: Session,
    url: str,
    keep_last: int | None,
    keep_every: int | None,
    older_than: datetime.timedelta | None,
    grace: datetime.timedelta,
    delete: bool,
    yes: bool,
) -> None:
    """Remove the checkpoints at and below URL that no rule keeps, and the leftovers of failed saves.

    Without --delete or --yes, the command only prints what it would remove. The checkpoints of one folder are a run,
    and the rules apply to each run. Without --keep-last, --keep-every and --older-than, the command removes only
    leftovers. With several rules, it removes a checkpoint only if none of them keeps it. The newest complete checkpoint
    of a run always stays. Data that cannot be deleted (leased, immutable) stays too: the command removes the rest, and
    exits with the code of the error.

    \b
    Examples:
      azure-torch-ckpt prune azblob://myaccount/checkpoints --keep-last 3
      azure-torch-ckpt prune azblob://myaccount/checkpoints --keep-last 3 --keep-every 10000 --older-than 30d --delete
      azure-torch-ckpt prune azblob://myaccount/checkpoints --grace 6h --yes
    """
    from azure_torch_ckpt import catalog

    output = session.output
    prune_with_rules = functools.partial(
        catalog.prune,
        url,
        keep_last=keep_last,
        keep_every=keep_every,
        older_than=older_than,
        grace=grace,
        **session.access,
    )
    with output.spinner("listing"):
        report = prune_with_rules(dry_run=True)
    dry_run = not (delete or yes)
    if not output.as_json:
        _print_plan(output, report, url, dry_run)
    if not dry_run and (report.removed or report.remains):
        confirm_removal(output, yes)
        report = prune_with_rules(dry_run=False)
        if not output.as_json:
            _print_removed(output, report)
    if output.as_json:
        output.json(
            dry_run=dry_run,
            removed=report.removed,
            remains=report.remains,
            kept=report.kept,
            undeleted=report.undeleted,
            freed=report.freed,
        )
    else:
        for undeleted in report.undeleted:
            output.note(
                f"{plural(len(undeleted.blobs), 'blob')} of {undeleted.url} could not be deleted "
                f"({format_bytes(undeleted.size)}): {undeleted.error}"
            )
    if report.undeleted and not dry_run:
        raise click.exceptions.Exit(exit_code(report.undeleted[0].error))


def _print_plan(output: Output, report: PruneReport, url: str, dry_run: bool) -> None:
    """Print what `prune` would remove, as a dry run reported it."""
    if report.removed:
        print_checkpoints(output, report.removed)
    if report.remains:
        if report.removed:
            output.print()
        columns = ("LEFTOVERS OF A FAILED SAVE", "SIZE", "BLOBS", f"WRITTEN ({zone()})")
        table = Table(*columns, right=("SIZE", "BLOBS"))
        for leftovers in report.remains:
            size, blobs = format_bytes(leftovers.size), str(len(leftovers.blobs))
            name = leftovers.url.removeprefix(f"{BlobLocation.parse(url)}").removeprefix("/") or "."
            table.add_row(name, size, blobs, local_time(leftovers.last_modified))
        output.print(table)
    if not (report.removed or report.remains):
        output.note(f"nothing to remove; {_kept(report)}")
    elif dry_run:
        kept = plural(len(report.kept), "checkpoint")
        output.note(f"nothing was removed; --delete would remove this and keep {kept}")


def _print_removed(output: Output, report: PruneReport) -> None:
    parts = [plural(len(report.removed), "checkpoint")] if report.removed else []
    if report.remains:
        parts.append(f"the leftovers of {plural(len(report.remains), 'failed save')}")
    output.note(f"removed {' and '.join(parts) or 'nothing'}, {format_bytes(report.freed)}; {_kept(report)}")


def _kept(report: PruneReport) -> str:
    return f"{plural(len(report.kept), 'checkpoint')} {'stays' if len(report.kept) == 1 else 'stay'}"
