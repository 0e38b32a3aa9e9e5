"""A reverse proxy in front of the emulator that records every request and injects faults where a test says so.

    with FaultProxy(azurite.endpoint) as proxy:
        proxy.when("Put Block", nth=3).do(Cut("answer"))  # carried out, and the answer is lost
        proxy.when("Get Blob", times=2).do(Answer(503, "ServerBusy"))
        proxy.when(lambda seen: "__1_" in seen.path).do(Kill(pid, at="answer"))
        ...
        assert proxy.count("Put Block List") == 1

It runs in a thread of its own, relays bodies as they arrive, and keeps one connection to the emulator for each client.
The faults are in `tests/support/faults.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tests.support.faults import (
    Action,
    Answer,
    At,
    Call,
    Cut,
    CutHead,
    Exchange,
    Flip,
    Gate,
    Hold,
    Kill,
    Kind,
    Reframe,
    Rule,
    exchange_of,
)
from tests.support.wire import PIECE, Headers, HttpStream, head_of, is_chunked, lowered

_T = TypeVar("_T")


class FaultProxy:
    """See the module's docstring.

    Args:
        upstream: the emulator's endpoint, `Azurite.endpoint`. A certificate there is not checked.
        tls: PEM files of the certificate and the key to serve HTTPS with.
        host: where to listen.

    Attributes:
        log: every request, in the order of arrival.
        connections: how many were accepted.
        in_flight: requests that have come and are not finished; `most_in_flight` is the highest number so far. A client
            may have its answer a moment before the request counts as finished: `wait_until` waits for that.
        max_in_flight: requests above this number are answered with 503 ServerBusy.
    """

    def __init__(self, upstream: str, tls: tuple[Path, Path] | None = None, host: str = "127.0.0.1") -> None:
        self._upstream = urlsplit(upstream)
        self._host = host
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*tls)
        self._to_upstream: ssl.SSLContext | None = None
        if self._upstream.scheme == "https":
            self._to_upstream = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._to_upstream.check_hostname = False
            self._to_upstream.verify_mode = ssl.CERT_NONE
        self.log: list[Exchange] = []
        self.connections = self.in_flight = self.most_in_flight = 0
        self.max_in_flight: int | None = None
        self._rules: list[Rule] = []
        self._serving: set[asyncio.Task[None]] = set()
        self._sockets: weakref.WeakKeyDictionary[asyncio.WriteTransport, Any] = weakref.WeakKeyDictionary()
        self.idle: set[HttpStream] = set()
        self._changed = threading.Condition()
        self._bug: BaseException | None = None
        # Bound from beginning to end, so that no other process gets the port while connections are refused.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._kept = socket.socket(family, socket.SOCK_STREAM)
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind((host, 0))
        self._port = self._kept.getsockname()[1]

    # What a test uses

    @property
    def endpoint(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self._port}{self._upstream.path}"

    def through(self, url: str) -> str:
        """The URL that leads through this proxy to where `url` leads without it, to the same emulator."""
        return self.endpoint + url.partition(self._upstream.path)[2]

    def when(self, what: Kind | Callable[[Exchange], bool], *, nth: int = 1, times: int | None = 1) -> Rule:
        """A rule for the `nth` request of a kind from now on, and for as many as `times` says (None: all) from there.

        Where several rules fit a request, the actions of all of them are carried out.
        """
        rule = Rule(what if callable(what) else lambda exchange: exchange.kind == what, nth, times)
        self._rules.append(rule)
        return rule

    def requests(self, *kinds: Kind) -> list[Exchange]:
        return [exchange for exchange in list(self.log) if not kinds or exchange.kind in kinds]

    def count(self, *kinds: Kind) -> int:
        return len(self.requests(*kinds))

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until `condition`, which looks at this proxy, holds."""
        with self._changed:
            assert self._changed.wait_for(condition, seconds), f"not within {seconds} s; the log: {self.log[-5:]}"

    def refuse(self) -> None:
        """Let connections be refused from now on. Those that exist stay."""
        self._run(self._close_listener())

    def accept(self) -> None:
        """Undo `refuse`."""
        self._run(self._listen())

    def close_idle(self) -> int:
        """Close the connections without a request, as a server does after some time; return how many."""
        return self._run(self._close_idle())

    def __enter__(self) -> FaultProxy:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), name="proxy", daemon=True)
        self._thread.start()
        started.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._kept.close()
        if self._bug is not None:
            raise self._bug

    # In the proxy's thread

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _main(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            await self._listen()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        await self._stop.wait()
        await self._close_listener()
        await asyncio.sleep(0)  # connections that were accepted just now begin, and end, with `_stop` set
        while self._serving:
            for task in self._serving:
                task.cancel()
            await asyncio.wait(self._serving)
        # The loop would not close what is open when it ends.
        sockets = list(self._sockets.values())
        for transport in list(self._sockets):
            transport.abort()
        while any(sock.fileno() >= 0 for sock in sockets):
            await asyncio.sleep(0)

    async def _listen(self) -> None:
        """As `asyncio.start_server`, which loses what it has accepted when it is closed in that moment."""
        self._listener = socket.socket(self._kept.family)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((self._host, self._port))
        self._listener.listen(1024)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._serve(connection))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _close_listener(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def _close_idle(self) -> int:
        clients = list(self.idle)
        for client in clients:
            client.end(reset=False)
        await asyncio.sleep(0)  # the loop closes the sockets
        return len(clients)

    async def _serve(self, accepted: socket.socket) -> None:
        if self._stop.is_set():
            accepted.close()
            return
        reader = asyncio.StreamReader(limit=PIECE)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, accepted, ssl=self._tls)
        except (OSError, asyncio.CancelledError):
            return  # a handshake that failed, or that the end of the proxy found under way
        stream = self._noted(HttpStream(reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)))
        self.connections += 1
        connection = _Connection(self, self.connections, stream)
        try:
            await connection.serve()
        except (OSError, EOFError):
            connection.end(reset=True)  # one side went away: so does the other
        except asyncio.CancelledError:
            pass  # the proxy stops; asyncio.streams would print a traceback for each connection
        except Exception as error:
            self._bug = self._bug or error
        finally:
            connection.end(reset=False)

    async def connect(self) -> HttpStream:
        return self._noted(
            HttpStream(
                *await asyncio.open_connection(
                    self._upstream.hostname, self._upstream.port, ssl=self._to_upstream, limit=PIECE
                )
            )
        )

    def _noted(self, stream: HttpStream) -> HttpStream:
        self._sockets[stream.writer.transport] = stream.writer.get_extra_info("socket")
        return stream

    def begin(self, exchange: Exchange) -> tuple[Action, ...]:
        """Record a request; return the actions for it."""
        with self._changed:
            self.log.append(exchange)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self._changed.notify_all()
        actions = tuple(action for rule in self._rules for action in rule.actions_for(exchange))
        if self.max_in_flight is not None and self.in_flight > self.max_in_flight:
            return (*actions, Answer(503, "ServerBusy"))
        return actions

    def finish(self, exchange: Exchange) -> None:
        with self._changed:
            exchange.finished_at = time.monotonic()
            self.in_flight -= 1
            self._changed.notify_all()


def meet(proxy: FaultProxy, count: int, what: Kind | Callable[[Exchange], bool]) -> None:
    """Hold the next `count` requests of a kind until all of them have arrived: fewer at a time hang."""
    gate = Gate()
    proxy.when(what, times=count - 1).do(Hold(gate))
    proxy.when(what, nth=count).do(Call(gate.open, "request"))


class _CutError(Exception):
    def __init__(self, reset: bool) -> None:
        self.reset = reset


class _Connection:
    """One client and, once it has asked for something, the connection to the emulator that is kept for it."""

    def __init__(self, proxy: FaultProxy, number: int, client: HttpStream) -> None:
        self._proxy = proxy
        self._number = number
        self._client = client
        self._upstream: HttpStream | None = None

    def end(self, *, reset: bool) -> None:
        self._client.end(reset=reset)
        if self._upstream is not None:
            self._upstream.end(reset=reset)

    async def serve(self) -> None:
        keep_alive = True
        while keep_alive:
            self._proxy.idle.add(self._client)
            try:
                first, headers = await self._client.read_head()
            finally:
                self._proxy.idle.discard(self._client)
            exchange = exchange_of(first, headers, self._number)
            actions = self._proxy.begin(exchange)
            try:
                keep_alive = await self._carry_out(exchange, actions, first, headers)
            except _CutError as cut:
                self.end(reset=cut.reset)
                keep_alive = False
            finally:
                self._proxy.finish(exchange)

    async def _carry_out(
        self, exchange: Exchange, actions: Sequence[Action], first: list[str], headers: Headers
    ) -> bool:
        """Whether the connection can be used again."""
        await _reach("request", actions)
        for action in actions:
            if isinstance(action, Answer):
                return await self._answer(exchange, action)
        if self._upstream is None or self._upstream.is_over:
            self._upstream = await self._proxy.connect()
        await self._upstream.send_head(" ".join(first), headers)
        flips = [action.offset for action in actions if isinstance(action, Flip) and action.of == "request"]
        chunked = is_chunked(exchange.headers)
        async for piece in self._client.read_body(exchange.headers):
            await self._upstream.send_piece(_flipped(piece, exchange.body_length, flips), chunked)
            exchange.body_length += len(piece)
        await self._upstream.end_body(chunked)

        first, headers = await self._upstream.read_head()
        exchange.status, exchange.answered_at = int(first[1]), time.monotonic()
        await _reach("answer", actions)
        await self._relay_answer(self._upstream, exchange, actions, first, headers)
        return not any(isinstance(action, Reframe) and action.close for action in actions) and not any(
            lowered(sent).get("connection") == "close" for sent in (headers, list(exchange.headers.items()))
        )

    async def _relay_answer(
        self,
        upstream: HttpStream,
        exchange: Exchange,
        actions: Sequence[Action],
        first: list[str],
        headers: Headers,
    ) -> None:
        came = lowered(headers)
        chunked = is_chunked(came)
        for action in actions:
            if isinstance(action, Reframe) and action.chunked:
                headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
                headers.append(("Transfer-Encoding", "chunked"))
                chunked = True
            if isinstance(action, Reframe) and action.close:
                headers = [(name, value) for name, value in headers if name.lower() not in ("connection", "keep-alive")]
                headers.append(("Connection", "close"))
            if isinstance(action, CutHead):
                await self._client.send(head_of(" ".join(first), headers)[: -action.missing])
                raise _CutError(reset=False)
        await self._client.send_head(" ".join(first), headers)
        if exchange.method == "HEAD" or exchange.status in (204, 304):
            return
        flips = [action.offset for action in actions if isinstance(action, Flip) and action.of == "response"]
        points = sorted({at for action in actions if isinstance(at := getattr(action, "at", None), int)})
        async for piece in upstream.read_body(came):
            view = memoryview(_flipped(piece, exchange.sent, flips))
            while points and points[0] <= exchange.sent + len(view):
                head, view = view[: points[0] - exchange.sent], view[points[0] - exchange.sent :]
                exchange.sent = points[0]
                await self._client.send_piece(head, chunked)
                await _reach(points.pop(0), actions)
            exchange.sent += len(view)  # before the client can have them and look
            await self._client.send_piece(view, chunked)
        await self._client.end_body(chunked)

    async def _answer(self, exchange: Exchange, answer: Answer) -> bool:
        if answer.read_body:
            async for piece in self._client.read_body(exchange.headers):
                exchange.body_length += len(piece)
        body, headers = answer.body, list(answer.headers.items())
        if body is None:
            body = f'<?xml version="1.0"?><Error><Code>{answer.code}</Code><Message>As told.</Message></Error>'.encode()
            headers = [("x-ms-error-code", str(answer.code)), ("Content-Type", "application/xml"), *headers]
        chunked = is_chunked(lowered(headers))
        if not chunked and "content-length" not in lowered(headers):
            headers.append(("Content-Length", str(len(body))))
        if not answer.read_body:
            headers.append(("Connection", "close"))
        exchange.status, exchange.answered_at = answer.status, time.monotonic()
        await self._client.send_head(f"HTTP/1.1 {answer.status} As told", headers)
        if exchange.method != "HEAD":
            exchange.sent = len(body)
            await self._client.send_piece(body, chunked)
            await self._client.end_body(chunked)
        return answer.read_body and lowered(headers).get("connection") != "close"


async def _reach(point: At, actions: Sequence[Action]) -> None:
    for action in actions:
        if isinstance(action, (Answer, CutHead, Flip, Reframe)) or action.at != point:
            continue
        if isinstance(action, Hold):
            await (asyncio.sleep(action.until) if isinstance(action.until, (int, float)) else action.until.passed())
        elif isinstance(action, Call):
            await asyncio.to_thread(action.function)
        elif isinstance(action, Cut):
            raise _CutError(action.reset)
        elif isinstance(action, Kill):
            os.kill(action.pid, signal.SIGKILL)
            raise _CutError(reset=True)


def _flipped(piece: bytes, start: int, offsets: Sequence[int]) -> bytes:
    for offset in offsets:
        if start <= offset < start + len(piece):
            changed = bytearray(piece)
            changed[offset - start] ^= 0xFF
            piece = bytes(changed)
    return piece
