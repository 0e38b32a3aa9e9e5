"""Responses: a head that is complete or an error, a body that is received directly into the caller's memory."""

from __future__ import annotations

import http.client
import io
import os
import select
import socket
import ssl
import sys
import threading
from collections import deque
from typing import Any

from azure_torch_ckpt.transport import connections
from azure_torch_ckpt.transport.buffers import Scatter

__all__ = ["CompleteHeadResponse", "receive_body"]

# A TLS read releases the GIL once per record of 16 KiB. Waiting for this much before reading keeps many reading threads
# from competing for it.
_READ_AHEAD = 256 * 1024
_TLS_RECORD = 18 * 1024  # a full record and its overhead
_LOW_WATER_SECONDS = 0.5  # the longest wait for that much; a live connection takes far less
_WAIT_ALL = 0 if connections.TIMEVAL is None else socket.MSG_WAITALL
# On other systems poll() ignores the low-water mark of a TCP socket.
_LOW_WATER = socket.SO_RCVLOWAT if sys.platform == "linux" else None

_tls_reads = threading.Lock()


def _after_fork_in_child() -> None:
    global _tls_reads
    _tls_reads = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class CompleteHeadResponse(http.client.HTTPResponse):
    """A ``response_class`` for `http.client`, which would treat the end of the connection as the end of the headers.

    A head that was cut off, even "HTTP/1.1 20", would count as a success.
    """

    def begin(self) -> None:
        """Receive the head.

        Raises:
            http.client.IncompleteRead: the connection ended within it.
        """
        received = self.fp
        head: Any = _Head(received)
        self.fp = head
        try:
            super().begin()
        finally:
            if self.fp is head:
                self.fp = received


class _Head:
    """The lines of a response's head, which ends with an empty line."""

    def __init__(self, received: io.BufferedReader) -> None:
        self._received = received
        self._begun = False

    def readline(self, limit: int = -1) -> bytes:
        line = self._received.readline(limit)
        if not line.endswith(b"\n") and len(line) != limit and (line or self._begun):
            raise http.client.IncompleteRead(line)
        self._begun = True
        return line


def receive_body(
    connection: http.client.HTTPConnection, response: http.client.HTTPResponse, dest: Scatter | None
) -> bytes:
    """Receive the body of a successful response into `dest` if the lengths agree; return the body otherwise.

    Raises:
        TimeoutError, OSError, http.client.HTTPException: the connection broke before the body was complete.
    """
    if dest is None or response.status not in (200, 206) or response.length != dest.size:
        return response.read()
    views = deque(view for view in dest.views if view.nbytes)
    _receive(connection.sock, response, views)
    dest.received = True
    return b""


def _receive(sock: socket.socket | None, response: http.client.HTTPResponse, views: deque[memoryview]) -> None:
    if sock is None:  # "Connection: close": only the response still holds the socket
        while views:
            _advance(views, response.readinto(views[0]))
        return
    # http.client's buffer received the first bytes together with the head (at most 8 KiB).
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
        sock.settimeout(connections.IO_SECONDS)
    response.close()


def _advance(views: deque[memoryview], got: int) -> None:
    if got == 0:
        raise http.client.IncompleteRead(b"", sum(view.nbytes for view in views))
    view = views.popleft()
    if got < view.nbytes:
        views.appendleft(view[got:])


def _receive_plain(sock: socket.socket, views: deque[memoryview]) -> None:
    # A blocking socket receives a whole view in one call without the GIL; SO_RCVTIMEO keeps the time limit.
    if connections.TIMEVAL is not None:
        sock.settimeout(None)
    while views:
        try:
            _advance(views, sock.recv_into(views[0], 0, _WAIT_ALL))
        except BlockingIOError as error:
            raise TimeoutError(f"no data for {connections.IO_SECONDS:.0f} s") from error


def _receive_tls(sock: ssl.SSLSocket, views: deque[memoryview]) -> None:
    """Wait for much data without the GIL, then read all of it, one thread of the process at a time."""
    sock.settimeout(0)
    wait = _Arrivals(sock)
    receive = sock.recv_into
    left = sum(view.nbytes for view in views)
    try:
        while views:
            view = views.popleft()
            got, size = 0, view.nbytes
            while True:
                # The inner loop runs once per 16 KiB of all loaded bytes, so it does nothing else.
                with _tls_reads:
                    try:
                        while got < size:
                            count = receive(view[got:], size - got)
                            if not count:
                                raise http.client.IncompleteRead(b"", left - got)
                            got += count
                        break
                    except ssl.SSLWantReadError:
                        pass
                wait.for_data(left - got)
            left -= size
    finally:
        wait.set_low_water(1)


class _Arrivals:
    """Waits until enough has arrived on a TLS connection."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._low_water = 1
        self._poll = None
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(sock, select.POLLIN)

    def for_data(self, left: int) -> None:
        """Return when much data has arrived, or any after a while. `left` bytes are still missing."""
        # A mark beyond the bytes that are still missing would never be reached.
        self.set_low_water(max(1, min(_READ_AHEAD, left - _TLS_RECORD)))
        if self._readable(min(_LOW_WATER_SECONDS, connections.IO_SECONDS)):
            return
        # Fewer bytes may be the last: a server that ends the connection with a TLS alert waits for our answer to it.
        self.set_low_water(1)
        if not self._readable(connections.IO_SECONDS):
            raise TimeoutError(f"no data for {connections.IO_SECONDS:.0f} s")

    def set_low_water(self, count: int) -> None:
        if count != self._low_water and _LOW_WATER is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, _LOW_WATER, count)
            self._low_water = count

    def _readable(self, seconds: float) -> bool:
        if self._poll is None:
            return connections.readable(self._sock, seconds)
        return bool(self._poll.poll(seconds * 1000))
