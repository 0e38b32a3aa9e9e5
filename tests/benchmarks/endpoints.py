"""The servers that a benchmark runs against: Azurite, azsink, an account."""

from __future__ import annotations

import contextlib
import datetime
import socket
import subprocess
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Literal

from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from azure_torch_ckpt import BlobLocation
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.emulator import Azurite, write_self_signed_certificate
from tests.benchmarks.measure import ask, control
from tests.benchmarks.spec import Address, Regime

_START_SECONDS = 20.0
_CONTAINER = "benchmark"


class Endpoint(ABC):
    """Servers with one container, from `__enter__` to `__exit__`.

    Attributes:
        name: what the documents call it.
        has_tls: what it can be reached by: ``(False, True)``.
        can_be_slow: whether it can imitate the service's latency and its limit of a connection's speed.
        root: what the paths of all checkpoints begin with.
    """

    name: Literal["azsink", "azurite", "account"]
    has_tls: tuple[bool, ...] = (False, True)
    can_be_slow = False
    root = "benchmark"

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    @abstractmethod
    def address(self, regime: Regime) -> Address:
        """How to reach the server that is to be used in a regime."""

    def set_regime(self, regime: Regime, *, discard: bool) -> None:  # noqa: B027  # nothing to do for most of them
        """Make the server behave so from now on; ``discard`` lets it throw uploads away where it can."""

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def can(self, regime: Regime) -> bool:
        return regime.tls in self.has_tls and (self.can_be_slow or not regime.is_slow)


class AzuriteEndpoint(Endpoint):
    """Azurite, one with TLS and one without, as new with every `__enter__`: it never gives memory back."""

    name = "azurite"

    def __enter__(self) -> AzuriteEndpoint:
        self._addresses: dict[bool, Address] = {}
        for tls in self.has_tls:
            azurite = self._stack.enter_context(Azurite(tls=tls))
            azurite.create_container(_CONTAINER)
            sas = generate_container_sas(
                azurite.account_name,
                _CONTAINER,
                azurite.account_key,
                permission=ContainerSasPermissions(read=True, write=True, delete=True, list=True),
                expiry=datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=6),
            )
            ca_file = None if azurite.certificate is None else str(azurite.certificate)
            self._addresses[tls] = Address(
                azurite.endpoint, _CONTAINER, azurite.account_key, sas, ca_file, counts=False
            )
        return self

    def address(self, regime: Regime) -> Address:
        return self._addresses[regime.tls]


class AzsinkEndpoint(Endpoint):
    """The loopback server azsink, which is faster than its clients and can imitate the service's slowness.

    Args:
        folder: where the programs ``azsink`` and ``climit`` are.
    """

    name = "azsink"
    can_be_slow = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __enter__(self) -> AzsinkEndpoint:
        tls_files = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-tls-")))
        certificate, key = tls_files / "certificate.pem", tls_files / "key.pem"
        write_self_signed_certificate(certificate, key)
        self._addresses = {False: self._start(None, None), True: self._start(certificate, key)}
        return self

    def address(self, regime: Regime) -> Address:
        return self._addresses[regime.tls]

    def set_regime(self, regime: Regime, *, discard: bool) -> None:
        command = f"/__cfg?latency_ms={regime.latency_ms}&bw_mbps={regime.mbps}&discard={int(discard)}"
        self.command(regime, command)

    def command(self, regime: Regime, command: str) -> dict[str, float]:
        with contextlib.closing(control(self.address(regime))) as connection:
            return ask(connection, command)

    def _start(self, certificate: Path | None, key: Path | None) -> Address:
        port = _free_port()
        tls = [] if certificate is None else ["--tls", str(certificate), str(key)]
        process = subprocess.Popen(
            [self.folder / "azsink", "--port", str(port), *tls],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(_end, process)
        account = f"{'http' if certificate is None else 'https'}://127.0.0.1:{port}/{Azurite.account_name}"
        ca_file = None if certificate is None else str(certificate)
        address = Address(account, _CONTAINER, Azurite.account_key, "", ca_file, counts=True)
        _wait(address, process)
        return address


class AccountEndpoint(Endpoint):
    """A container of a real account, reached with ``DefaultAzureCredential``. What a run writes is removed at its end.

    Args:
        url: ``https://account.blob.core.windows.net/container``.
    """

    name = "account"
    has_tls = (True,)

    def __init__(self, url: str) -> None:
        super().__init__()
        self._location = BlobLocation.parse(url)
        self.root = f"benchmark-{uuid.uuid4().hex}"

    def __enter__(self) -> AccountEndpoint:
        self._stack.callback(self._remove)
        return self

    def address(self, regime: Regime) -> Address:
        return Address(self._location.endpoint, self._location.container, None, "", None, counts=False)

    def _remove(self) -> None:
        store = BlobStore(self._location.container_root())
        for blob in store.list(self.root + "/"):
            store.delete(blob.path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(address: Address, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            control(address).close()
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()
