"""``cp`` and ``consolidate``: checkpoints to other places, and into one file."""

from __future__ import annotations

import fnmatch
import functools
from typing import Literal

import click
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes, format_duration, format_rate
from azure_torch_ckpt.cli.bars import byte_bar
from azure_torch_ckpt.cli.commands.looking import plural
from azure_torch_ckpt.cli.option_values import read_sas
from azure_torch_ckpt.cli.options import Session, session_options
from azure_torch_ckpt.cli.output import printable
from azure_torch_ckpt.errors import AzureCheckpointError, ConfigurationError

__all__ = ["consolidate", "cp"]

_TARGET_SAS = "SAS for TARGET, where it needs another one than the source. As for --sas."


@click.command(short_help="Copy checkpoints between containers and disks.")
@click.argument("source")
@click.argument("target")
@click.option("--overwrite", is_flag=True, help="Replace other checkpoints that stand at TARGET.")
@click.option("--no-verify", is_flag=True, help="Do not read back what the service has copied by itself.")
@click.option("--target-sas", metavar="SAS", help=_TARGET_SAS)
@session_options
def cp(session: Session, source: str, target: str, overwrite: bool, no_verify: bool, target_sas: str | None) -> None:
    """Copy the checkpoint at SOURCE to TARGET, or all complete ones below SOURCE to places of the same names.

    SOURCE and TARGET are URLs or local folders; at least one is a URL. Between containers the service copies, and
    nothing goes through this machine where it can. Every checksum is compared. The metadata is written last: a copy
    that was broken off can be seen nowhere, and the same command goes on with it. A folder is what torch's
    FileSystemReader loads.

    \b
    Examples:
      azure-torch-ckpt cp azblob://myaccount/checkpoints/run-7/step-1000 ./step-1000
      azure-torch-ckpt cp ./step-1000 azblob://myaccount/checkpoints/run-7/step-1000
      azure-torch-ckpt cp azblob://myaccount/checkpoints/run-7 azblob://archive/checkpoints/run-7
    """
    from azure_torch_ckpt.catalog import copy

    output = session.output
    with byte_bar(output, "copying") as bar:
        report = copy(
            source,
            target,
            overwrite=overwrite,
            verify=not no_verify,
            progress=bar,
            dst_credential=read_sas(target_sas, "--target-sas"),
            **session.access,
        )
    if output.as_json:
        output.json(report=report)
        return
    there = f"{plural(report.skipped, 'blob')} {'was' if report.skipped == 1 else 'were'} there already"
    if not report.blobs:
        output.print(f"nothing to copy: {there}")
        return
    rate = format_rate(report.bytes, report.seconds)
    took = f"{format_duration(report.seconds)} ({rate})"
    line = f"copied {format_bytes(report.bytes)} in {plural(report.blobs, 'blob')}, {took}"
    output.print(f"{line}; {there}" if report.skipped else line)


@click.command(short_help="Write a checkpoint as one file.")
@click.argument("url")
@click.argument("target")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["torch", "safetensors"]),
    help="Of the file. Without it, the suffix tells: .pt, .pth, .bin and .ckpt are torch's, .safetensors the other.",
)
@click.option("--match", metavar="PATTERN", help="Only keys that match, such as 'model.*' to leave the optimizer out.")
@click.option("--overwrite", is_flag=True, help="Replace a file or blob that stands at TARGET.")
@click.option("--target-sas", metavar="SAS", help=_TARGET_SAS)
@session_options
def consolidate(
    session: Session,
    url: str,
    target: str,
    kind: Literal["torch", "safetensors"] | None,
    match: str | None,
    overwrite: bool,
    target_sas: str | None,
) -> None:
    """Write the sharded checkpoint at URL as one file: TARGET is a local path or the URL of a blob.

    The file is written while the tensors are read, so it may be larger than the memory of this machine. Every checksum
    is compared on the way. A torch file is what torch.load reads, with the nested state dict; a safetensors file has
    the tensors under their flattened names, and numbers and texts in its metadata.

    \b
    Examples:
      azure-torch-ckpt consolidate azblob://myaccount/checkpoints/run-7/step-1000 model.pt
      azure-torch-ckpt consolidate azblob://myaccount/checkpoints/run-7/step-1000 model.safetensors --match 'model.*'
      azure-torch-ckpt consolidate azblob://myaccount/checkpoints/run-7/step-1000 azblob://myaccount/models/run-7.pt
    """
    from azure_torch_ckpt import catalog

    output = session.output
    with byte_bar(output, "writing") as bar:
        try:
            report = catalog.consolidate(
                url,
                target,
                format=kind,
                keys=None if match is None else functools.partial(_matches, match),
                overwrite=overwrite,
                progress=bar,
                dst_credential=read_sas(target_sas, "--target-sas"),
                **session.access,
            )
        except ConfigurationError as error:
            raise click.UsageError(f"No key of the checkpoint matches {match!r}; show lists them.") from error
        except ValueError as error:
            if isinstance(error, AzureCheckpointError):
                raise
            raise click.UsageError(str(error)) from error
    if output.as_json:
        output.json(report=report)
        return
    what = f"{plural(report.tensors, 'tensor')} and {plural(report.objects, 'object')}"
    took = f"{format_duration(report.seconds)} ({format_rate(report.bytes, report.seconds)})"
    output.print(Text(printable(f"wrote {what} to {report.dst}: {format_bytes(report.bytes)} in {took}")))


def _matches(pattern: str, key: str) -> bool:
    return fnmatch.fnmatchcase(key, pattern)
