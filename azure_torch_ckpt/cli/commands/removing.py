"""``rm`` and ``prune``: remove checkpoints that are named, or that no rule keeps."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from typing import TYPE_CHECKING

import click
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes
from azure_torch_ckpt.cli.commands.looking import plural, print_entries
from azure_torch_ckpt.cli.exit_codes import exit_code
from azure_torch_ckpt.cli.option_values import duration
from azure_torch_ckpt.cli.options import Session, confirm_removal, session_options
from azure_torch_ckpt.cli.output import age, local_time, printable, zone
from azure_torch_ckpt.cli.tables import Table
from azure_torch_ckpt.errors import AzureCheckpointError
from azure_torch_ckpt.location import BlobLocation

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import PruneReport

__all__ = ["prune", "rm"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    """A checkpoint that was not removed; or it was, and data of it could not be deleted."""

    url: str
    removed: bool
    error: AzureCheckpointError


@click.command(short_help="Remove checkpoints by their URLs.")
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@session_options
def rm(session: Session, urls: tuple[str, ...], yes: bool) -> None:
    """Remove the complete checkpoint at each URL.

    Shows what there is and asks. First the metadata goes, so that nobody finds half of a checkpoint; a crash in the
    middle leaves data that prune removes. Checkpoints below URL, and blobs that are not the checkpoint's, stay. For
    what failed saves left, use prune. If one cannot be removed (it is leased or immutable), the others are.

    \b
    Examples:
      azure-torch-ckpt rm azblob://myaccount/checkpoints/run-7/step-1000
      azure-torch-ckpt rm --yes azblob://myaccount/checkpoints/run-7/step-1000 azblob://myaccount/checkpoints/run-8/last
    """
    from azure_torch_ckpt.catalog import inspect, remove_checkpoint

    output = session.output
    # One that is named twice is removed once; a URL with a SAS is the better one of the two.
    named: dict[BlobLocation, BlobLocation] = {}
    for location in map(BlobLocation.parse, urls):
        if location.sas is not None or location.without_sas() not in named:
            named[location.without_sas()] = location
    with output.waiting("looking"):
        found = [inspect(url, **session.access) for url in named.values()]  # all of them, before the first is removed
    if not output.as_json:
        listed = Table("CHECKPOINT", "SIZE", "TENSORS", f"COMPLETED ({zone()})", right=("SIZE", "TENSORS"))
        for contents in found:
            size, tensors = format_bytes(contents.size), str(len(contents.tensors))
            when = f"{local_time(contents.modified)}, {age(contents.modified)}"
            listed.add_row(Text(printable(contents.url)), size, tensors, when)
        output.print(listed)
    confirm_removal(output, yes)
    removed: list[str] = []
    failed: list[_Failure] = []
    try:
        for url, contents in zip(named.values(), found, strict=True):
            try:
                left = remove_checkpoint(url, **session.access)
                removed.append(contents.url)
            except AzureCheckpointError as error:
                failed.append(_Failure(contents.url, False, error))
                continue
            if left:
                failed.append(_Failure(contents.url, True, next(iter(left.values()))))
    finally:
        if output.as_json:
            output.json(removed=removed, failed=failed)
        else:
            for failure in failed:
                what = "is gone, but not all of its data" if failure.removed else "was not removed"
                output.note(f"{failure.url} {what}: {failure.error}")
            output.note(f"removed {plural(len(removed), 'checkpoint')}")
    if failed:
        raise click.exceptions.Exit(exit_code(failed[0].error))


@click.command(short_help="Remove old checkpoints, and what failed saves left.")
@click.argument("url")
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the N newest of each run.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="Keep those whose step is a multiple of N.")
@click.option("--older-than", type=duration, metavar="TIME", help="Keep those completed less than TIME ago: 30d, 12h.")
@click.option(
    "--grace",
    type=duration,
    metavar="TIME",
    default="1d",
    show_default=True,
    help="Keep incomplete saves that wrote anything less than TIME ago: they may be running.",
)
@click.option("--delete", is_flag=True, help="Do it, after asking.")
@click.option("-y", "--yes", is_flag=True, help="Do it, without asking.")
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
    """Remove the checkpoints at and below URL that no rule keeps, and what failed saves left behind.

    Shows what would go, and does nothing more without --delete or --yes. The checkpoints of one folder are a run, and
    the rules are for each run. Without --keep-last, --keep-every and --older-than, only the remains of failed saves go.
    With several rules, a checkpoint goes only if none of them keeps it. The newest complete checkpoint of a run always
    stays. What cannot be deleted (leased, immutable) stays too; the rest goes, and the exit code is that of the error.

    \b
    Examples:
      azure-torch-ckpt prune azblob://myaccount/checkpoints --keep-last 3
      azure-torch-ckpt prune azblob://myaccount/checkpoints --keep-last 3 --keep-every 10000 --older-than 30d --delete
      azure-torch-ckpt prune azblob://myaccount/checkpoints --grace 6h --yes
    """
    from azure_torch_ckpt import catalog

    output = session.output
    do = functools.partial(
        catalog.prune,
        url,
        keep_last=keep_last,
        keep_every=keep_every,
        older_than=older_than,
        grace=grace,
        **session.access,
    )
    with output.waiting("looking"):
        report = do(dry_run=True)
    something = bool(report.removed or report.remains)
    wanted = delete or yes
    if not output.as_json:
        if report.removed:
            print_entries(output, report.removed)
        if report.remains:
            if report.removed:
                output.print()
            listed = Table("REMAINS OF A FAILED SAVE", "SIZE", "BLOBS", f"WRITTEN ({zone()})", right=("SIZE", "BLOBS"))
            for remains in report.remains:
                size, blobs = format_bytes(remains.size), str(len(remains.blobs))
                name = remains.url.removeprefix(f"{BlobLocation.parse(url)}").removeprefix("/") or "."
                listed.add_row(Text(printable(name)), size, blobs, local_time(remains.last_modified))
            output.print(listed)
        if not something:
            output.note(f"nothing to remove; {_stay(report)}")
        elif not wanted:
            output.note(
                f"nothing was removed; --delete would remove this and keep {plural(len(report.kept), 'checkpoint')}"
            )
    if something and wanted:
        confirm_removal(output, yes)
        report = do(dry_run=False)
    if output.as_json:
        output.json(
            dry_run=not wanted,
            removed=report.removed,
            remains=report.remains,
            kept=report.kept,
            undeleted=report.undeleted,
            freed=report.freed,
        )
    elif something and wanted:
        parts = [plural(len(report.removed), "checkpoint")] if report.removed else []
        if report.remains:
            parts.append(f"the remains of {plural(len(report.remains), 'failed save')}")
        output.note(f"removed {' and '.join(parts) or 'nothing'}, {format_bytes(report.freed)}; {_stay(report)}")
    if not output.as_json:
        for undeleted in report.undeleted:
            output.note(
                f"{plural(len(undeleted.blobs), 'blob')} of {undeleted.url} could not be deleted "
                f"({format_bytes(undeleted.size)}): {undeleted.error}"
            )
    if report.undeleted and wanted:
        raise click.exceptions.Exit(exit_code(report.undeleted[0].error))


def _stay(report: PruneReport) -> str:
    return f"{plural(len(report.kept), 'checkpoint')} {'stays' if len(report.kept) == 1 else 'stay'}"
