"""The command's output with unusual names, encodings, terminals or arguments."""

from __future__ import annotations

import cProfile
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.text import Text

from azure_torch_ckpt import AzureBlobWriter
from azure_torch_ckpt.cli.errors import message_for_people
from azure_torch_ckpt.cli.output import Table
from azure_torch_ckpt.emulator import Azurite
from tests.cli.command_process import cli, cli_on_terminal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ASCII = {"PYTHONIOENCODING": "ascii"}
LATIN = {"PYTHONIOENCODING": "latin-1"}
KEY = "größe.\u6a21\u578b.weight"


def save(url: str, **more: Any) -> None:
    state = {KEY: torch.arange(100.0), "\x1b[31mred": 7, **more}
    dcp.save(state, storage_writer=AzureBlobWriter(url, credential=Azurite.account_key), no_dist=True)


def plain(shown: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()


@pytest.fixture
def odd(container: str) -> str:
    save(f"{container}/läufe/step-1")
    save(f"{container}/läufe/step-2", more=torch.ones(3))
    return container


def test_a_new_interpreter_with_an_ascii_stdout(odd: str) -> None:
    command = [sys.executable, "-m", "azure_torch_ckpt.cli", "show", f"{odd}/läufe/step-1"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **ASCII}
    done = subprocess.run(command, env=env, capture_output=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gr\\xf6\\xdfe.\\u6a21\\u578b.weight  float32" in done.stdout


@pytest.mark.parametrize(("words", "closed", "code"), [("ls", ">&-", 0), ("rm", "<&- >&-", 2)])
def test_streams_that_the_caller_closed(odd: str, words: str, closed: str, code: int) -> None:
    """A real interpreter: only at its start does Python see that they are."""
    command = f'exec "$@" {closed}', "sh", sys.executable, "-m", "azure_torch_ckpt.cli", words, f"{odd}/läufe/step-1"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", *command], env=env, capture_output=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr


@pytest.mark.parametrize("env", [ASCII, LATIN])
def test_no_command_fails_for_the_encoding(odd: str, tmp_path: Path, env: dict[str, str]) -> None:
    one, two = f"{odd}/läufe/step-1", f"{odd}/läufe/step-2"
    assert cli("ls", odd, env=env).out.split()[7].endswith("ufe/step-1")
    assert cli("ls", odd, "--json", env=env).json("ls")["checkpoints"][0]["name"] == "läufe/step-1"
    assert cli("latest", odd, env=env).out == f"{odd}/l%C3%A4ufe/step-2\n"
    shown = cli("show", one, env=env).out
    assert "\\u6a21\\u578b" in shown and "\\x1b[31mred" in shown
    assert cli("show", one, "--shards", env=env).code == 0
    assert cli("diff", one, two, env=env).code == 1
    assert cli("verify", one, env=env).code == 0
    assert cli("cp", one, tmp_path / "größe", env=env).code == 0
    assert cli("consolidate", one, tmp_path / "größe" / "\u6a21.pt", env=env).out.startswith("wrote 1 tensor")
    assert "\\u6a21.pt exists already" in cli("consolidate", one, tmp_path / "größe" / "\u6a21.pt", env=env).err
    assert cli("prune", odd, "--keep-last", "1", env=env).code == 0
    assert cli("rm", "--yes", two, env=env).code == 0
    assert cli("verify", one, "--sample", "größe", env=env).code == 2
    terminal = cli_on_terminal("ls", odd, env=env)
    assert terminal.code == 0 and "complete" in terminal.out and "\\u28" not in terminal.out


def test_arguments_that_are_not_text(odd: str, tmp_path: Path) -> None:
    """Bytes of the command line that are not UTF-8 are lone surrogates in Python."""
    name = "\udcff.pt"
    done = cli("consolidate", f"{odd}/läufe/step-1", str(tmp_path / name))
    assert (done.code, done.err) == (0, "") and "\\udcff.pt" in done.out
    assert (tmp_path / name).exists()
    done = cli("ls", f"{odd}/\udcff")
    assert done.code == 2 and "not valid UTF-8" in done.err
    assert cli("show", f"{odd}/läufe/step-1", "--match", "\udcff").err == "no key matches\n"
    assert cli("lst\udcff").code == 2


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_a_table_is_readable_on_any_terminal(container: str, columns: int) -> None:
    """Where it does not fit, each row has lines of its own; no name and no figure is cut."""
    long = "experiment-with-a-rather-long-name-4711/" + "x" * 30
    for name in ("run-7/step-1000", f"{long}/step-2000"):
        save(f"{container}/{name}", other=torch.ones(3, 4))
    lines = plain(cli_on_terminal("ls", container, columns=columns).out)
    for wanted in ("1000", "2000", "complete", "run-7/step-1000"):
        assert wanted in " ".join(lines), lines
    assert all(len(line) <= columns or line == f"{long}/step-2000" for line in lines)
    shown = "\n".join(lines)
    if columns < 200:
        row = lines[lines.index(f"{long}/step-2000") + 1 :]
        assert re.match(r"  STEP 2000  SIZE [\d.]+ kB  BLOBS 2", row[0])
        assert re.search(r"WRITTEN \(CES?T\) \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\s+STATE complete", " ".join(row))
    else:
        assert f"{long}/step-2000  2000" in shown and "CHECKPOINT" in shown
    lines = plain(cli_on_terminal("show", f"{container}/run-7/step-1000", "--shards", columns=columns).out)
    assert re.search(r"\[0, 0\]\s+(SHAPE )?\[3, 4\]", "\n".join(lines))
    assert KEY in "\n".join(lines)


def test_one_checkpoint_named_twice_is_removed_once(container: str) -> None:
    urls = [f"{container}/step-{number}" for number in (1, 2)]
    for url in urls:
        save(url)
    done = cli("rm", "--yes", urls[0], f"{urls[0]}/", urls[1], urls[0])
    assert (done.code, done.err) == (0, "removed 2 checkpoints\n")
    assert len(done.out.splitlines()) == 3
    assert cli("ls", container).err == "no checkpoints at or below this URL\n"


def test_an_empty_argument_is_no_folder_and_no_credential(container: str) -> None:
    """An unset variable of a script, which would be the current folder or the environment's credential."""
    save(f"{container}/step-1")
    for arguments in (("cp", f"{container}/step-1", ""), ("cp", "", f"{container}/x")):
        done = cli(*arguments)
        assert done.code == 2 and "The path is empty" in done.err
    for option, *command in (
        ("--sas", "ls", container),
        ("--target-sas", "cp", f"{container}/step-1", f"{container}/x"),
        ("--b-sas", "diff", container, container),
    ):
        done = cli(*command, option, "")
        assert done.code == 2 and f"{option} is empty" in done.err
        done = cli(*command, option, "junk")
        assert done.code == 2 and f"{option} is not a shared access signature" in done.err and "junk" not in done.err
        done = cli(*command, option, "-")
        assert done.code == 2 and f"{option} - reads the SAS from standard input" in done.err


def test_messages_speak_of_options(container: str, tmp_path: Path) -> None:
    save(f"{container}/step-1", complex=torch.ones(2, dtype=torch.complex64))
    save(f"{container}/step-2")
    file, pem = tmp_path / "m.pt", tmp_path / "authority.pem"
    file.touch()
    pem.write_text("junk")
    for arguments, code, said in (
        (("cp", f"{container}/step-1", f"{container}/step-2"), 6, "replace it with --overwrite\n"),
        (("consolidate", f"{container}/step-1", file), 6, "replace it with --overwrite\n"),
        (("consolidate", f"{container}/step-1", tmp_path / "m.zip"), 2, "or pass --format\n"),
        (("consolidate", f"{container}/step-1", tmp_path), 2, "pass --format\n"),
        (("consolidate", f"{container}/step-1", tmp_path, "--format", "torch"), 2, "is a folder"),
        (("ls", container, "--ca-file", pem), 2, "'--ca-file': "),
        (("latest", f"{container}/x?versionid=2026-01-31T12:00:00.1234567Z"), 2, "one blob at one moment"),
    ):
        done = cli(*arguments)
        assert done.code == code and said in done.err, done.err
        assert not re.search(r"\b[a-z_]+=(True|None|\s)", done.err)
    done = cli("ls", container, env={"AZURE_STORAGE_KEY": "junk", "AZURE_STORAGE_ACCOUNT": "devstoreaccount1"})
    assert done.code == 2 and "is not an account key" in done.err and "TokenCredential" not in done.err


def test_messages_are_rewritten_for_the_command_line() -> None:
    assert message_for_people("leave it out with keys=, or write a .pt file") == (
        "leave it out with --match, or write a .pt file"
    )
    assert message_for_people("in transit: verify() checks the source") == (
        "in transit: azure-torch-ckpt verify checks the source"
    )
    assert message_for_people("use overwrite=True; pass its PEM file as ca_file=") == (
        "use --overwrite; pass its PEM file as --ca-file"
    )
    url = "https://a.blob.core.windows.net/c/format=/keys=, 'keys=' a.keys=. &format= x"
    assert message_for_people(url) == url


def test_the_cost_of_a_row() -> None:
    """Counts function calls instead of seconds. rich's own tables take 1,800 for the same row."""

    def calls(rows: int) -> int:
        table = Table("CHECKPOINT", "STEP", "SIZE", "BLOBS", "WRITTEN", "STATE", right=("STEP",))
        for step in range(rows):
            table.add_row(Text(f"run-7/step-{step}"), str(step), "11 MB", "3", "2026-11-22 21:19:16", Text("complete"))
        profile = cProfile.Profile()
        profile.runcall(lambda: list(table.lines(100)))
        return sum(entry.callcount for entry in profile.getstats())

    assert (calls(300) - calls(100)) / 200 < 300
