"""The command's frame: its subcommands, and what becomes of errors, signals and broken pipes."""

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

from azure_torch_ckpt.cli import exit_codes
from azure_torch_ckpt.cli.commands.checking import diff, verify
from azure_torch_ckpt.cli.commands.emulator import emulator
from azure_torch_ckpt.cli.commands.looking import latest, ls, show
from azure_torch_ckpt.cli.commands.moving import consolidate, cp
from azure_torch_ckpt.cli.commands.removing import prune, rm
from azure_torch_ckpt.cli.output import ReaderGoneError

__all__ = ["app", "run"]

NAME = "azure-torch-ckpt"
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _InOrder(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _ToStderr(logging.Handler):
    """Writes to what ``sys.stderr`` is at the moment: a progress bar puts something there that makes room."""

    def emit(self, record: logging.LogRecord) -> None:
        print(_for_people(self.format(record)), file=sys.stderr)


def _version() -> str:
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "(not installed)"


@click.group(cls=_InOrder, context_settings=_SETTINGS)
@click.version_option(_version(), prog_name=NAME)
def app() -> None:
    """Checkpoints of PyTorch in Azure Blob Storage: find, look into, compare, verify, copy and remove them.

    \b
    A URL is one of
      azblob://ACCOUNT/CONTAINER/PATH
      https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH
      http://127.0.0.1:10000/devstoreaccount1/CONTAINER/PATH   (the emulator)
    with or without a SAS behind it.

    \b
    The credential is the first of these that is there:
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
    """Carry out a command line and return the exit code. Nothing that is printed has a secret in it."""
    _fill_closed_streams()
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter(f"{NAME}: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("azure").setLevel(logging.CRITICAL)  # what they report comes as an error as well
    warnings.simplefilter("ignore")  # of torch, at its import
    try:
        with _termination():
            code = app.main(list(arguments), prog_name=NAME, standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else NAME
        return _fail(exit_codes.USAGE, error.format_message(), f"see {where} --help")
    except click.ClickException as error:
        return _fail(exit_codes.FAILED, error.format_message())
    except (KeyboardInterrupt, click.Abort) as error:
        said_no = isinstance(error, click.Abort) and not isinstance(error.__context__, KeyboardInterrupt)
        print(f"{NAME}: {'nothing was done' if said_no else 'interrupted'}", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except ReaderGoneError:
        # What is still buffered must not raise again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        known = exit_codes.exit_code(error)
        if known != exit_codes.BUG:
            return _fail(known, str(error), exit_codes.hint(error))
        print(exit_codes.without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        return _fail(exit_codes.BUG, "this is a bug in azure-torch-ckpt; please report it with the lines above")
    return int(code or exit_codes.OK)


def _fill_closed_streams() -> None:
    # Python has None for a stream that the caller closed (cron, `>&-`), and a socket would get its number.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _fail(code: int, message: str, hint: str | None = None) -> int:
    print(f"{NAME}: error: {_for_people(message)}", file=sys.stderr)
    if hint is not None:
        print(f"{NAME}: hint: {hint}", file=sys.stderr)
    return code


def _for_people(message: str) -> str:
    return exit_codes.without_secrets(exit_codes.in_words_of_the_command(message))


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, with everything put in order."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
