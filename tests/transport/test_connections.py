"""Connections of the transport: reuse, closing, certificates, time-outs, cancelling."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from azure.core.exceptions import (
    IncompleteReadError,
    ServiceRequestError,
    ServiceRequestTimeoutError,
    ServiceResponseError,
    ServiceResponseTimeoutError,
)

from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.transport import connections
from azure_torch_ckpt.transport.buffers import Cancel, Gather, Scatter
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from tests.support.faults import Answer, Cut, CutHead, Hold
from tests.support.proxy import FaultProxy
from tests.transport.signed_requests import KIB, MIB, Blobs, be_impatient, some_bytes

pytest_plugins = ("tests.transport.signed_requests",)


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
    """As successive writers do: a handshake would take longer than a small save."""
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
    """A transport with fewer certificates may not use a connection that another one trusts."""
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


@pytest.mark.parametrize("missing", [1, 2, 3, 4, 5, 30, 200, 300])
def test_a_head_that_breaks_off_is_an_error(either: Any, missing: int) -> None:
    """`http.client` would treat the received lines as all headers of a success without a body."""
    proxy, blobs, transport = either
    proxy.when("Put Blob").do(CutHead(missing))
    with pytest.raises(IncompleteReadError):
        blobs.put(transport, "blob", b"data")
    proxy.when("Get Blob").do(CutHead(missing))
    with pytest.raises(IncompleteReadError):
        blobs.get(transport, "blob", 0, 4)
    assert blobs.get(transport, "blob", 0, 4).content == b"data"
    assert proxy.count() == 3


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


@pytest.mark.parametrize("at", ["answer", 0, 300 * KIB])
@pytest.mark.parametrize("into_views", [True, False])
def test_a_server_that_falls_silent_is_given_up(
    either: Any, at: Any, into_views: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(MIB))
    proxy.when("Get Blob").do(Hold(at=at))
    dest = Scatter([memoryview(bytearray(MIB))]) if into_views else None
    be_impatient(monkeypatch)
    started = time.monotonic()
    with pytest.raises(ServiceResponseTimeoutError):
        blobs.get(transport, "blob", 0, MIB, dest)
    assert time.monotonic() - started > 0.3
    assert dest is None or not dest.received


def test_a_server_that_takes_no_more_is_given_up(either: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, blobs, transport = either
    be_impatient(monkeypatch)
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
        with pytest.raises((IncompleteReadError, ServiceResponseError)) as caught:
            blobs.get(transport, "blob", 0, 4 * MIB, dest)
        assert not isinstance(caught.value, ServiceResponseTimeoutError)  # noticed, and not waited for
        served.result(60)


def test_a_handshake_that_does_not_come_is_given_up(
    transport: GatherTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 0.4)
    # A socket without `accept`: the proxy cannot be silent before the handshake.
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
        assert isinstance(request.exception(timeout=60), (ServiceResponseError, IncompleteReadError))
    asked = proxy.count()
    with pytest.raises(ServiceResponseError):  # for good
        blobs.get(transport, "blob", 0, MIB, cancel=cancel)
    assert proxy.count() == asked
    assert len(blobs.get(transport, "blob", 0, MIB, cancel=Cancel()).content) == MIB
