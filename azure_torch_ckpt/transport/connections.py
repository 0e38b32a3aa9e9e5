"""The process's HTTP connections, over TLS and through proxies where needed. All transports share them.

A job makes a writer for every checkpoint. The connections outlive the writer, which saves the next one's handshakes.
They carry no credentials (each request has its own), so any transport may use them.
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

__all__ = [
    "IO_SECONDS",
    "TIMEVAL",
    "Proxy",
    "Route",
    "close_idle",
    "connect",
    "find_route",
    "give_back",
    "readable",
    "take",
]

CONNECT_SECONDS = 10.0
IO_SECONDS = 60.0
"""Seconds without a byte moved after which a connection counts as broken. It does not limit a whole body."""
# POSIX's struct timeval. Windows needs another form, and does without.
TIMEVAL = None if sys.platform == "win32" else struct.pack("ll", int(IO_SECONDS), 0)
# The service closes a connection after some idle minutes, and a router on the way may drop it without notice.
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
    """The target of a connection and how it is reached: two requests with equal routes can share a connection.

    Attributes:
        proxy: None for a direct connection.
        ca_file: PEM file of certificates to trust besides the platform's.
        ca_changed: when that file was written (ns), so that a new one is used.
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


def find_route(scheme: str, netloc: str, ca_file: str | None) -> Route:
    """Return the route to a host, through the proxy that the environment names now.

    Raises:
        ConfigurationError: the proxy is of an unsupported kind.
    """
    host = urllib.parse.SplitResult(scheme, netloc, "", "", "").hostname or ""
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    changed = os.stat(ca_file).st_mtime_ns if ca_file is not None and scheme == "https" else 0
    return Route(scheme, netloc, _proxy(proxy, scheme) if proxy else None, ca_file, changed)


def take(route: Route) -> tuple[http.client.HTTPConnection, bool]:
    """Return an idle connection and True, or a new one and False.

    Raises:
        OSError, http.client.HTTPException: no connection could be made.
    """
    while True:
        with _lock:
            idle = _idle.get(route)
            since, connection = idle.pop() if idle else (0.0, None)
        if connection is None:
            return connect(route), False
        # Data or end-of-file before a request was sent: the server has given this connection up.
        if time.monotonic() - since < _IDLE_SECONDS and not readable(connection.sock, 0):
            return connection, True
        connection.close()


def give_back(route: Route, connection: http.client.HTTPConnection) -> None:
    """Keep a connection for the next request. Its response must have been read to its end."""
    now = time.monotonic()
    stale: list[http.client.HTTPConnection] = []
    with _lock:
        idle = _idle.setdefault(route, deque())
        idle.append((now, connection))
        # The connection given back last is taken first, so the oldest one is at the other end.
        for kept in _idle.values():
            while kept and now - kept[0][0] > _IDLE_SECONDS:
                stale.append(kept.popleft()[1])
    for old in stale:
        old.close()


def close_idle() -> None:
    """Close the connections that no request is using."""
    global _idle
    with _lock:
        idle, _idle = _idle, {}
    for connections in idle.values():
        for _, connection in connections:
            connection.close()


atexit.register(close_idle)


def connect(route: Route) -> http.client.HTTPConnection:
    """Make a connection and set its time limits.

    Raises:
        OSError, http.client.HTTPException: it could not be made.
    """
    target = urllib.parse.SplitResult(route.scheme, route.netloc, "", "", "")
    host, port = target.hostname or "", target.port
    connection: http.client.HTTPConnection
    if route.proxy is not None:
        connection = _through_proxy(route, target, route.proxy)
    elif route.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=_context(route))
    else:
        connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    connection.connect()
    sock = connection.sock
    sock.settimeout(IO_SECONDS)
    if TIMEVAL is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _through_proxy(route: Route, target: urllib.parse.SplitResult, proxy: Proxy) -> http.client.HTTPConnection:
    if route.scheme == "https":
        tunnel = http.client.HTTPSConnection(proxy.host, proxy.port, timeout=CONNECT_SECONDS, context=_context(route))
        headers = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
        tunnel.set_tunnel(target.hostname or "", target.port or 443, headers=headers)
        return tunnel
    connection = http.client.HTTPConnection(proxy.host, proxy.port, timeout=CONNECT_SECONDS)
    connection.absolute_target = f"http://{route.netloc}"  # type: ignore[attr-defined]
    connection.proxy_authorization = proxy.authorization  # type: ignore[attr-defined]
    return connection


def _proxy(url: str, scheme: str) -> Proxy:
    """Parse a proxy's URL. The default port is that of HTTP, as in the library requests."""
    parsed = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
    named = f"The proxy for {scheme}:// (environment variable {scheme.upper()}_PROXY)"
    try:
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host = port = None
    if parsed.scheme != "http":
        raise ConfigurationError(
            f"{named} is of the kind {parsed.scheme}://, and only http:// is supported. Requests to Blob Storage "
            "are encrypted through an http:// proxy, too. Give the proxy as http://HOST:PORT, or name the "
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


def _context(route: Route) -> ssl.SSLContext:
    # Reading the platform's certificates takes some 50 ms of CPU, so neither each thread nor each writer does it.
    with _contexts_lock:
        return _make_context(route.ca_file, route.ca_changed)


@functools.lru_cache(maxsize=8)
def _make_context(ca_file: str | None, changed: int) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    return context


def readable(sock: socket.socket, seconds: float) -> bool:
    """Wait at most some seconds; return whether there is something to receive (or an end of file)."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    return bool(select.select([sock], [], [], seconds)[0])
