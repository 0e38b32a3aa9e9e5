"""A server in front of the emulator that answers some requests itself: the base of doubles that add to Azurite."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}

_Server = TypeVar("_Server", bound="ForwardingServer")

Response: TypeAlias = "tuple[int, dict[str, str], bytes]"
"""Status, headers, body. Without ``Content-Length`` among the headers, the body's length is sent."""


class ForwardingServer:
    """Serves from `__enter__` to `__exit__`, with a thread for each connection.

    Args:
        upstream: the emulator's endpoint, `Azurite.endpoint`.
        handler: answers the requests; it finds this object as ``self.double``.
    """

    def __init__(self, upstream: str, handler: type[ForwardingHandler]) -> None:
        self.upstream = upstream
        bound = type(handler.__name__, (handler,), {"double": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{urlsplit(self.upstream).path}"

    def __enter__(self: _Server) -> _Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class ForwardingHandler(BaseHTTPRequestHandler):
    """One connection of a client, and the connection to the emulator that belongs to it. A subclass has `respond`."""

    double: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def respond(self, body: bytes) -> Response:
        """The response to the request with this body."""
        return self.forward(self.path, body)

    def forward(self, target: str, body: bytes, headers: Mapping[str, str] | None = None) -> Response:
        """The emulator's response to this request, sent with another target or with other headers."""
        headers = {
            name: value
            for name, value in (self.headers if headers is None else headers).items()
            if name.lower() not in _HOP_BY_HOP
        }
        # urllib would change the case of the names of headers, and so of metadata.
        self._upstream.request(self.command, target, body if self.command == "PUT" else None, headers)
        response = self._upstream.getresponse()
        content = response.read()
        answered = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        length = response.getheader("Content-Length")
        if self.command == "HEAD" and length is not None:
            answered["Content-Length"] = length
        return response.status, answered, content

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client went away
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(urlsplit(self.double.upstream).netloc)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def do_GET(self) -> None:
        status, headers, content = self.respond(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        self.send_response_only(status)
        if status not in (204, 304):
            headers = {"Content-Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(content)

    do_HEAD = do_PUT = do_DELETE = do_GET
