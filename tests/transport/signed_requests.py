"""`Blobs`: signed requests to one container by a transport, without the SDK. Fixtures come by ``pytest_plugins``."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from azure.core.rest import HttpRequest, HttpResponse

from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.transport import connections
from azure_torch_ckpt.transport.buffers import Scatter
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from tests.support.containers import container_sas
from tests.support.proxy import FaultProxy

KIB, MIB = 1024, 1024 * 1024


class Blobs:
    """Signed requests to one container."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sas = container_sas(url, "rcwl")

    @property
    def secret(self) -> str:
        return self.sas.partition("sig=")[2].partition("&")[0]

    def put(self, transport: GatherTransport, name: str, body: Any, **options: Any) -> HttpResponse:
        headers = {"x-ms-blob-type": "BlockBlob", "x-ms-version": "2024-11-04", "Content-Length": str(len(body))}
        request = HttpRequest("PUT", f"{self.url}/{quote(name)}?{self.sas}", headers=headers, content=body)
        return transport.send(request, **options)

    def get(
        self,
        transport: GatherTransport,
        name: str,
        start: int,
        length: int,
        dest: Scatter | None = None,
        **options: Any,
    ) -> HttpResponse:
        headers = {"x-ms-range": f"bytes={start}-{start + length - 1}", "x-ms-version": "2024-11-04"}
        request = HttpRequest("GET", f"{self.url}/{quote(name)}?{self.sas}", headers=headers)
        return transport.send(request, dest=dest, **options)


@pytest.fixture
def transport() -> Iterator[GatherTransport]:
    with contextlib.closing(GatherTransport()) as made:
        yield made


@pytest.fixture
def blobs(proxied_container: str) -> Blobs:
    return Blobs(proxied_container)


@pytest.fixture
def tls_proxy(azurite: Azurite, tls_files: tuple[Path, Path]) -> Iterator[FaultProxy]:
    """A proxy that serves TLS, with the certificate of `azurite_tls`, in front of the plain emulator."""
    with FaultProxy(azurite.endpoint, tls=tls_files) as between:
        yield between


@pytest.fixture(params=["plain", "tls"])
def either(request: pytest.FixtureRequest, container: str, azurite_tls: Azurite) -> Iterator[Any]:
    """Proxy, blobs and transport, over plain HTTP and over TLS."""
    between: FaultProxy = request.getfixturevalue("proxy" if request.param == "plain" else "tls_proxy")
    with contextlib.closing(GatherTransport(ca_file=str(azurite_tls.certificate))) as made:
        yield between, Blobs(f"{between.endpoint}/{container.rpartition('/')[2]}"), made


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make new connections time out after 0.4 s without a byte: only for requests without an answer."""
    connections.close_idle()
    monkeypatch.setattr(connections, "IO_SECONDS", 0.4)
    monkeypatch.setattr(connections, "TIMEVAL", struct.pack("ll", 0, 400_000))


def some_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def cut_up(data: bytes, sizes: Sequence[int]) -> list[memoryview]:
    """Views of these sizes, each in memory of its own."""
    ends = itertools.accumulate(sizes)
    return [memoryview(bytearray(data[end - size : end])) for end, size in zip(ends, sizes, strict=True)]
