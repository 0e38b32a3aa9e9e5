"""The HTTP transport: request bodies are sent, and response bodies received, straight from and into caller memory.

An ``azure-core`` transport over ``http.client``. A body may be a `Gather`: its views go to the socket as they are. A
download may carry ``dest=Scatter(views)``: the body is received into them, and the response that the SDK sees is
empty. The SDK hands keyword arguments that it does not know on to ``HttpTransport.send``, which is how ``dest`` gets
here (``azure.core.pipeline.Pipeline.run``: "**kwargs: transport or context specific options").
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import urllib.parse
from collections.abc import Iterator, MutableMapping
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

from azure_torch_ckpt.transport import connections, responses
from azure_torch_ckpt.transport.buffers import SEND_SLICE, Cancel, Doubt, Gather, Scatter

__all__ = ["GatherTransport"]


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


class GatherTransport(HttpTransport[HttpRequest, HttpResponse]):
    """Sends requests over the process's connections (see `pool`); used by any number of threads.

    Args:
        ca_file: a PEM file of certificates to trust besides the platform's, for endpoints with a private CA.
    """

    def __init__(self, *, ca_file: str | None = None) -> None:
        self._ca_file = ca_file
        self._routes: dict[tuple[str, str], connections.Route] = {}

    def open(self) -> None:
        pass  # connections are made when a request needs one

    def close(self) -> None:
        pass  # the connections are the process's

    def __exit__(self, *args: Any) -> None:
        pass

    def send(
        self,
        request: HttpRequest,
        *,
        dest: Scatter | None = None,
        cancel: Cancel | None = None,
        doubt: Doubt | None = None,
        answers: list[HttpResponse] | None = None,
        **kwargs: Any,
    ) -> HttpResponse:
        """Send `request` and receive the whole response.

        Args:
            dest: where the body of a successful response goes if its Content-Length is the views' size. Otherwise
                the body is kept in the response, and the views are untouched.
            cancel: breaks the request off.
            doubt: learns whether the service may have carried the request out although no answer says so.
            answers: gets the response, the last one being what the client's method had. The client's own hook for it
                (``raw_response_hook``) is forgotten once the connection broke and the request was made again.

        Raises:
            ServiceRequestError: no connection.
            ServiceResponseError, IncompleteReadError: the connection broke before the response was complete. The
                service may have carried the request out.
        """
        target = urllib.parse.urlsplit(request.url)
        way, connection, reused = self._connection(target)
        response = None
        while True:
            try:
                with contextlib.nullcontext() if cancel is None else cancel.holding(connection.sock):
                    response = self._exchange(connection, target, request)
                    body = responses.body(connection, response, dest)
                if doubt is not None and (response.status >= 500 or response.status == 408):
                    doubt.exists = True
                break
            except TimeoutError as error:
                connection.close()
                if doubt is not None:
                    doubt.exists = True
                raise ServiceResponseTimeoutError(_describe(error, target), error=error) from error
            except http.client.IncompleteRead as error:
                connection.close()
                if doubt is not None:
                    doubt.exists = True
                raise IncompleteReadError(_describe(error, target), error=error) from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if doubt is not None:
                    doubt.exists = True
                if not reused or response is not None or (cancel is not None and cancel.cancelled):
                    raise ServiceResponseError(_describe(error, target), error=error) from error
                # The server closed a connection that lay idle. That is no fault, so it does not count as an attempt.
                way, connection, reused = self._connection(target, fresh=True)
        if response.will_close or getattr(connection, "body_cut_short", False):
            connection.close()
        else:
            connections.give_back(way, connection)
        answer = _Response(request, response, body)
        if answers is not None:
            answers.append(answer)
        return answer

    def _exchange(
        self, connection: http.client.HTTPConnection, target: urllib.parse.SplitResult, request: HttpRequest
    ) -> http.client.HTTPResponse:
        """Send the request; return once the response's head has arrived."""
        connection.response_class = responses.Response
        path = urllib.parse.urlunsplit(("", "", target.path or "/", target.query, ""))
        absolute = getattr(connection, "absolute_target", None)
        connection.putrequest(
            request.method, f"{absolute}{path}" if absolute else path, skip_host=True, skip_accept_encoding=True
        )
        connection.putheader("Host", target.netloc)
        # azure-storage-blob before 12.23 sends requests of azure-core's older class.
        content = request.content if isinstance(request, HttpRequest) else request.data
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

    def _connection(
        self, target: urllib.parse.SplitResult, *, fresh: bool = False
    ) -> tuple[connections.Route, http.client.HTTPConnection, bool]:
        """A connection, the route that it takes, and whether it was used before."""
        try:
            way = self._routes.get((target.scheme, target.netloc))
            if way is None:
                way = connections.route(target.scheme, target.netloc, self._ca_file)
                self._routes[target.scheme, target.netloc] = way
            return (way, connections.connect(way), False) if fresh else (way, *connections.take(way))
        except TimeoutError as error:
            raise ServiceRequestTimeoutError(_describe(error, target), error=error) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServiceRequestError(_describe(error, target), error=error) from error


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
