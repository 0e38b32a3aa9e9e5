"""Runs the command ``azure-torch-ckpt`` in processes of its own, by its entry point.

Importing torch takes seconds. So the processes are forked from one that has imported it and nothing more; they have
their own arguments, environment and standard streams, files or a terminal.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import pty
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "cli" / "schema"
_SECONDS = 60.0

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["azure_torch_ckpt.catalog", "azure_torch_ckpt.cli.app"])


@dataclass(frozen=True)
class Done:
    """Exit code and output of a command. On a terminal, all output is in `out`."""

    code: int
    out: str
    err: str

    def json(self, command: str) -> Any:
        """Return the printed document of a command without an error."""
        assert self.code in (0, 1), self.err
        return self.document(command)

    def document(self, command: str) -> Any:
        """Return the printed document, which must match the command's schema."""
        document = json.loads(self.out)
        jsonschema.validate(document, json.loads((SCHEMAS / f"{command}.json").read_text(encoding="utf-8")))
        return document


def cli(*arguments: str | Path, stdin: str = "", env: Mapping[str, str] | None = None) -> Done:
    """Run the command with its output in files."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        Path(folder, "in").write_text(stdin)
        with running(*arguments, streams=(str(Path(folder, "in")), str(out), str(err)), env=env) as process:
            process.join(_SECONDS)
            assert process.exitcode is not None, f"still running: {arguments}"
        encoding = (env or {}).get("PYTHONIOENCODING", "utf-8")
        return Done(process.exitcode, out.read_text(encoding), err.read_text(encoding))


def cli_on_terminal(
    *arguments: str | Path,
    question: str = "",
    answer: str = "",
    columns: int = 100,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Run the command on a terminal on which `answer` is typed when `question` has come."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    shown: list[bytes] = []
    name = os.ttyname(slave)
    with running(*arguments, streams=(name, name, name), env={"TERM": "xterm-256color", **(env or {})}) as process:
        reader = threading.Thread(target=_read, args=(master, shown, question.encode(), answer.encode()))
        reader.start()
        process.join(_SECONDS)
        os.close(slave)
        reader.join()
        os.close(master)
        assert process.exitcode is not None, f"still running: {arguments}"
    encoding = (env or {}).get("PYTHONIOENCODING", "utf-8")
    return Done(process.exitcode, b"".join(shown).decode(encoding).replace("\r\n", "\n"), "")


@contextlib.contextmanager
def running(
    *arguments: str | Path, streams: tuple[str, str, str], env: Mapping[str, str] | None = None
) -> Iterator[ForkServerProcess]:
    """The command's process while it runs; killed at the end of the block if it still does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "COLUMNS"))}
    environment |= {"TERM": "dumb", "TZ": "Europe/Berlin", **(env or {})}
    process = _forks.Process(target=_run, args=([str(argument) for argument in arguments], environment, streams))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(arguments: list[str], environment: dict[str, str], streams: tuple[str, str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        # Without O_NOCTTY: a terminal becomes this session's, and a prompt for a secret goes there.
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    encoding = environment.get("PYTHONIOENCODING")
    if encoding is not None:  # as a new interpreter would make them
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding)
        sys.stderr = io.TextIOWrapper(
            os.fdopen(2, "wb", closefd=False), encoding, "backslashreplace", write_through=True
        )
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has put another one there
    time.tzset()
    sys.argv = ["azure-torch-ckpt", *arguments]
    from azure_torch_ckpt.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()


def _read(master: int, shown: list[bytes], question: bytes, answer: bytes) -> None:
    with contextlib.suppress(OSError):  # EIO: no process has the terminal open any more
        while data := os.read(master, 65_536):
            shown.append(data)
            if answer and question in b"".join(shown):
                os.write(master, answer + b"\n")
                answer = b""
