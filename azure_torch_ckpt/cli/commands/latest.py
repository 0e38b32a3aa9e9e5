"""``latest``: print the URL of the newest complete checkpoint."""

from __future__ import annotations

import click

from azure_torch_ckpt.cli.options import Session, session_options

__all__ = ["latest"]


@click.command(short_help="Print the URL of the newest complete checkpoint.")
@click.argument("url")
@session_options
def latest(session: Session, url: str) -> None:
    """Print the URL of the newest complete checkpoint at or below URL.

    If all complete checkpoints have a step in their names, the newest is the one with the highest step, compared as a
    number; otherwise the one that was completed last. If there is none, the exit code is 3.

    \b
    Examples:
      azure-torch-ckpt latest azblob://myaccount/checkpoints/run-7
      torchrun train.py --resume-from "$(azure-torch-ckpt latest azblob://myaccount/checkpoints/run-7)"
    """
    from azure_torch_ckpt.catalog import latest as find

    output = session.output
    with output.spinner("listing"):
        entry = find(url, **session.access)
    if output.as_json:
        output.json(checkpoint=entry)
    else:
        output.print(entry.url)
