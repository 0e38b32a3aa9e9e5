"""A link of limited speed: what a connection to Blob Storage moves, on the way from a server on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import Future
from types import TracebackType
from urllib.parse import urlsplit

_PIECE = 256 * 1024
# How far a connection may lag behind and catch up: timers are late by a millisecond or so.
_LAG_SECONDS = 0.02


class SlowLink:
    """A TCP relay that gives no connection more than so many bytes of responses a second.

    Attributes:
        endpoint: the URL of what it leads to, by way of it.
    """

    def __init__(self, upstream: str, megabytes_per_second: float) -> None:
        self._upstream = urlsplit(upstream)
        self._speed = megabytes_per_second * 1e6

    def __enter__(self) -> SlowLink:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), daemon=True)
        self._thread.start()
        self._loop, self._ended, port = started.result()
        self.endpoint = f"http://127.0.0.1:{port}{self._upstream.path}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    async def _main(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]]) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1")
        ended = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), ended, server.sockets[0].getsockname()[1]))
        await ended.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_connection(self._upstream.hostname, self._upstream.port, limit=_PIECE)
        pumps = (self._pump(reader, upstream[1], None), self._pump(upstream[0], writer, self._speed))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*pumps)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, speed: float | None) -> None:
        free_at = 0.0
        with contextlib.suppress(ConnectionError):
            while piece := await source.read(_PIECE):
                if speed is not None:
                    free_at = max(free_at, time.monotonic() - _LAG_SECONDS) + len(piece) / speed
                    await asyncio.sleep(free_at - time.monotonic())
                target.write(piece)
                await target.drain()
        target.close()
