"""Counts what this process sends and receives through http.client, for servers that keep no counts themselves."""

from __future__ import annotations

import http.client
import socket
import threading
from typing import Any


class HttpCounts:
    """Requests, bytes and connections of all clients of this process that use http.client.

    Ours does, and so does everything on requests or urllib3. aiohttp (adlfs) and Rust (obstore) do not; only the
    connections of adlfs are counted. It replaces methods of the standard library for the rest of the process's life,
    so it is for processes that run one case and end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {"requests": 0.0, "bytes_in": 0.0, "bytes_out": 0.0, "conns": 0.0}
        put_request, put_header = http.client.HTTPConnection.putrequest, http.client.HTTPConnection.putheader
        begin, connect = http.client.HTTPResponse.begin, socket.socket.connect

        def counted_request(connection: http.client.HTTPConnection, *args: Any, **options: Any) -> None:
            self._add("requests", 1)
            put_request(connection, *args, **options)

        def counted_header(connection: http.client.HTTPConnection, header: Any, *values: Any) -> None:
            if header in ("Content-Length", b"Content-Length"):
                self._add("bytes_in", int(values[0]))
            put_header(connection, header, *values)

        def counted_begin(response: http.client.HTTPResponse) -> None:
            begin(response)
            self._add("bytes_out", response.length or 0)

        def counted_connect(self_: socket.socket, address: Any) -> None:
            self._add("conns", 1)
            connect(self_, address)

        for owner, name, method in [
            (http.client.HTTPConnection, "putrequest", counted_request),
            (http.client.HTTPConnection, "putheader", counted_header),
            (http.client.HTTPResponse, "begin", counted_begin),
            (socket.socket, "connect", counted_connect),
        ]:
            setattr(owner, name, method)

    def now(self) -> dict[str, float]:
        with self._lock:
            return dict(self._counts)

    def _add(self, name: str, amount: int) -> None:
        with self._lock:
            self._counts[name] += amount
