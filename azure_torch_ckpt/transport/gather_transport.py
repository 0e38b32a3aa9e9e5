"""`GatherTransport`: sends request bodies from the caller's memory, and receives response bodies into it.

An ``azure-core`` transport over ``http.client``. A body may be a `Gather`: its views go to the socket unchanged. A
download may carry ``dest=Scatter(views)``: the body is received into them, and the response that the SDK sees is
empty. The SDK passes unknown keyword arguments on to ``HttpTransport.send``, which is how ``dest`` arrives here
(``azure.core.pipeline.Pipeline.run``: "**kwargs: transport or context specific options").
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
    AzureError,
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

_UNSET: Any = None


class _ReceivedResponse(HttpResponse):
    """A response whose body has arrived completely: in the caller's views, or here as `content`."""

    is_closed = True
    is_stream_consumed = True
    encoding: str | None = None
    # The SDK's own retry policy sets this to the endpoint that answered; the SDK's download reads it.
    location_mode = "primary"
    # Set for each response; as attributes of the class they replace the abstract properties of the base class.
    request: HttpRequest = _UNSET
    status_code: int = _UNSET
    headers: MutableMapping[str, str] = _UNSET
    reason: str = _UNSET
    url: str = _UNSET
    content: bytes = _UNSET

    def __init__(self, request: HttpRequest, response: http.client.HTTPResponse, body: bytes) -> None:
        self.request = request
        self.status_code = response.status
        self.reason = response.reason
        self.headers = case_insensitive_dict(response.headers.items())
        self.url = request.url
        self.content = body

    @property
    def content_type(self) -> str | None:
        return self.headers.get("content-type")

    def text(self, encoding: str | None = None) -> str:
        return self.content.decode(encoding or self.encoding or "utf-8-sig", errors="replace")

    def body(self) -> bytes:
        return self.content

    def json(self) -> Any:
        return json.loads(self.content)

    def raise_for_status(self) -> None:
        if self.status_code >= 400:
            raise HttpResponseError(response=self)

    def __enter__(self) -> _ReceivedResponse:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self) -> bytes:
        return self.content

    def iter_raw(self, **kwargs: Any) -> Iterator[bytes]:
        return _BodyStream(self)

    def iter_bytes(self, **kwargs: Any) -> Iterator[bytes]:
        return self.iter_raw()

    def stream_download(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
        return self.iter_raw()


class _BodyStream(Iterator[bytes]):
    """The iterator by which the SDK reads a body. The SDK reads the response and its length, and sets attributes.

    No ``__len__``: the SDK makes a list of the chunks, and `list` would reserve one item per byte.
    """

    def __init__(self, response: _ReceivedResponse) -> None:
        self.request = response.request
        self.response = response
        self.content_length = int(response.headers.get("content-length", 0))
        self._chunks = iter([response.content] if response.content else [])

    def __next__(self) -> bytes:
        return next(self._chunks)


class GatherTransport(HttpTransport[HttpRequest, HttpResponse]):
    """Sends requests over the process's connections (see `connections`). Any number of threads may use it.

    Args:
        ca_file: a PEM file of certificates to trust besides the platform's, for endpoints with a private CA.
    """

    def __init__(self, *, ca_file: str | None = None) -> None:
        self._ca_file = ca_file
        self._routes: dict[tuple[str, str], connections.Route] = {}

    def open(self) -> None:
        pass  # connections are made when a request needs one

    def close(self) -> None:
        pass  # all transports share the connections

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
            dest: receives the body of a successful response if its Content-Length is the views' size. Otherwise the
                response keeps the body, and the views are untouched.
            cancel: ends the request early.
            doubt: records whether the service may have carried the request out although no answer says so.
            answers: gets each response; the last one is the response that the client's method used. The client forgets
                its own hook for it (``raw_response_hook``) when the connection breaks and the request is sent again.

        Raises:
            ServiceRequestError: no connection.
            ServiceResponseError, IncompleteReadError: the connection broke before the response was complete. The
                service may have carried the request out.
        """
        target = urllib.parse.urlsplit(request.url)
        route, connection, reused = self._connection(target)
        response = None
        while True:
            try:
                with contextlib.nullcontext() if cancel is None else cancel.holding(connection.sock):
                    response = self._exchange(connection, target, request)
                    body = responses.receive_body(connection, response, dest)
                if doubt is not None and (response.status >= 500 or response.status == 408):
                    doubt.exists = True
                break
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if doubt is not None:
                    doubt.exists = True
                kind = _kind_of(error)
                cancelled = cancel is not None and cancel.cancelled
                if not reused or response is not None or cancelled or kind is not ServiceResponseError:
                    raise kind(_describe(error, target), error=error) from error
                # The server closed an idle connection. That is not a fault, so it does not count as an attempt.
                route, connection, reused = self._connection(target, fresh=True)
        if response.will_close or getattr(connection, "body_cut_short", False):
            connection.close()
        else:
            connections.give_back(route, connection)
        answer = _ReceivedResponse(request, response, body)
        if answers is not None:
            answers.append(answer)
        return answer

    def _exchange(
        self, connection: http.client.HTTPConnection, target: urllib.parse.SplitResult, request: HttpRequest
    ) -> http.client.HTTPResponse:
        """Send the request, and return when the response's head has arrived."""
        connection.response_class = responses.CompleteHeadResponse
        path = urllib.parse.urlunsplit(("", "", target.path or "/", target.query, ""))
        absolute = getattr(connection, "absolute_target", None)
        connection.putrequest(
            request.method, f"{absolute}{path}" if absolute else path, skip_host=True, skip_accept_encoding=True
        )
        connection.putheader("Host", target.netloc)
        # azure-storage-blob before 12.23 sends requests of azure-core's older class, which has no `content`.
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
            for view in _views(content):
                connection.send(view)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            # A server that refuses a request may answer and close before it has read the body. Its answer says why.
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
        """Return the route, a connection, and whether the connection was used before."""
        try:
            route = self._routes.get((target.scheme, target.netloc))
            if route is None:
                route = connections.find_route(target.scheme, target.netloc, self._ca_file)
                self._routes[target.scheme, target.netloc] = route
            return (route, connections.connect(route), False) if fresh else (route, *connections.take(route))
        except TimeoutError as error:
            raise ServiceRequestTimeoutError(_describe(error, target), error=error) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServiceRequestError(_describe(error, target), error=error) from error


def _views(content: Any) -> Iterator[memoryview | bytes]:
    if content is None:
        return
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, (bytes, bytearray, memoryview)):
        content = Gather([memoryview(content).cast("B")] if len(content) else [])
    elif hasattr(content, "read"):
        content = iter(lambda: content.read(SEND_SLICE), b"")
    yield from cast("Iterator[memoryview | bytes]", content)


def _kind_of(error: BaseException) -> type[AzureError]:
    if isinstance(error, TimeoutError):
        return ServiceResponseTimeoutError
    return IncompleteReadError if isinstance(error, http.client.IncompleteRead) else ServiceResponseError


def _describe(error: BaseException, target: urllib.parse.SplitResult) -> str:
    # The host only: the query may hold a SAS.
    return f"{target.scheme}://{target.netloc}: {type(error).__name__}: {error}"
