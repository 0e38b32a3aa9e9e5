"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import datetime
import functools
import logging
import re
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from azure_torch_ckpt.cli.output import Output
from azure_torch_ckpt.credentials import Credential

__all__ = [
    "Session",
    "confirm_removal",
    "duration",
    "output_options",
    "read_sas",
    "session_options",
    "share",
    "target_sas_option",
]

_F = TypeVar("_F", bound=Callable[..., Any])

_UNITS = {"w": 7 * 86_400, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[wdhms])+", re.ASCII)
_LONGEST_SECONDS = 100 * 366 * 86_400


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
        callback=_authority_file,
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

    `click.UsageError`: there is no terminal to ask on. `click.Abort`: the answer is no.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError("There is no terminal to ask for confirmation. Add --yes to remove without asking.")
    click.confirm("Remove? This cannot be undone.", abort=True, err=True)


def duration(text: str) -> datetime.timedelta:
    """Parse ``30d``, ``12h``, ``90m``, ``45s``, ``2w`` or ``1d12h``; raise `click.BadParameter` for anything else."""
    text = text.strip().lower()
    if not _DURATION.fullmatch(text):
        raise click.BadParameter(
            f"{text!r} is not a duration. Write a number and a unit: 30d, 12h, 90m, 45s, 2w, 1d12h."
        )
    seconds = sum(float(part[:-1]) * _UNITS[part[-1]] for part in re.findall(r"[\d.]+[wdhms]", text))
    if seconds > _LONGEST_SECONDS:
        raise click.BadParameter(f"{text!r} is longer than a hundred years.")
    return datetime.timedelta(seconds=seconds)


def share(text: str) -> float:
    """Parse ``10%`` or ``0.1``, from 0 to 1; raise `click.BadParameter` for anything else."""
    text = text.strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise click.BadParameter(f"{text!r} is not a share. Write a percentage (10%) or a number from 0 to 1.")
    return number


def read_sas(value: str | None, option: str) -> str | None:
    """Return the SAS of an option. For ``-``, prompt for it on a terminal, and elsewhere read a line of stdin.

    `click.UsageError`: the value is not a SAS, or stdin is empty.
    """
    if value is None:
        return None
    if value == "-":
        try:
            value = click.prompt("SAS", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{option} - reads the SAS from standard input, which is not text.") from error
        if not str(value).strip():
            raise click.UsageError(f"{option} - reads the SAS from standard input, which is empty.")
    sas = str(value).strip()
    if not sas:
        raise click.UsageError(f"{option} is empty (an unset variable?). Omit it to use the other credentials.")
    if "sig=" not in sas.lower():
        raise click.UsageError(
            f"{option} is not a shared access signature, which contains sig=. Pass an account key in AZURE_STORAGE_KEY."
        )
    return sas


def _authority_file(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check, as a callback of click, that a file holds certificates in PEM form."""
    if value is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(value)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise click.BadParameter(f"{value} is not a PEM file with certificates.") from error
    return value
