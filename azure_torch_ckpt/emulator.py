"""`Azurite`: starts and stops Microsoft's emulator of Blob Storage, for the quickstart and for tests.

    with Azurite() as azurite:
        url = azurite.create_container("checkpoints")
        writer = AzureBlobWriter(url + "/step-1", credential=azurite.account_key)

Azurite is a Node.js program (https://github.com/Azure/Azurite). It is used from ``PATH`` or from the user's cache
folder, and installed into that folder with npm if it is in neither.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import http.client
import ipaddress
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import IO

from azure_torch_ckpt._internal.azurite_installation import AZURITE_VERSION, GET_NODE, find_azurite, tail_of
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import EMULATOR_ACCOUNT_KEY, Access
from azure_torch_ckpt.errors import EmulatorError, LocalFileError, MissingDependencyError
from azure_torch_ckpt.location import EMULATOR_ACCOUNT, BlobLocation

__all__ = ["AZURITE_VERSION", "Azurite"]

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_HOST = "127.0.0.1"
_ANNOUNCEMENT = re.compile(r"successfully listens on https?://\S+:(\d+)")

# The emulator holds the read end of a pipe, and only this process holds the write end. A line on it asks for an orderly
# stop; its end means that this process died, also by SIGKILL. Unlike PR_SET_PDEATHSIG this works on every system, needs
# no code between fork and exec, and does not kill the emulator when only the thread that started it ends. (Processes
# forked without exec share the write end, so the emulator may live as long as they do.) On SIGTERM, Azurite stops in an
# orderly way: it writes its tables to disk, which may take a moment, and would wait for requests in progress without
# limit.
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
    """A blob emulator that listens on 127.0.0.1, in its own process, which ends with this one.

    It runs from `start` to `stop`, or for the length of a ``with`` block. Attributes that depend on the
    running process raise `EmulatorError` while it does not run.

    Azurite checks the CRC64 of blocks from 3.37 on. It runs with ``--loose``, so that an older version on ``PATH``
    ignores the header instead of refusing it, and with ``--skipApiVersionCheck``, because a new SDK uses newer API
    versions.

    Args:
        data_dir: folder that keeps the data over restarts; it is made if it does not exist. None keeps the data in
        memory.
        tls: serve HTTPS, with a certificate made for this run. A client must trust `certificate`.
        oauth: accept bearer tokens (``--oauth basic``: Azurite checks issuer, audience and times, not the signature).
            Implies ``tls``, because Azurite accepts tokens over HTTPS only.
        port: TCP port; 0 lets the operating system choose a free one.
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
        """Start the emulator, and return when it answers.

        If Azurite is not installed yet, this installs it first, once, with a message on stderr.

        Raises:
            EmulatorError: it runs already; Node.js or Azurite cannot be found or installed; it ended at once (the last
                lines in the message say why: the port is in use, ...); it does not answer within 60 s.
        """
        if self._process is not None:
            raise EmulatorError(f"This Azurite runs already (process {self._process.pid}). Make another Azurite().")
        node, script = find_azurite()
        try:
            self._launch(node, script)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the emulator and wait for its end. Does nothing if it does not run.

        With data in memory, requests in progress end at once. With ``data_dir`` they have 2 s, and the data is on disk
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

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """URL of the account, such as ``http://127.0.0.1:41234/devstoreaccount1``."""
        if self._port is None:
            raise EmulatorError("This Azurite does not run. Call start() first, or use it in a `with` block.")
        return f"{'https' if self._tls else 'http'}://{_HOST}:{self._port}/{self.account_name}"

    @property
    def connection_string(self) -> str:
        """Connection string for ``BlobServiceClient.from_connection_string`` and other tools."""
        return (
            f"DefaultEndpointsProtocol={'https' if self._tls else 'http'};AccountName={self.account_name};"
            f"AccountKey={self.account_key};BlobEndpoint={self.endpoint};"
        )

    @property
    def certificate(self) -> Path | None:
        """PEM file of the certificate that a client must trust (``SSL_CERT_FILE``, ``ca_file=``); None without TLS.

        The file exists while the emulator runs.
        """
        return Path(self._tls_files.name, "certificate.pem") if self._tls_files is not None else None

    @property
    def pid(self) -> int:
        """Process id of the emulator."""
        if self._process is None:
            raise EmulatorError("This Azurite does not run. Call start() first, or use it in a `with` block.")
        return self._process.pid

    def url(self, container: str, *path: str) -> str:
        """Return the URL of a container, or of ``path`` in it (not percent-encoded; the URL is).

        Raises:
            LocationError: the name of the container or the path breaks the service's naming rules.
        """
        root = BlobLocation.parse(f"{self.endpoint}/{container}")
        return str(root.join(*path) if path else root)

    def create_container(self, name: str) -> str:
        """Create a container and return its URL.

        Raises:
            StoreError: the emulator refused.
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
        # AZURITE_ACCOUNTS and AZURITE_DB would replace the well-known account and the chosen storage.
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
                start_new_session=True,  # Ctrl-C in the terminal is for this process, which stops the emulator itself
            )
        except OSError as error:
            raise EmulatorError(f"{node} cannot be run: {error}. {GET_NODE}") from error
        assert self._process.stdout is not None
        self._output = _Output(self._process.stdout)
        try:
            self._port = self._output.port.result(deadline - time.monotonic())
        except FutureTimeoutError as error:
            raise EmulatorError(
                f"Azurite ({script}) did not announce its port within {_START_SECONDS:.0f} s. It printed:\n"
                f"{tail_of(self._output.last_lines)}"
            ) from error
        if self._port is None:
            raise EmulatorError(
                f"Azurite ({script}) did not start. Its last lines say why:\n{tail_of(self._output.last_lines)}"
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
                "Look for a firewall or a security tool between processes of this machine."
            ) from error
        finally:
            connection.close()


class _Output:
    """The output of the process: its last lines, and the port that it announces (None if it ends before)."""

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
        """Close the stream. The process must have ended."""
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
        if sys.platform == "win32":
            process.kill()
        else:
            # `node` on PATH may be a script that runs the real one. Both are in the session that was made for them.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(OSError):
        process.stdin.close()


def write_self_signed_certificate(certificate_file: Path, key_file: Path) -> None:
    """Write a certificate for a server on 127.0.0.1 or localhost, good for 30 days, and its key: both as PEM.

    The certificate is self-signed; a client trusts it by ``ca_file=``. It is not an authority (``ca=False``), because
    rustls refuses one that is both authority and server; OpenSSL accepts either. The key is not encrypted, and only its
    owner can read its file.

    Raises:
        MissingDependencyError: the package ``cryptography`` is not installed.
        LocalFileError: a file could not be written.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise MissingDependencyError(
            "Making a certificate for TLS needs the package cryptography. Install it (pip install cryptography)"
        ) from error

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "azure_torch_ckpt emulator")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    try:
        certificate_file.write_bytes(certificate.public_bytes(pem))
        key_file.touch(mode=0o600)
        key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    except OSError as error:
        raise LocalFileError(f"could not write {error.filename}: {error.strerror}") from error
