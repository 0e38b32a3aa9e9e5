"""``rm``: remove checkpoints by their URLs."""

from __future__ import annotations

import dataclasses

import click

from azure_torch_ckpt._internal.units import format_bytes
from azure_torch_ckpt.cli.errors import exit_code
from azure_torch_ckpt.cli.options import Session, confirm_removal, session_options
from azure_torch_ckpt.cli.output import Table, age, local_time, plural, zone
from azure_torch_ckpt.errors import AzureCheckpointError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["rm"]


@dataclasses.dataclass(frozen=True, slots=True)
class _FailedRemoval:
    """A checkpoint that was not removed (`removed` is False), or of which some data could not be deleted."""

    url: str
    removed: bool
    error: AzureCheckpointError


@click.command(short_help="Remove checkpoints by their URLs.")
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@session_options
def rm(session: Session, urls: tuple[str, ...], yes: bool) -> None:
    """Remove the complete checkpoint at each URL.

    The command lists the checkpoints and asks for confirmation. It removes the metadata first, so that no reader finds
    half of a checkpoint; after a crash, prune removes the data that is left. Checkpoints below URL, and blobs that do
    not belong to the checkpoint, stay. To remove the leftovers of failed saves, use prune. If one checkpoint cannot be
    removed (it is leased or immutable), the command removes the others.

    \b
    Examples:
      azure-torch-ckpt rm azblob://myaccount/checkpoints/run-7/step-1000
      azure-torch-ckpt rm --yes azblob://myaccount/checkpoints/run-7/step-1000 azblob://myaccount/checkpoints/run-8/last
    """
    from azure_torch_ckpt.catalog import inspect, remove_checkpoint

    output = session.output
    # A checkpoint that is named twice is removed once; of its two URLs the one with a SAS counts.
    locations: dict[BlobLocation, BlobLocation] = {}
    for location in map(BlobLocation.parse, urls):
        if location.sas is not None or location.without_sas() not in locations:
            locations[location.without_sas()] = location
    with output.spinner("reading the metadata"):
        checkpoints = [inspect(url, **session.access) for url in locations.values()]  # all, before any removal
    if not output.as_json:
        table = Table("CHECKPOINT", "SIZE", "TENSORS", f"COMPLETED ({zone()})", right=("SIZE", "TENSORS"))
        for contents in checkpoints:
            size, tensors = format_bytes(contents.size), str(len(contents.tensors))
            completed = f"{local_time(contents.modified)}, {age(contents.modified)}"
            table.add_row(contents.url, size, tensors, completed)
        output.print(table)
    confirm_removal(output, yes)
    removed: list[str] = []
    failed: list[_FailedRemoval] = []
    try:
        for url, contents in zip(locations.values(), checkpoints, strict=True):
            try:
                undeleted = remove_checkpoint(url, **session.access)
                removed.append(contents.url)
            except AzureCheckpointError as error:
                failed.append(_FailedRemoval(contents.url, False, error))
                continue
            if undeleted:
                failed.append(_FailedRemoval(contents.url, True, next(iter(undeleted.values()))))
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
