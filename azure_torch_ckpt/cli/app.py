"""`app` collects the subcommands; `run` handles their errors, signals and broken pipes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import NoReturn

import click

from azure_torch_ckpt.cli.commands.consolidate import consolidate
from azure_torch_ckpt.cli.commands.cp import cp
from azure_torch_ckpt.cli.commands.diff import diff
from azure_torch_ckpt.cli.commands.emulator import emulator
from azure_torch_ckpt.cli.commands.latest import latest
from azure_torch_ckpt.cli.commands.ls import ls
from azure_torch_ckpt.cli.commands.prune import prune
from azure_torch_ckpt.cli.commands.rm import rm
from azure_torch_ckpt.cli.commands.show import show
from azure_torch_ckpt.cli.commands.verify import verify
from azure_torch_ckpt.cli.errors import (
    BUG,
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    exit_code,
    hint,
    message_for_people,
    without_secrets,
)
from azure_torch_ckpt.cli.output import ReaderGoneError

__all__ = ["app", "run"]

NAME = "azure-torch-ckpt"
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _OrderedGroup(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _StderrHandler(logging.Handler):
    """Writes to the current ``sys.stderr``: a progress bar replaces it to make room for other lines."""

    def emit(self, record: logging.LogRecord) -> None:
        print(message_for_people(self.format(record)), file=sys.stderr)


def _version() -> str:
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "(not installed)"


@click.group(cls=_OrderedGroup, context_settings=_SETTINGS)
@click.version_option(_version(), prog_name=NAME)
def app() -> None:
    """PyTorch checkpoints in Azure Blob Storage: find, inspect, compare, verify, copy and remove them.

    \b
    A URL is one of
      azblob://ACCOUNT/CONTAINER/PATH
      https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH
      http://127.0.0.1:10000/devstoreaccount1/CONTAINER/PATH   (the emulator)
    with or without a SAS behind it.

    \b
    The command uses the first of these credentials that exists:
      a SAS in the URL; --sas
      AZURE_STORAGE_CONNECTION_STRING
      AZURE_STORAGE_KEY (with AZURE_STORAGE_ACCOUNT, for that account alone)
      AZURE_STORAGE_SAS_TOKEN
      what DefaultAzureCredential finds: az login, a managed identity, AZURE_CLIENT_ID, ...

    \b
    Examples:
      azure-torch-ckpt ls azblob://myaccount/checkpoints
      azure-torch-ckpt show $(azure-torch-ckpt latest azblob://myaccount/checkpoints/run-7)
      azure-torch-ckpt prune azblob://myaccount/checkpoints --keep-last 3 --older-than 30d

    \b
    Exit codes:
      0 all is well           3 not found         6 exists already, or was replaced
      1 a checkpoint has      4 access denied     7 anything else that failed
        a problem, or two     5 service not     130 Ctrl-C, or a question was
        differ                  available           answered with no
      2 wrong usage

    \b
    Shell completion (zsh and fish in the same way):
      eval "$(_AZURE_TORCH_CKPT_COMPLETE=bash_source azure-torch-ckpt)"
    """


for _command in (ls, latest, show, diff, verify, cp, rm, prune, consolidate, emulator):
    app.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return the exit code. No output contains a secret."""
    _fill_closed_streams()
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"{NAME}: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("azure").setLevel(logging.CRITICAL)  # the SDK raises the errors that it logs
    warnings.simplefilter("ignore")  # torch warns when it is imported
    try:
        with _termination():
            code = app.main(list(arguments), prog_name=NAME, standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else NAME
        return _fail(USAGE, error.format_message(), f"see {where} --help")
    except click.ClickException as error:
        return _fail(FAILED, error.format_message())
    except (KeyboardInterrupt, click.Abort) as error:
        said_no = isinstance(error, click.Abort) and not isinstance(error.__context__, KeyboardInterrupt)
        print(f"{NAME}: {'nothing was done' if said_no else 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except ReaderGoneError:
        # The interpreter flushes the buffered rest at exit, which must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        error_code = exit_code(error)
        if error_code != BUG:
            return _fail(error_code, str(error), hint(error))
        print(without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        return _fail(BUG, "this is a bug in azure-torch-ckpt; please report it with the lines above")
    return int(code or OK)


def _fill_closed_streams() -> None:
    # If the caller closed a stream (cron, `>&-`), Python's stream is None, and a socket would get its number.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _fail(code: int, message: str, advice: str | None = None) -> int:
    print(f"{NAME}: error: {message_for_people(message)}", file=sys.stderr)
    if advice is not None:
        print(f"{NAME}: hint: {advice}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end the command like Ctrl-C, with all cleanup."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
