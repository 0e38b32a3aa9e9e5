"""``consolidate``: write a sharded checkpoint as one file."""

from __future__ import annotations

import fnmatch
from typing import Literal

import click

from azure_torch_ckpt._internal.units import format_bytes, format_duration, format_rate
from azure_torch_ckpt.cli.options import Session, read_sas, session_options, target_sas_option
from azure_torch_ckpt.cli.output import plural
from azure_torch_ckpt.errors import AzureCheckpointError, ConfigurationError

__all__ = ["consolidate"]


@click.command(short_help="Write a checkpoint as one file.")
@click.argument("url")
@click.argument("target")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["torch", "safetensors"]),
    help="Format of the file. By default the suffix decides: .pt, .pth, .bin and .ckpt mean torch.",
)
@click.option("--match", metavar="PATTERN", help="Only keys that match, such as 'model.*' to leave the optimizer out.")
@click.option("--overwrite", is_flag=True, help="Replace the file or blob at TARGET.")
@target_sas_option
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

    The command writes the file while it reads the tensors, so the file may be larger than the memory of this machine.
    It compares every checksum. torch.load reads a torch file, which holds the nested state dict. A safetensors file
    holds the tensors under their flattened names, and numbers and texts in its metadata.

    \b
    Examples:
      azure-torch-ckpt consolidate azblob://myaccount/checkpoints/run-7/step-1000 model.pt
      azure-torch-ckpt consolidate azblob://myaccount/checkpoints/run-7/step-1000 model.safetensors --match 'model.*'
      azure-torch-ckpt consolidate azblob://myaccount/checkpoints/run-7/step-1000 azblob://myaccount/models/run-7.pt
    """
    from azure_torch_ckpt import catalog

    output = session.output
    with output.progress_bar("writing") as bar:
        try:
            report = catalog.consolidate(
                url,
                target,
                format=kind,
                keys=None if match is None else lambda key: fnmatch.fnmatchcase(key, match),
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
    output.print(f"wrote {what} to {report.dst}: {format_bytes(report.bytes)} in {took}")
