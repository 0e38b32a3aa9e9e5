"""``cp``: copy checkpoints between containers and disks."""

from __future__ import annotations

import click

from azure_torch_ckpt._internal.units import format_bytes, format_duration, format_rate
from azure_torch_ckpt.cli.options import Session, read_sas, session_options, target_sas_option
from azure_torch_ckpt.cli.output import plural

__all__ = ["cp"]


@click.command(short_help="Copy checkpoints between containers and disks.")
@click.argument("source")
@click.argument("target")
@click.option("--overwrite", is_flag=True, help="Replace other checkpoints at TARGET.")
@click.option("--no-verify", is_flag=True, help="Do not read back data that the service has copied itself.")
@target_sas_option
@session_options
def cp(session: Session, source: str, target: str, overwrite: bool, no_verify: bool, target_sas: str | None) -> None:
    """Copy the checkpoint at SOURCE, or all complete ones below SOURCE, to the same names at or below TARGET.

    SOURCE and TARGET are URLs or local folders; at least one is a URL. Between containers the service copies the data
    itself where it can, and nothing goes through this machine. The command compares every checksum, and writes the
    metadata last: an interrupted copy is not visible as a checkpoint, and the same command continues it. torch's
    FileSystemReader loads a copy in a folder.

    \b
    Examples:
      azure-torch-ckpt cp azblob://myaccount/checkpoints/run-7/step-1000 ./step-1000
      azure-torch-ckpt cp ./step-1000 azblob://myaccount/checkpoints/run-7/step-1000
      azure-torch-ckpt cp azblob://myaccount/checkpoints/run-7 azblob://archive/checkpoints/run-7
    """
    from azure_torch_ckpt.catalog import copy

    output = session.output
    with output.progress_bar("copying") as bar:
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
    skipped = f"{plural(report.skipped, 'blob')} {'was' if report.skipped == 1 else 'were'} there already"
    if not report.blobs:
        output.print(f"nothing to copy: {skipped}")
        return
    took = f"{format_duration(report.seconds)} ({format_rate(report.bytes, report.seconds)})"
    line = f"copied {format_bytes(report.bytes)} in {plural(report.blobs, 'blob')}, {took}"
    output.print(f"{line}; {skipped}" if report.skipped else line)
