"""The proxy of the fault tests leaves nothing open when it stops, and keeps its port while it refuses connections."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from azure_torch_ckpt.emulator import Azurite
from tests.support.faults import Cut
from tests.support.proxy import FaultProxy


def connect(proxy: FaultProxy, authority: Path | None = None) -> socket.socket:
    """A connection, with TLS if an authority is named."""
    target = urlsplit(proxy.endpoint)
    assert target.hostname is not None and target.port is not None
    connection = socket.create_connection((target.hostname, target.port))
    if authority is None:
        return connection
    return ssl.create_default_context(cafile=authority).wrap_socket(connection, server_hostname=target.hostname)


def ask(connection: socket.socket) -> bytes:
    connection.sendall(b"HEAD /devstoreaccount1/container/blob HTTP/1.1\r\nHost: x\r\n\r\n")
    return connection.recv(1000)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_nothing_is_left_open_when_it_stops(azurite: Azurite, azurite_tls: Azurite, tls: bool) -> None:
    authority = azurite_tls.certificate if tls else None
    files = None if authority is None else (authority, authority.with_name("key.pem"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        with contextlib.ExitStack() as clients:
            with FaultProxy(azurite.endpoint, tls=files) as proxy:
                used, cut = (clients.enter_context(connect(proxy, authority)) for _ in range(2))
                clients.enter_context(connect(proxy, authority))
                clients.enter_context(connect(proxy))  # with TLS, in the middle of a handshake
                assert ask(used).startswith(b"HTTP/1.1 ")
                proxy.when("Head").do(Cut("request", reset=False))
                assert ask(cut) == b""
            gc.collect()
    assert [str(warning.message) for warning in seen] == []


def test_nobody_else_gets_its_port_while_it_refuses_connections(proxy: FaultProxy) -> None:
    target = urlsplit(proxy.endpoint)
    assert target.hostname is not None and target.port is not None
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((target.hostname, target.port))
    proxy.accept()
    connect(proxy).close()
