"""The HTTP transport: request bodies are sent, and response bodies received, straight from and into caller memory.

An ``azure-core`` transport over ``http.client``. A body may be a `Gather`: its views go to the socket as they are. A
download may carry ``dest=Scatter(views)``: the body is received into them, and the response that the SDK sees is
empty. The SDK hands keyword arguments that it does not know on to ``HttpTransport.send``, which is how ``dest`` gets
here (``azure.core.pipeline.Pipeline.run``: "**kwargs: transport or context specific options").
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import select
import socket
import ssl
import struct
import sys
import threading
import urllib.parse
import urllib.request
import weakref
from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, cast

from azure.core.exceptions import (
    HttpResponseError,
    IncompleteReadError,
    ServiceRequestError,
    ServiceRequestTimeoutError,
    ServiceResponseError,
    ServiceResponseTimeoutError,
)
from azure.core.pipeline.transport import HttpTransport
from azure.core.rest import HttpRequest, HttpResponse
from azure.core.utils import case_insensitive_dict

from azure_torch_ckpt.bodies import SEND_SLICE, Cancel, Gather, Scatter

__all__ = ["GatherTransport"]

_CONNECT_SECONDS = 10.0
_IO_SECONDS = 60.0  # without a byte moved; not for a whole body
# POSIX's struct timeval; Windows wants another form, and goes without.
_IO_TIMEVAL = None if sys.platform == "win32" else struct.pack("ll", int(_IO_SECONDS), 0)
# A TLS read gives the GIL away once per record of 16 KiB. Waiting for this much before reading keeps many reading
# threads from fighting over it.
_READ_AHEAD = 256 * 1024
_TLS_RECORD = 18 * 1024  # a full record and its overhead
_LOW_WATER_SECONDS = 0.5  # no longer wait for that much; far more than a live connection takes
_WAIT_ALL = 0 if _IO_TIMEVAL is None else socket.MSG_WAITALL
# Elsewhere poll() does not heed the low-water mark of a TCP socket.
_LOW_WATER = socket.SO_RCVLOWAT if sys.platform == "linux" else None


class _Response(HttpResponse):
    """A response whose body has arrived in full: in the caller's views, or here as `content`."""

    def __init__(self, request: HttpRequest, response: http.client.HTTPResponse, body: bytes) -> None:
        self._request = request
        self._status = response.status
        self._reason = response.reason
        self._headers = case_insensitive_dict(response.headers.items())
        self._body = body
        self._encoding: str | None = None
        # The SDK's own retry policy notes here which of two endpoints answered; its download reads it.
        self.location_mode = "primary"

    @property
    def request(self) -> HttpRequest:
        return self._request

    @property
    def status_code(self) -> int:
        return self._status

    @property
    def headers(self) -> MutableMapping[str, str]:
        return self._headers

    @property
    def reason(self) -> str:
        return self._reason

    @property
    def content_type(self) -> str | None:
        return self._headers.get("content-type")

    @property
    def is_closed(self) -> bool:
        return True

    @property
    def is_stream_consumed(self) -> bool:
        return True

    @property
    def encoding(self) -> str | None:
        return self._encoding

    @encoding.setter
    def encoding(self, value: str | None) -> None:
        self._encoding = value

    @property
    def url(self) -> str:
        return self._request.url

    @property
    def content(self) -> bytes:
        return self._body

    def text(self, encoding: str | None = None) -> str:
        return self._body.decode(encoding or self._encoding or "utf-8-sig", errors="replace")

    def body(self) -> bytes:
        return self._body

    def json(self) -> Any:
        return json.loads(self._body)

    def raise_for_status(self) -> None:
        if self._status >= 400:
            raise HttpResponseError(response=self)

    def __enter__(self) -> _Response:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self) -> bytes:
        return self._body

    def iter_raw(self, **kwargs: Any) -> Iterator[bytes]:
        return _Stream(self)

    def iter_bytes(self, **kwargs: Any) -> Iterator[bytes]:
        return self.iter_raw()

    def stream_download(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
        return self.iter_raw()


class _Stream(Iterator[bytes]):
    """What the SDK iterates a body with: it wants to know the response and its length, and hangs properties on it.

    No ``__len__``: the SDK makes a list of the pieces, and `list` would make room for one per byte.
    """

    def __init__(self, response: _Response) -> None:
        self.request = response.request
        self.response = response
        self.content_length = int(response.headers.get("content-length", 0))
        self._pieces = iter([response.content] if response.content else [])

    def __next__(self) -> bytes:
        return next(self._pieces)


_tls_reads = threading.Lock()
_transports: weakref.WeakSet[GatherTransport] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # Connections must not be used by two processes, and another thread may have held a lock when the fork happened.
    global _tls_reads
    _tls_reads = threading.Lock()
    for transport in list(_transports):
        transport._forget_connections()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class GatherTransport(HttpTransport[HttpRequest, HttpResponse]):
    """Keep-alive connections to the hosts that requests name, used by any number of threads.

    Args:
        ca_file: a PEM file of certificates to trust besides the platform's, for endpoints with a private CA.
    """

    def __init__(self, *, ca_file: str | None = None) -> None:
        self._ca_file = ca_file
        self._tls: ssl.SSLContext | None = None
        self._forget_connections()
        _transports.add(self)

    def _forget_connections(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], deque[http.client.HTTPConnection]] = {}

    def open(self) -> None:
        pass  # connections are made when a request needs one

    def close(self) -> None:
        """Close the idle connections. The transport can be used again afterwards."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def __exit__(self, *args: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_idle"):
            self.close()

    def send(
        self, request: HttpRequest, *, dest: Scatter | None = None, cancel: Cancel | None = None, **kwargs: Any
    ) -> HttpResponse:
        """Send `request` and receive the whole response.

        Args:
            dest: where the body of a successful response goes if its Content-Length is the views' size. Otherwise
                the body is kept in the response, and the views are untouched.
            cancel: breaks the request off.

        Raises:
            ServiceRequestError: no connection.
            ServiceResponseError, IncompleteReadError: the connection broke before the response was complete. The
                service may have carried the request out.
        """
        target = urllib.parse.urlsplit(request.url)
        connection, reused = self._take(target.scheme, target.netloc)
        response = None
        while True:
            try:
                with contextlib.nullcontext() if cancel is None else cancel.holding(connection.sock):
                    response = self._exchange(connection, target, request)
                    body = _body(connection, response, dest)
                break
            except TimeoutError as error:
                connection.close()
                raise ServiceResponseTimeoutError(_describe(error, target), error=error) from error
            except http.client.IncompleteRead as error:
                connection.close()
                raise IncompleteReadError(_describe(error, target), error=error) from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if not reused or response is not None or (cancel is not None and cancel.cancelled):
                    raise ServiceResponseError(_describe(error, target), error=error) from error
                # The server closed a connection that lay idle. That is no fault, so it does not count as an attempt.
                connection, reused = self._connect(target.scheme, target.netloc), False
        if response.will_close or getattr(connection, "body_cut_short", False):
            connection.close()
        else:
            with self._lock:
                self._idle.setdefault((target.scheme, target.netloc), deque()).append(connection)
        return _Response(request, response, body)

    def _exchange(
        self, connection: http.client.HTTPConnection, target: urllib.parse.SplitResult, request: HttpRequest
    ) -> http.client.HTTPResponse:
        """Send the request; return once the response's head has arrived."""
        path = urllib.parse.urlunsplit(("", "", target.path or "/", target.query, ""))
        absolute = getattr(connection, "absolute_target", None)
        connection.putrequest(
            request.method, f"{absolute}{path}" if absolute else path, skip_host=True, skip_accept_encoding=True
        )
        connection.putheader("Host", target.netloc)
        content = request.content
        headers = request.headers
        for name, value in headers.items():
            connection.putheader(name, str(value))
        if content is None and request.method in ("PUT", "POST") and "Content-Length" not in headers:
            connection.putheader("Content-Length", "0")
        if absolute and (authorization := getattr(connection, "proxy_authorization", None)):
            connection.putheader("Proxy-Authorization", authorization)
        try:
            connection.endheaders()
            for piece in _pieces(content):
                connection.send(piece)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            # A server that refuses a request may answer and hang up before it has read the body: its answer says why.
            with contextlib.suppress(OSError, http.client.HTTPException):
                response = connection.getresponse()
                if response.status >= 400:
                    connection.body_cut_short = True  # type: ignore[attr-defined]
                    return response
            raise
        return connection.getresponse()

    def _take(self, scheme: str, netloc: str) -> tuple[http.client.HTTPConnection, bool]:
        while True:
            with self._lock:
                idle = self._idle.get((scheme, netloc))
                connection = idle.pop() if idle else None
            if connection is None:
                return self._connect(scheme, netloc), False
            # Data or end-of-file before a request was sent: the server has given this connection up.
            if connection.sock is not None and not _readable(connection.sock, 0):
                return connection, True
            connection.close()

    def _connect(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        target = urllib.parse.SplitResult(scheme, netloc, "", "", "")
        host, port = target.hostname or "", target.port
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
        connection: http.client.HTTPConnection
        try:
            if proxy is not None:
                connection = self._through_proxy(target, proxy)
            elif scheme == "https":
                connection = http.client.HTTPSConnection(host, port, timeout=_CONNECT_SECONDS, context=self._context())
            else:
                connection = http.client.HTTPConnection(host, port, timeout=_CONNECT_SECONDS)
            connection.connect()
        except TimeoutError as error:
            raise ServiceRequestTimeoutError(_describe(error, target), error=error) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServiceRequestError(_describe(error, target), error=error) from error
        sock = connection.sock
        sock.settimeout(_IO_SECONDS)
        if _IO_TIMEVAL is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _IO_TIMEVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _through_proxy(self, target: urllib.parse.SplitResult, proxy: str) -> http.client.HTTPConnection:
        parsed = urllib.parse.urlsplit(proxy if "//" in proxy else f"http://{proxy}")
        host, port = parsed.hostname or "", parsed.port or 3128
        authorization = None
        if parsed.username is not None:
            user = urllib.parse.unquote(f"{parsed.username}:{parsed.password or ''}")
            authorization = "Basic " + base64.b64encode(user.encode()).decode()
        if target.scheme == "https":
            tunnel = http.client.HTTPSConnection(host, port, timeout=_CONNECT_SECONDS, context=self._context())
            headers = {"Proxy-Authorization": authorization} if authorization else {}
            tunnel.set_tunnel(target.hostname or "", target.port or 443, headers=headers)
            return tunnel
        connection = http.client.HTTPConnection(host, port, timeout=_CONNECT_SECONDS)
        connection.absolute_target = f"http://{target.netloc}"  # type: ignore[attr-defined]
        connection.proxy_authorization = authorization  # type: ignore[attr-defined]
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            context = ssl.create_default_context()
            if self._ca_file is not None:
                context.load_verify_locations(cafile=self._ca_file)
            self._tls = context
        return self._tls


def _pieces(content: Any) -> Iterator[memoryview | bytes]:
    if content is None:
        return
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, (bytes, bytearray, memoryview)):
        content = Gather([memoryview(content).cast("B")] if len(content) else [])
    elif hasattr(content, "read"):
        content = iter(lambda: content.read(SEND_SLICE), b"")
    yield from cast("Iterator[memoryview | bytes]", content)


def _describe(error: BaseException, target: urllib.parse.SplitResult) -> str:
    # The host only: the query may hold a SAS.
    return f"{target.scheme}://{target.netloc}: {type(error).__name__}: {error}"


def _readable(sock: socket.socket, seconds: float) -> bool:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    return bool(select.select([sock], [], [], seconds)[0])


def _body(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, dest: Scatter | None) -> bytes:
    if dest is None or response.status not in (200, 206) or response.length != dest.size:
        return response.read()
    _receive(connection, response, dest.views)
    dest.received = True
    return b""


def _receive(
    connection: http.client.HTTPConnection, response: http.client.HTTPResponse, dest: Sequence[memoryview]
) -> None:
    views = deque(view for view in dest if view.nbytes)
    sock = connection.sock
    if sock is None:  # "Connection: close": only the response still holds the socket
        while views:
            _advance(views, response.readinto(views[0]))
        return
    # http.client's buffer took in the first bytes together with the head (at most 8 KiB).
    buffered = len(response.fp.peek()) if views else 0
    while views and buffered:
        got = response.fp.readinto(views[0][:buffered])
        buffered -= got
        _advance(views, got)
    try:
        if isinstance(sock, ssl.SSLSocket):
            _receive_tls(sock, views)
        else:
            _receive_plain(sock, views)
    finally:
        sock.settimeout(_IO_SECONDS)
    response.close()


def _advance(views: deque[memoryview], got: int) -> None:
    if got == 0:
        raise http.client.IncompleteRead(b"", sum(view.nbytes for view in views))
    view = views.popleft()
    if got < view.nbytes:
        views.appendleft(view[got:])


def _receive_plain(sock: socket.socket, views: deque[memoryview]) -> None:
    # A blocking socket receives a whole view in one call without the GIL; SO_RCVTIMEO keeps the time limit.
    if _IO_TIMEVAL is not None:
        sock.settimeout(None)
    while views:
        try:
            _advance(views, sock.recv_into(views[0], 0, _WAIT_ALL))
        except BlockingIOError as error:
            raise TimeoutError(f"no data for {_IO_SECONDS:.0f} s") from error


def _receive_tls(sock: ssl.SSLSocket, views: deque[memoryview]) -> None:
    """Wait for much data without the GIL, then read all of it, one thread of the process at a time."""
    sock.settimeout(0)
    left = sum(view.nbytes for view in views)
    low_water = 1
    try:
        while views:
            view = views[0]
            got = 0
            with _tls_reads, contextlib.suppress(ssl.SSLWantReadError):
                while got < view.nbytes:
                    count = sock.recv_into(view[got:])
                    if count == 0:
                        raise http.client.IncompleteRead(b"", left - got)
                    got += count
            left -= got
            if got:
                _advance(views, got)
            if got == view.nbytes:
                continue
            # More than what is still to come would never arrive.
            wanted = max(1, min(_READ_AHEAD, left - _TLS_RECORD))
            if wanted != low_water and _LOW_WATER is not None:
                sock.setsockopt(socket.SOL_SOCKET, _LOW_WATER, wanted)
                low_water = wanted
            if _readable(sock, min(_LOW_WATER_SECONDS, _IO_SECONDS)):
                continue
            # Less may be all that comes: a server that ends the connection with a TLS alert waits for our answer to it.
            if low_water != 1 and _LOW_WATER is not None:
                sock.setsockopt(socket.SOL_SOCKET, _LOW_WATER, 1)
                low_water = 1
            if not _readable(sock, _IO_SECONDS):
                raise TimeoutError(f"no data for {_IO_SECONDS:.0f} s")
    finally:
        if low_water != 1 and _LOW_WATER is not None:
            sock.setsockopt(socket.SOL_SOCKET, _LOW_WATER, 1)
