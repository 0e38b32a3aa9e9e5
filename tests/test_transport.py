"""The transport sends and receives exactly the bytes it should, and tells every kind of broken connection.

Requests are signed with a SAS and go to the transport as the SDK would hand them on, without the SDK's pipeline.
"""

from __future__ import annotations

import contextlib
import datetime
import http.server
import itertools
import os
import random
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from azure.core.exceptions import (
    AzureError,
    IncompleteReadError,
    ServiceRequestError,
    ServiceRequestTimeoutError,
    ServiceResponseError,
    ServiceResponseTimeoutError,
)
from azure.core.rest import HttpRequest, HttpResponse
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from azure_torch_ckpt import pool as connections
from azure_torch_ckpt.bodies import Cancel, Gather, Scatter
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.transport import GatherTransport
from tests.faults import Answer, Cut, Hold, Reframe
from tests.proxy import FaultProxy

KIB, MIB = 1024, 1024 * 1024


class Blobs:
    """Signed requests to one container."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sas = generate_container_sas(
            Azurite.account_name,
            url.rpartition("/")[2],
            Azurite.account_key,
            permission=ContainerSasPermissions(read=True, write=True, create=True, list=True),
            expiry=datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1),
        )

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
def tls_proxy(azurite: Azurite, azurite_tls: Azurite) -> Iterator[FaultProxy]:
    """A proxy that serves TLS, with the certificate of `azurite_tls`, in front of the plain emulator."""
    assert azurite_tls.certificate is not None
    files = azurite_tls.certificate, azurite_tls.certificate.with_name("key.pem")
    with FaultProxy(azurite.endpoint, tls=files) as between:
        yield between


@pytest.fixture(params=["plain", "tls"])
def either(request: pytest.FixtureRequest, container: str, azurite_tls: Azurite) -> Iterator[Any]:
    """Proxy, blobs and transport, over plain HTTP and over TLS."""
    between: FaultProxy = request.getfixturevalue("proxy" if request.param == "plain" else "tls_proxy")
    with contextlib.closing(GatherTransport(ca_file=str(azurite_tls.certificate))) as made:
        yield between, Blobs(f"{between.endpoint}/{container.rpartition('/')[2]}"), made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-outs of 0.4 s."""
    monkeypatch.setattr(connections, "IO_SECONDS", 0.4)
    monkeypatch.setattr(connections, "TIMEVAL", struct.pack("ll", 0, 400_000))
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 0.4)


def some_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def cut_up(data: bytes, sizes: Sequence[int]) -> list[memoryview]:
    """Views of these sizes, each in memory of its own."""
    ends = itertools.accumulate(sizes)
    return [memoryview(bytearray(data[end - size : end])) for end, size in zip(ends, sizes, strict=True)]


# Around the 64 KiB below which pieces are joined, and the 1 MiB that goes to a socket at once.
SIZES = [
    [1],
    [0, 0, 5, 0],
    [64 * KIB - 1],
    [64 * KIB],
    [64 * KIB + 1],
    [64 * KIB - 1, 1],
    [64 * KIB - 1, 0, 64 * KIB - 1, 2],
    [1, 64 * KIB, 1, 64 * KIB + 1, 1],
    [MIB - 1],
    [MIB],
    [MIB + 1],
    [3 * MIB + 7, 9, MIB, 64 * KIB - 1, 0, 2 * MIB],
    [3] * 10_000,
    [100, 0, 64 * KIB] * 40,
]
NAMES = ["-".join(map(str, sizes[:6])) for sizes in SIZES]


# ---- Sending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=NAMES)
def test_a_gathered_body_arrives_as_it_is(
    transport: GatherTransport, blobs: Blobs, proxy: FaultProxy, sizes: list[int]
) -> None:
    data = some_bytes(sum(sizes))
    assert blobs.put(transport, "blob", Gather(cut_up(data, sizes))).status_code == 201
    assert [seen.body_length for seen in proxy.requests("Put Blob")] == [len(data)]
    assert blobs.get(transport, "blob", 0, len(data)).content == data


def test_a_gather_copies_small_pieces_only_and_can_be_sent_again() -> None:
    sizes = [10] * 5_000 + [3 * MIB, 10, 128 * KIB, 10, 64 * KIB, 10]
    data = some_bytes(sum(sizes))
    views = cut_up(data, sizes)
    body = Gather(views)
    assert len(body) == len(data)
    for _ in range(2):
        pieces = list(body)
        assert b"".join(pieces) == data
        assert len(pieces) == 1 + 3 + 1 + 1 + 1
        assert all(len(piece) <= MIB for piece in pieces)
        owners = [piece.obj for piece in pieces if isinstance(piece, memoryview)]
        assert [owner is views[5_000].obj for owner in owners[:3]] == [True] * 3


@pytest.mark.parametrize("body", [b"bytes", bytearray(b"bytearray"), memoryview(b"memoryview"), b""])
def test_other_bodies_are_sent_too(transport: GatherTransport, blobs: Blobs, body: Any) -> None:
    assert blobs.put(transport, "blob", body).status_code == 201
    if len(body):
        assert blobs.get(transport, "blob", 0, len(body)).content == bytes(body)


# ---- Receiving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=NAMES)
def test_a_body_is_scattered_exactly(either: Any, sizes: list[int]) -> None:
    _, blobs, transport = either
    data = some_bytes(sum(sizes) + 20)
    blobs.put(transport, "blob", data)
    # The views lie in one piece of memory, one byte apart: whatever is written beyond a view shows.
    arena = bytearray(b"#" * (sum(sizes) + len(sizes)))
    starts = list(itertools.accumulate((size + 1 for size in sizes), initial=0))
    views = [memoryview(arena)[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    dest = Scatter(views)
    response = blobs.get(transport, "blob", 10, dest.size, dest)
    assert response.status_code == 206 and response.content == b"" and dest.received
    assert b"".join(views) == data[10:-10]
    assert all(arena[start + size] == ord("#") for start, size in zip(starts, sizes, strict=False))


@pytest.mark.parametrize("wanted", [99, 101])
def test_a_response_of_another_length_leaves_the_views_alone(either: Any, wanted: int) -> None:
    _, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(100))
    memory = bytearray(wanted)
    dest = Scatter([memoryview(memory)])
    response = blobs.get(transport, "blob", 0, 100, dest)
    assert not dest.received and not any(memory)
    assert response.content == response.body() == response.read() == some_bytes(100)
    assert b"".join(response.iter_bytes()) == some_bytes(100)


def test_an_error_of_the_right_length_leaves_the_views_alone(transport: GatherTransport, blobs: Blobs) -> None:
    length = len(blobs.get(transport, "missing", 0, 1).content)
    memory = bytearray(length)
    dest = Scatter([memoryview(memory)])
    response = blobs.get(transport, "missing", 0, length, dest)
    assert response.status_code == 404 and len(response.content) == length
    assert not dest.received and not any(memory)


def test_a_chunked_response_is_read_whole(either: Any) -> None:
    proxy, blobs, transport = either
    data = some_bytes(3 * MIB + 1)
    blobs.put(transport, "blob", data)
    proxy.when("Get Blob").do(Reframe(chunked=True))
    memory = bytearray(len(data))
    dest = Scatter([memoryview(memory)])
    response = blobs.get(transport, "blob", 0, len(data), dest)
    assert response.content == data
    assert not dest.received and not any(memory)  # nobody could know the length beforehand
    assert blobs.get(transport, "blob", 5, 2).content == data[5:7]
    assert proxy.connections == 1


def test_a_response_that_ends_its_connection_is_received(either: Any) -> None:
    proxy, blobs, transport = either
    data = some_bytes(MIB + 1)
    blobs.put(transport, "blob", data)
    proxy.when("Get Blob").do(Reframe(close=True))
    memory = bytearray(len(data))
    view = memoryview(memory)
    dest = Scatter([view[:10], view[10 : 300 * KIB], view[300 * KIB :]])
    blobs.get(transport, "blob", 0, len(data), dest)
    assert dest.received and memory == data
    assert blobs.get(transport, "blob", 5, 2).content == data[5:7]
    assert [seen.connection for seen in proxy.log] == [1, 1, 2]


def test_16_threads_receive_over_tls_at_once(azurite_tls: Azurite) -> None:
    """From the emulator itself: its TLS comes from OpenSSL, as ours does, in records of 16 KiB."""
    blobs = Blobs(azurite_tls.create_container(f"test-{os.getpid()}-{time.time_ns()}"))
    data = some_bytes(MIB) * 16

    def receive(start: int) -> bool:
        memory = bytearray(min(2 * MIB + 12_345, len(data) - start))
        view = memoryview(memory)
        dest = Scatter([view[:100], view[100 : 100 + 70 * KIB], view[100 + 70 * KIB :]])
        blobs.get(shared, "blob", start, dest.size, dest)
        return dest.received and memory == data[start : start + dest.size]

    with contextlib.closing(GatherTransport(ca_file=str(azurite_tls.certificate))) as shared:
        assert blobs.put(shared, "blob", Gather([memoryview(data)])).status_code == 201
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(receive, range(0, len(data), MIB)))


# ---- Connections ---------------------------------------------------------------------------------------------------


def test_a_connection_is_used_again(either: Any) -> None:
    proxy, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(1000))
    for start in range(20):
        dest = Scatter([memoryview(bytearray(500))])
        blobs.get(transport, "blob", start, 500, dest)
        assert dest.received
    assert proxy.connections == 1
    connections.close_idle()
    assert blobs.get(transport, "blob", 0, 1).status_code == 206
    assert proxy.connections == 2


def test_transports_share_the_connections_of_the_process(either: Any, azurite_tls: Azurite) -> None:
    """As writers do that follow one another: their handshakes would take longer than a small save."""
    proxy, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(1000))
    for _ in range(3):
        another = GatherTransport(ca_file=str(azurite_tls.certificate))
        assert blobs.get(another, "blob", 0, 1000).content == some_bytes(1000)
    assert proxy.connections == 1


def test_a_connection_that_lay_idle_for_long_is_not_used_again(either: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(1000))
    monkeypatch.setattr(connections, "_IDLE_SECONDS", 0.0)
    assert blobs.get(transport, "blob", 0, 1000).content == some_bytes(1000)
    assert proxy.connections == 2


def test_certificates_that_are_trusted_are_not_shared(
    azurite_tls: Azurite, tls_proxy: FaultProxy, container: str
) -> None:
    """A connection that one transport trusts is none that another, with fewer certificates, may use."""
    blobs = Blobs(f"{tls_proxy.endpoint}/{container.rpartition('/')[2]}")
    blobs.put(GatherTransport(ca_file=str(azurite_tls.certificate)), "blob", b"data")
    with pytest.raises(ServiceRequestError) as caught:
        blobs.get(GatherTransport(), "blob", 0, 4)
    assert isinstance(caught.value.inner_exception, ssl.SSLCertVerificationError)


def test_a_connection_that_the_server_closed_while_idle_is_replaced(either: Any) -> None:
    proxy, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(1000))
    proxy.wait_until(lambda: proxy.in_flight == 0)
    assert proxy.close_idle() == 1
    assert blobs.get(transport, "blob", 0, 1000).content == some_bytes(1000)
    assert [seen.connection for seen in proxy.log] == [1, 2]


@pytest.mark.parametrize("reset", [True, False])
def test_a_connection_that_breaks_when_it_is_used_again_is_replaced(either: Any, reset: bool) -> None:
    proxy, blobs, transport = either
    blobs.put(transport, "blob", b"old")
    proxy.when("Put Blob").do(Cut("request", reset=reset))
    data = some_bytes(8 * MIB)
    assert blobs.put(transport, "blob", Gather([memoryview(data)])).status_code == 201
    assert [seen.connection for seen in proxy.log] == [1, 1, 2]
    assert blobs.get(transport, "blob", 0, len(data)).content == data


def test_a_new_connection_that_breaks_is_an_error(either: Any) -> None:
    proxy, blobs, transport = either
    proxy.when("Put Blob").do(Cut("request"))
    with pytest.raises(ServiceResponseError):
        blobs.put(transport, "blob", b"data")
    assert proxy.count() == 1


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("into_views", [True, False])
def test_a_body_that_breaks_off_is_an_error_even_on_a_connection_used_again(
    either: Any, reset: bool, into_views: bool
) -> None:
    proxy, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(2 * MIB))
    proxy.when("Get Blob").do(Cut(MIB, reset=reset))
    dest = Scatter([memoryview(bytearray(2 * MIB))]) if into_views else None
    with pytest.raises((IncompleteReadError, ServiceResponseError)):
        blobs.get(transport, "blob", 0, 2 * MIB, dest)
    assert dest is None or not dest.received
    assert proxy.count("Get Blob") == 1
    assert len(blobs.get(transport, "blob", 0, 2 * MIB).content) == 2 * MIB


def test_an_answer_that_comes_while_the_body_is_sent_is_the_answer(either: Any) -> None:
    proxy, blobs, transport = either
    proxy.when("Put Blob", times=2).do(Answer(403, "AuthorizationFailure", read_body=False))
    body = Gather([memoryview(bytes(64 * MIB))])
    for _ in range(2):
        response = blobs.put(transport, "blob", body)
        assert response.status_code == 403 and response.headers["x-ms-error-code"] == "AuthorizationFailure"
    assert blobs.put(transport, "blob", b"data").status_code == 201
    assert [seen.connection for seen in proxy.log] == [1, 2, 3]


def test_a_dead_endpoint_is_an_error(transport: GatherTransport, blobs: Blobs, proxy: FaultProxy) -> None:
    proxy.refuse()
    with pytest.raises(ServiceRequestError):
        blobs.put(transport, "blob", b"data")
    proxy.accept()
    assert blobs.put(transport, "blob", b"data").status_code == 201


def test_ipv6(transport: GatherTransport, azurite: Azurite, container: str) -> None:
    with FaultProxy(azurite.endpoint, host="::1") as proxy:
        blobs = Blobs(f"{proxy.endpoint}/{container.rpartition('/')[2]}")
        assert blobs.put(transport, "blob", b"data").status_code == 201
        assert proxy.log[0].headers["host"].startswith("[::1]:")


def test_a_forked_child_makes_connections_of_its_own(either: Any) -> None:
    proxy, blobs, transport = either
    data = some_bytes(MIB)
    blobs.put(transport, "blob", data)
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            dest = Scatter([memoryview(bytearray(MIB))])
            blobs.get(transport, "blob", 0, MIB, dest)
            code = 0 if dest.received and b"".join(dest.views) == data else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert blobs.get(transport, "blob", 0, MIB).content == data
    assert [seen.connection for seen in proxy.log] == [1, 2, 1]


# ---- Certificates --------------------------------------------------------------------------------------------------


def test_a_server_of_an_unknown_authority_is_refused(
    transport: GatherTransport, tls_proxy: FaultProxy, container: str
) -> None:
    blobs = Blobs(f"{tls_proxy.endpoint}/{container.rpartition('/')[2]}")
    with pytest.raises(ServiceRequestError) as caught:
        blobs.put(transport, "blob", b"data")
    assert isinstance(caught.value.inner_exception, ssl.SSLCertVerificationError)
    assert tls_proxy.count() == 0


def test_a_server_of_another_name_is_refused(azurite: Azurite, azurite_tls: Azurite, container: str) -> None:
    assert azurite_tls.certificate is not None
    files = azurite_tls.certificate, azurite_tls.certificate.with_name("key.pem")
    with (
        FaultProxy(azurite.endpoint, tls=files, host="::1") as proxy,
        contextlib.closing(GatherTransport(ca_file=str(azurite_tls.certificate))) as transport,
    ):
        with pytest.raises(ServiceRequestError) as caught:
            Blobs(f"{proxy.endpoint}/{container.rpartition('/')[2]}").put(transport, "blob", b"data")
        assert isinstance(caught.value.inner_exception, ssl.SSLCertVerificationError)
        assert proxy.count() == 0


# ---- Time-outs and cancelling --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("at", ["answer", 0, 300 * KIB])
@pytest.mark.parametrize("into_views", [True, False])
def test_a_server_that_falls_silent_is_given_up(either: Any, at: Any, into_views: bool) -> None:
    proxy, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(MIB))
    proxy.when("Get Blob").do(Hold(at=at))
    dest = Scatter([memoryview(bytearray(MIB))]) if into_views else None
    started = time.monotonic()
    with pytest.raises(ServiceResponseTimeoutError):
        blobs.get(transport, "blob", 0, MIB, dest)
    assert 0.3 < time.monotonic() - started < 10
    assert dest is None or not dest.received


@pytest.mark.usefixtures("impatient")
def test_a_server_that_takes_no_more_is_given_up(either: Any) -> None:
    proxy, blobs, transport = either
    proxy.when("Put Blob").do(Hold())
    with pytest.raises(ServiceResponseTimeoutError):
        blobs.put(transport, "blob", Gather([memoryview(bytes(64 * MIB))]))


def test_a_server_that_says_good_bye_and_waits_is_noticed(azurite_tls: Azurite) -> None:
    """A TLS alert in the middle of a body, and no end of the TCP connection: less than we wait for, and all there is.

    From a socket of the test's own: the proxy hangs up, too.
    """
    assert azurite_tls.certificate is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(azurite_tls.certificate, azurite_tls.certificate.with_name("key.pem"))

    def serve() -> None:
        with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            assert connection.recv(64 * KIB).endswith(b"\r\n\r\n")
            connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n" % (4 * MIB))
            connection.sendall(bytes(MIB))
            with contextlib.suppress(OSError):
                connection.unwrap()  # waits for the client's good-bye

    dest = Scatter([memoryview(bytearray(4 * MIB))])
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        contextlib.closing(GatherTransport(ca_file=str(azurite_tls.certificate))) as transport,
        ThreadPoolExecutor(1) as pool,
    ):
        served = pool.submit(serve)
        blobs = Blobs(f"https://127.0.0.1:{listener.getsockname()[1]}/devstoreaccount1/container")
        started = time.monotonic()
        with pytest.raises((IncompleteReadError, ServiceResponseError)) as caught:
            blobs.get(transport, "blob", 0, 4 * MIB, dest)
        assert time.monotonic() - started < 20 and not isinstance(caught.value, ServiceResponseTimeoutError)
        served.result(20)


@pytest.mark.usefixtures("impatient")
def test_a_handshake_that_does_not_come_is_given_up(transport: GatherTransport) -> None:
    # A socket that nobody accepts from: the proxy cannot be silent before the handshake.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        blobs = Blobs(f"https://127.0.0.1:{listener.getsockname()[1]}/devstoreaccount1/container")
        with pytest.raises(ServiceRequestTimeoutError):
            blobs.put(transport, "blob", b"data")


@pytest.mark.parametrize("at", ["request", "answer", 300 * KIB])
def test_cancel_ends_a_request_at_once(either: Any, at: Any) -> None:
    proxy, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(MIB))
    hold = Hold(at=at)
    assert not isinstance(hold.until, float)
    proxy.when("Get Blob").do(hold)
    cancel = Cancel()
    with ThreadPoolExecutor(1) as pool:
        dest = Scatter([memoryview(bytearray(MIB))])
        request = pool.submit(blobs.get, transport, "blob", 0, MIB, dest, cancel=cancel)
        hold.until.wait_for(1)
        cancel.cancel()
        assert isinstance(request.exception(timeout=20), (ServiceResponseError, IncompleteReadError))
    asked = proxy.count()
    with pytest.raises(ServiceResponseError):  # for good
        blobs.get(transport, "blob", 0, MIB, cancel=cancel)
    assert proxy.count() == asked
    assert len(blobs.get(transport, "blob", 0, MIB, cancel=Cancel()).content) == MIB


# ---- Proxies from the environment ----------------------------------------------------------------------------------


class ForwardProxy(http.server.BaseHTTPRequestHandler):
    """What a company puts between its machines and the internet. It knows both ways: CONNECT, and whole URLs."""

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
