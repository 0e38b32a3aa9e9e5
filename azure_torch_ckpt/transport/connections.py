"""The process's HTTP connections: made, through proxies and TLS where needed, kept alive, and shared by all transports.

A job makes a writer for every checkpoint; its connections outlive it, so the next one's handshakes are saved. They
carry no credentials (each request has its own), which is why any transport may use them.
"""

from __future__ import annotations

import atexit
import base64
import functools
import http.client
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import deque
from dataclasses import dataclass, field

from azure_torch_ckpt.errors import ConfigurationError

__all__ = ["IO_SECONDS", "TIMEVAL", "Proxy", "Route", "close_idle", "connect", "give_back", "readable", "route", "take"]

CONNECT_SECONDS = 10.0
IO_SECONDS = 60.0
"""Seconds without a byte moved after which a connection counts as broken; not for a whole body."""
# POSIX's struct timeval; Windows wants another form, and goes without.
TIMEVAL = None if sys.platform == "win32" else struct.pack("ll", int(IO_SECONDS), 0)
# The service closes a connection that lay idle for some minutes, and what lies on the way may forget it without a word.
_IDLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy, spoken to over plain TCP.

    Attributes:
        authorization: value of the header Proxy-Authorization, or None. Secret.
    """

    host: str
    port: int
    authorization: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a connection leads and how: what must be equal for two requests to share one.

    Attributes:
        proxy: the way to the proxy; None without one.
        ca_file: PEM file of certificates to trust besides the platform's.
        ca_changed: when that file was written (ns), so that a new one is heeded.
    """

    scheme: str
    netloc: str
    proxy: Proxy | None
    ca_file: str | None
    ca_changed: int


_lock = threading.Lock()
_idle: dict[Route, deque[tuple[float, http.client.HTTPConnection]]] = {}


def _after_fork_in_child() -> None:
    # Connections must not be used by two processes, and another thread may have held the lock when the fork happened.
    global _lock, _idle, _contexts_lock
    _lock, _idle, _contexts_lock = threading.Lock(), {}, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def route(scheme: str, netloc: str, ca_file: str | None) -> Route:
    """The way to a host, by the proxies that the environment names now.

    Raises:
        ConfigurationError: the proxy is of a kind that is not spoken here.
    """
    host = urllib.parse.SplitResult(scheme, netloc, "", "", "").hostname or ""
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    changed = os.stat(ca_file).st_mtime_ns if ca_file is not None and scheme == "https" else 0
    return Route(scheme, netloc, _proxy(proxy, scheme) if proxy else None, ca_file, changed)


def take(way: Route) -> tuple[http.client.HTTPConnection, bool]:
    """An idle connection and True, or a new one and False.

    Raises:
        OSError, http.client.HTTPException: no connection could be made.
    """
    while True:
        with _lock:
            idle = _idle.get(way)
            since, connection = idle.pop() if idle else (0.0, None)
        if connection is None:
            return connect(way), False
        # Data or end-of-file before a request was sent: the server has given this connection up.
        if time.monotonic() - since < _IDLE_SECONDS and not readable(connection.sock, 0):
            return connection, True
        connection.close()


def give_back(way: Route, connection: http.client.HTTPConnection) -> None:
    """Keep a connection, whose response was read to its end, for the next request."""
    now = time.monotonic()
    stale: list[http.client.HTTPConnection] = []
    with _lock:
        idle = _idle.setdefault(way, deque())
        idle.append((now, connection))
        # The last one given back is the first one taken, so what lay longest is at the other end.
        for kept in _idle.values():
            while kept and now - kept[0][0] > _IDLE_SECONDS:
                stale.append(kept.popleft()[1])
    for old in stale:
        old.close()


def close_idle() -> None:
    """Close the connections that no request uses now."""
    global _idle
    with _lock:
        idle, _idle = _idle, {}
    for connections in idle.values():
        for _, connection in connections:
            connection.close()


atexit.register(close_idle)


def connect(way: Route) -> http.client.HTTPConnection:
    """A new connection, with its time limits set.

    Raises:
        OSError, http.client.HTTPException: it could not be made.
    """
    target = urllib.parse.SplitResult(way.scheme, way.netloc, "", "", "")
    host, port = target.hostname or "", target.port
    connection: http.client.HTTPConnection
    if way.proxy is not None:
        connection = _through_proxy(way, target, way.proxy)
    elif way.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=_context(way))
    else:
        connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    connection.connect()
    sock = connection.sock
    sock.settimeout(IO_SECONDS)
    if TIMEVAL is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _through_proxy(way: Route, target: urllib.parse.SplitResult, proxy: Proxy) -> http.client.HTTPConnection:
    if way.scheme == "https":
        tunnel = http.client.HTTPSConnection(proxy.host, proxy.port, timeout=CONNECT_SECONDS, context=_context(way))
        headers = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
        tunnel.set_tunnel(target.hostname or "", target.port or 443, headers=headers)
        return tunnel
    connection = http.client.HTTPConnection(proxy.host, proxy.port, timeout=CONNECT_SECONDS)
    connection.absolute_target = f"http://{way.netloc}"  # type: ignore[attr-defined]
    connection.proxy_authorization = proxy.authorization  # type: ignore[attr-defined]
    return connection


def _proxy(url: str, scheme: str) -> Proxy:
    """Taken apart; without a port it is that of HTTP, as in requests."""
    parsed = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
    named = f"The proxy for {scheme}:// (environment variable {scheme.upper()}_PROXY)"
    try:
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host = port = None
    if parsed.scheme != "http":
        raise ConfigurationError(
            f"{named} is of the kind {parsed.scheme}://, and only http:// is supported. What goes to Blob Storage "
            "through an http:// proxy is encrypted all the same. Give the proxy as http://HOST:PORT, or name the "
            "storage endpoint in NO_PROXY"
        )
    if not host:
        raise ConfigurationError(f"{named} is not of the form http://HOST:PORT. Correct it")
    authorization = None
    if parsed.username is not None:
        user = urllib.parse.unquote(f"{parsed.username}:{parsed.password or ''}")
        authorization = "Basic " + base64.b64encode(user.encode()).decode()
    return Proxy(host, port or http.client.HTTP_PORT, authorization)


_contexts_lock = threading.Lock()


def _context(way: Route) -> ssl.SSLContext:
    # Reading the platform's certificates takes some 50 ms of CPU: not once per thread, nor once per writer.
    with _contexts_lock:
        return _make_context(way.ca_file, way.ca_changed)


@functools.lru_cache(maxsize=8)
def _make_context(ca_file: str | None, changed: int) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    return context


def readable(sock: socket.socket, seconds: float) -> bool:
    """Whether there is something to receive, an end of file too, within so many seconds."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    return bool(select.select([sock], [], [], seconds)[0])
