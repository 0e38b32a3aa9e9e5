"""Options that several commands share: connection, output, the SAS of a target, confirmation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from azure_torch_ckpt.cli.option_values import authority_file, read_sas
from azure_torch_ckpt.cli.output import Output
from azure_torch_ckpt.credentials import Credential

__all__ = ["Session", "confirm_removal", "output_options", "session_options", "target_sas_option"]

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Session:
    """The connection and the output of one run of a command."""

    credential: Credential
    ca_file: str | None
    output: Output

    @property
    def access(self) -> dict[str, Any]:
        """The keyword arguments that every function of the catalog takes."""
        return {"credential": self.credential, "ca_file": self.ca_file}


def session_options(command: _F) -> Callable[..., Any]:
    """Decorate a command with the options of all commands, which reach it as a `Session`."""

    @click.option(
        "--sas",
        metavar="SAS",
        help="Shared access signature. Other users of this machine can read it in "
        "the list of processes: rather give - and type it (or pipe it in), or set AZURE_STORAGE_SAS_TOKEN.",
    )
    @click.option("--anonymous", is_flag=True, help="Use no credential: the container is public.")
    @click.option(
        "--ca-file",
        type=click.Path(exists=True, dir_okay=False),
        callback=authority_file,
        metavar="FILE",
        help="PEM file of a certificate authority to trust besides the platform's.",
    )
    @output_options
    @functools.wraps(command)
    def with_session(sas: str | None, anonymous: bool, ca_file: str | None, output: Output, **arguments: Any) -> Any:
        if sas is not None and anonymous:
            raise click.UsageError("--sas and --anonymous exclude each other.")
        credential: Credential = False if anonymous else read_sas(sas, "--sas")
        return command(session=Session(credential, ca_file, output), **arguments)

    return with_session


target_sas_option = click.option(
    "--target-sas", metavar="SAS", help="SAS for TARGET, where it needs another one than the source. As for --sas."
)
"""Decorator for the commands that write to a second URL."""


def output_options(command: _F) -> Callable[..., Any]:
    """Decorate a command with ``--json`` and ``--verbose``, which reach it as an `Output`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for scripts.")
    @click.option("-v", "--verbose", is_flag=True, help="Log each step and each retry to stderr.")
    @functools.wraps(command)
    def with_output(as_json: bool, verbose: bool, **arguments: Any) -> Any:
        if verbose:
            logging.getLogger("azure_torch_ckpt").setLevel(logging.INFO)
        return command(output=Output(as_json=as_json), **arguments)

    return with_output


def confirm_removal(output: Output, yes: bool) -> None:
    """Ask for confirmation unless `yes`; return only if the user agrees.

    Raises:
        click.UsageError: there is no terminal to ask on, and ``--yes`` was not given.
        click.Abort: the answer is no.
    """
    if yes:
        return
    if not output.interactive:
        raise click.UsageError("There is no terminal to ask for confirmation. Add --yes to remove without asking.")
    click.confirm("Remove? This cannot be undone.", abort=True, err=True)
