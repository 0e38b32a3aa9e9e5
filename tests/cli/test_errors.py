"""Errors of the command: exit codes, one line, no traceback, no secret, nothing half done."""

from __future__ import annotations

import base64
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AzureBlobWriter, errors
from azure_torch_ckpt.cli import app
from azure_torch_ckpt.cli.errors import BUG, EXIT_CODES, exit_code
from azure_torch_ckpt.emulator import Azurite
from tests.cli.command_process import Done, cli, cli_on_terminal, running
from tests.support.containers import container_sas, put
from tests.support.faults import Gate, Hold
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEY = Azurite.account_key
WRONG_KEY = base64.b64encode(bytes(64)).decode()
EMULATOR = {"AZURE_STORAGE_ACCOUNT": "devstoreaccount1"}


def save(url: str, **access: Any) -> None:
    state: dict[str, Any] = {"weight": torch.arange(100_000.0), "step": 7}
    dcp.save(state, storage_writer=AzureBlobWriter(url, **({"credential": KEY} | access)))


def check_error(done: Done, code: int, said: str) -> None:
    assert done.code == code, done.err
    assert done.out == ""
    first, *rest = done.err.splitlines()
    assert first.startswith("azure-torch-ckpt: error: ") and said in first
    assert len(rest) <= 1 and all(line.startswith("azure-torch-ckpt: hint: ") for line in rest)


def test_wrong_usage_points_to_the_help(container: str) -> None:
    check_error(cli("ls"), 2, "Missing argument 'URL'")
    check_error(cli("lst", container), 2, "No such command 'lst'")
    check_error(cli("verify", container, "--sample", "120%"), 2, "'120%' is not a share")
    done = cli("ls", container, "--sas", "x", "--anonymous")
    check_error(done, 2, "exclude each other")
    assert done.err.endswith("hint: see azure-torch-ckpt ls --help\n")


def test_a_wrong_url_gets_an_example_of_a_right_one() -> None:
    check_error(cli("ls", "s3://bucket/x"), 2, "ACCOUNT")
    check_error(cli("show", "./folder"), 2, "azblob://ACCOUNT/CONTAINER/PATH")


def test_what_is_not_there_is_code_3(container: str) -> None:
    check_error(cli("show", f"{container}/nothing"), 3, "No complete checkpoint at")
    check_error(cli("ls", f"{container}-gone/x"), 3, "Create the container")


def test_a_wrong_key_is_code_4_and_stays_secret(container: str) -> None:
    done = cli("ls", container, env={"AZURE_STORAGE_KEY": WRONG_KEY, **EMULATOR})
    check_error(done, 4, "403 AuthorizationFailure")
    assert WRONG_KEY not in done.err and "hint: a credential comes from" in done.err


def test_the_environment_s_key_and_connection_string_are_used(container: str) -> None:
    save(f"{container}/step-1")
    connection = f"AccountName=devstoreaccount1;AccountKey={KEY}"
    for env in (
        {"AZURE_STORAGE_KEY": KEY, **EMULATOR},
        {"AZURE_STORAGE_CONNECTION_STRING": connection, "AZURE_STORAGE_KEY": "no"},
        {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=other;AccountKey={KEY}"},  # for other URLs
    ):
        assert cli("latest", container, env=env).out == f"{container}/step-1\n"


def test_a_sas_comes_from_the_url_the_option_stdin_or_the_environment(container: str) -> None:
    save(f"{container}/step-1")
    sas = container_sas(container, "rl")
    wrong = {"AZURE_STORAGE_KEY": WRONG_KEY, **EMULATOR}  # loses against each of them
    for done in (
        cli("latest", f"{container}?{sas}", env=wrong),
        cli("latest", container, "--sas", sas, env=wrong),
        cli("latest", container, "--sas", "-", stdin=f"{sas}\n", env=wrong),
        cli("latest", container, env={"AZURE_STORAGE_SAS_TOKEN": sas, **EMULATOR}),
    ):
        assert (done.code, done.out, done.err) == (0, f"{container}/step-1\n", "")
    check_error(cli("latest", container, "--sas", "-"), 2, "which is empty")


def test_a_sas_that_is_typed_is_not_shown(container: str) -> None:
    save(f"{container}/step-1")
    sas = container_sas(container, "rl")
    done = cli_on_terminal("latest", container, "--sas", "-", question="SAS", answer=sas)
    assert done.code == 0 and "SAS:" in done.out and sas not in done.out


def test_no_error_shows_a_signature(container: str) -> None:
    sas = container_sas(container, "rl")
    secret = sas.partition("sig=")[2].partition("&")[0]
    url = f"{container}?{sas}"
    for done in (
        cli("rm", "--yes", url),
        cli("ls", url, url),
        cli(url),
        cli("ls", f"{container}/x?{sas}#"),
        cli("prune", "--yes", "--keep-last", url, url),
        cli("show", "-v", f"{container}/nothing?{sas}"),
    ):
        assert done.code != 0 and done.err
        assert secret not in done.out + done.err and sas not in done.out + done.err


def test_anonymous_sends_no_credential(container: str) -> None:
    check_error(cli("ls", container, "--anonymous"), 4, "could not list")


def test_an_untrusted_certificate_is_code_5(azurite_tls: Azurite) -> None:
    container = azurite_tls.create_container(f"cli-{os.getpid()}")
    save(f"{container}/step-1", ca_file=str(azurite_tls.certificate))
    done = cli("ls", container)
    check_error(done, 5, "no trusted certificate")
    assert "--ca-file" in done.err
    assert cli("latest", container, "--ca-file", str(azurite_tls.certificate)).out == f"{container}/step-1\n"


def test_a_damaged_metadata_is_code_1(container: str) -> None:
    put(container, "step-1/.metadata", b"no pickle")
    check_error(cli("show", f"{container}/step-1"), 1, "")


def test_a_disk_that_cannot_be_written_is_an_error(container: str, tmp_path: Path) -> None:
    save(f"{container}/step-1")
    file = tmp_path / "file"
    file.touch()
    done = cli("cp", f"{container}/step-1", file / "below")
    assert done.code in (4, 7) and done.err.startswith("azure-torch-ckpt: error: ") and "Traceback" not in done.err


def test_ctrl_c_in_the_middle_of_a_copy_leaves_nothing_to_see(
    proxy: FaultProxy, proxied_container: str, container: str, tmp_path: Path
) -> None:
    save(f"{container}/step-1")
    gate = Gate()
    proxy.when(lambda exchange: exchange.path.endswith(".distcp") and exchange.kind == "Get Blob").do(Hold(until=gate))
    copy = tmp_path / "copy"
    streams = ("/dev/null", str(tmp_path / "out"), str(tmp_path / "err"))
    with running("cp", f"{proxied_container}/step-1", copy, streams=streams) as process:
        gate.wait_for(1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
    gate.open()
    assert (tmp_path / "err").read_text().strip() == "azure-torch-ckpt: interrupted"
    assert [path for path in copy.rglob("*") if path.is_file()] == []
    assert cli("cp", f"{container}/step-1", copy).code == 0
    assert (copy / ".metadata").is_file()


def test_a_pipe_that_its_reader_closes_ends_the_command_quietly(container: str, tmp_path: Path) -> None:
    save(f"{container}/step-1")
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with running("ls", container, streams=("/dev/null", str(fifo), str(tmp_path / "err"))) as process:
        os.close(os.open(fifo, os.O_RDONLY))  # opens it for the command, too, and goes
        process.join(60)
        assert process.exitcode == 141
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_a_bug_is_a_traceback_without_secrets_and_code_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: no input is known that makes the command fail so."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(
            "https://x/y?sv=1&sig=S3cr3t%3D&se=2 AccountKey=S3cr3tKey==;x 'SharedAccessSignature=S3'"
        )

    monkeypatch.setattr(app.app, "main", broken)
    assert app.run(["ls"]) == 70
    shown = capsys.readouterr().err
    assert "ZeroDivisionError" in shown and "please report it" in shown
    assert "S3cr3t" not in shown and "sig=***" in shown and "=S3" not in shown


def test_every_error_of_the_package_has_a_code() -> None:
    codes = {name: exit_code(getattr(errors, name)("x")) for name in errors.__all__}
    assert BUG not in codes.values()
    assert set(codes.values()) <= EXIT_CODES.keys()
    assert (codes["CredentialError"], codes["AccessDeniedError"], codes["ServiceUnavailableError"]) == (2, 4, 5)
    assert exit_code(ValueError("x")) == BUG


def test_the_emulator_serves_until_ctrl_c(tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    os.mkfifo(out)
    arguments = ("emulator", "--port", "0", "--container", "checkpoints", "--data", str(tmp_path / "blobs"), "--json")
    with running(*arguments, streams=("/dev/null", str(out), str(err))) as process, out.open() as stream:
        said = ""
        for line in stream:
            said += line
            if line == "}\n":
                break
        document = Done(0, said, "").json("emulator")
        url = document["containers"][0]
        save(f"{url}/step-1")
        assert cli("latest", url).out == f"{url}/step-1\n"
        taken = cli("emulator", "--port", url.split(":")[2].partition("/")[0])
        assert taken.code == 7 and "did not start" in taken.err and "Traceback" not in taken.err
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 0
    assert err.read_text() == f"stopped; the blobs are in {tmp_path / 'blobs'}\n"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", int(url.split(":")[2].partition("/")[0]))):
        pass


def test_the_emulator_prints_a_line_for_the_shell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    os.mkfifo(out)
    arguments = ("emulator", "--port", "0", "--container", "checkpoints", "--tls")
    with running(*arguments, streams=("/dev/null", str(out), str(tmp_path / "err"))) as process, out.open() as stream:
        lines = [stream.readline().rstrip() for _ in range(7)]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 143
    shown = dict(line.split(maxsplit=1) for line in lines if line)
    assert shown["container"] == f"{shown['endpoint']}/checkpoints" and shown["endpoint"].startswith("https://")
    assert shown["key"] == KEY and shown["certificate"].endswith(".pem")
    assert lines[-1].startswith("export AZURE_STORAGE_CONNECTION_STRING='DefaultEndpointsProtocol=https;")
