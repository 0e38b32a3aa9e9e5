"""A blob of a test's own container, written and read without `BlobIO`. Fixtures come by ``pytest_plugins``."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import pytest
from azure.storage.blob import BlobClient

from azure_torch_ckpt import BlobLocation
from azure_torch_ckpt.emulator import Azurite
from tests.support.faults import Gate

MIB = 1024 * 1024
LINES = random.Random(0).randbytes(3 * MIB).replace(b"\x07", b"\n")


def client(url: str) -> BlobClient:
    location = BlobLocation.parse(url)
    return BlobClient(location.endpoint, location.container, location.path, credential=Azurite.account_key)


def put(url: str, data: bytes) -> None:
    client(url).upload_blob(data, overwrite=True)


def content(url: str) -> bytes:
    return client(url).download_blob().readall()


@pytest.fixture
def url(container: str) -> str:
    return container + "/folder/blob.bin"


@pytest.fixture
def proxied(proxied_container: str) -> str:
    return proxied_container + "/folder/blob.bin"


@pytest.fixture
def lines(proxied: str, url: str) -> str:
    """A blob of 3 MiB with a line end every 256 bytes or so."""
    put(url, LINES)
    return proxied


@contextlib.contextmanager
def opening(gate: Gate, at: int) -> Iterator[None]:
    """Open the gate as soon as `at` requests stand before it at once. The caller waits for ever with fewer."""

    def run() -> None:
        gate.wait_for(at)
        gate.open()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
