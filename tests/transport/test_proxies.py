"""The transport uses the proxies that the environment names, and its errors show no secret."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from azure.core.exceptions import AzureError

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import ConfigurationError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport import connections
from azure_torch_ckpt.transport.buffers import Gather
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from tests.support.faults import Cut
from tests.support.proxy import FaultProxy
from tests.transport.signed_requests import KIB, MIB, Blobs, some_bytes

pytest_plugins = ("tests.transport.signed_requests",)


# ---- Proxies from the environment ----------------------------------------------------------------------------------


class ForwardProxy(http.server.BaseHTTPRequestHandler):
    """A company's proxy to the internet. It supports CONNECT and absolute URLs."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str | None]]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.asked.append((f"CONNECT {self.path}", self.headers["Proxy-Authorization"]))
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self.send_response(200)
            self.end_headers()
            self._relay(upstream)
        self.close_connection = True

    def do_PUT(self) -> None:
        """One exchange to a connection."""
        self.asked.append((f"{self.command} {self.path.partition('?')[0]}", self.headers["Proxy-Authorization"]))
        target = urlsplit(self.path)
        del self.headers["Proxy-Authorization"]
        with socket.create_connection((target.hostname or "", target.port or 80)) as upstream:
            lines = [f"{self.command} {target.path}?{target.query} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in self.headers.items()]
            upstream.sendall("\r\n".join([*lines, "", ""]).encode())
            upstream.sendall(self.rfile.read(int(self.headers["Content-Length"])))
            self._relay(upstream)
        self.close_connection = True

    def _relay(self, upstream: socket.socket) -> None:
        while True:
            for ready in select.select([self.connection, upstream], [], [])[0]:
                data = ready.recv(64 * KIB)
                if not data:
                    return
                (upstream if ready is self.connection else self.connection).sendall(data)


@pytest.fixture
def forward_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    asked: list[tuple[str, str | None]] = []
    handler = type("Handler", (ForwardProxy,), {"asked": asked})
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("form", ["http://{}", "{}", "http://some%40one:pass%3Aword@{}"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_of_the_environment_is_used(
    forward_proxy: Any,
    azurite: Azurite,
    azurite_tls: Azurite,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    scheme: str,
) -> None:
    address, asked = forward_proxy
    emulator = azurite if scheme == "http" else azurite_tls
    blobs = Blobs(emulator.create_container(f"test-{os.getpid()}-{time.time_ns()}"))
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", form.format(address))
    with contextlib.closing(GatherTransport(ca_file=str(azurite_tls.certificate))) as transport:
        data = some_bytes(3 * MIB)
        assert blobs.put(transport, "blob", Gather([memoryview(data)])).status_code == 201
    netloc = urlsplit(blobs.url).netloc
    line = f"CONNECT {netloc}" if scheme == "https" else f"PUT {blobs.url}/blob"
    login = "Basic c29tZUBvbmU6cGFzczp3b3Jk" if "@" in form else None
    assert asked == [(line, login)]


def test_no_proxy_is_heeded(forward_proxy: Any, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    address, asked = forward_proxy
    monkeypatch.setenv("HTTP_PROXY", address)
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    with contextlib.closing(GatherTransport()) as transport:
        assert blobs.put(transport, "blob", b"data").status_code == 201
    assert asked == []


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://proxy", "proxy", 80),
        ("proxy", "proxy", 80),
        ("http://someone:hunter2@proxy/", "proxy", 80),
        ("http://proxy:3128", "proxy", 3128),
        ("proxy:8080", "proxy", 8080),
        ("http://[::1]", "::1", 80),
        ("http://[::1]:3128", "::1", 3128),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_without_a_port_is_at_that_of_http(
    url: str, host: str, port: int, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test may listen there."""
    monkeypatch.setenv(f"{scheme}_proxy", url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    route = connections.find_route(scheme, "account.blob.core.windows.net", None)
    assert route.proxy is not None
    assert (route.proxy.host, route.proxy.port) == (host, port)
    assert "hunter2" not in repr(route) and "c29tZ" not in repr(route)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://someone:hunter2@proxy:443", "is of the kind https://, and only http:// is supported"),
        ("socks5://someone:hunter2@proxy:1080", "is of the kind socks5://, and only http:// is supported"),
        ("http://someone:hunter2@proxy:port", "is not of the form http://HOST:PORT"),
        ("http://someone:hunter2@proxy:99999", "is not of the form http://HOST:PORT"),
        ("http://:3128", "is not of the form http://HOST:PORT"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_cannot_be_used_is_refused_at_once(
    url: str, says: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{scheme}_proxy", url)
    monkeypatch.setenv("no_proxy", "")
    store = BlobStore(BlobLocation.parse(f"{scheme}://data.example.org/container"), Access(False))
    for ask in (lambda: store.stat("blob"), lambda: store.read_some("blob", 0, 1), lambda: list(store.list(""))):
        with pytest.raises(ConfigurationError, match=re.escape(says)) as caught:
            ask()
        assert f"{scheme.upper()}_PROXY" in str(caught.value) and "hunter2" not in str(caught.value)


# ---- Secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["refused", "cut", "broken body", "proxy", "no such host", "certificate"])
def test_no_error_shows_a_secret(
    what: str,
    transport: GatherTransport,
    blobs: Blobs,
    proxy: FaultProxy,
    tls_proxy: FaultProxy,
    container: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blobs.put(transport, "blob", b"data")
    connections.close_idle()
    if what == "refused":
        proxy.refuse()
    elif what == "cut":
        proxy.when("Get Blob").do(Cut("request"))
    elif what == "broken body":
        proxy.when("Get Blob").do(Cut(2, reset=False))
    elif what == "proxy":
        monkeypatch.setenv("HTTP_PROXY", "http://someone:hunter2@127.0.0.1:1")
        transport = GatherTransport()  # one reads the environment once for each host
    elif what == "no such host":
        blobs.url = "http://nobody.invalid/container"
    else:
        blobs.url = f"{tls_proxy.endpoint}/{container.rpartition('/')[2]}"
    with pytest.raises(AzureError) as caught:
        blobs.get(transport, "blob", 0, 4)
    error: BaseException | None = caught.value
    while error is not None:
        for text in (str(error), repr(error)):
            assert blobs.secret not in text and "sig=" not in text and "hunter2" not in text
        error = error.__cause__ or error.__context__
    assert Path(blobs.url).parts[1] in str(caught.value)  # but it says where
