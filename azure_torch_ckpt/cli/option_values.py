"""Parse the values of options: durations, shares, a secret, a file of certificates."""

from __future__ import annotations

import datetime
import re
import ssl
import sys

import click

__all__ = ["authority_file", "duration", "read_sas", "share"]

_UNITS = {"w": 7 * 86_400, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[wdhms])+", re.ASCII)
_LONGEST_SECONDS = 100 * 366 * 86_400


def duration(text: str) -> datetime.timedelta:
    """``30d``, ``12h``, ``90m``, ``45s``, ``2w``, ``1d12h``.

    Raises:
        click.BadParameter: `text` is not a duration, for example a number without a unit.
    """
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
    """``10%`` or ``0.1``, from 0 to 1.

    Raises:
        click.BadParameter: `text` is not such a number.
    """
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

    Args:
        value: None if the option was not given; then the result is None.
        option: the option's name, for messages.

    Raises:
        click.UsageError: the value is not a SAS, or stdin is empty.
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


def authority_file(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check that a file holds certificates in PEM form, as a callback of click.

    Raises:
        click.BadParameter: the file holds none, or cannot be read.
    """
    if value is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(value)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise click.BadParameter(f"{value} is not a PEM file with certificates.") from error
    return value
