"""What the service does with ``x-ms-content-crc64`` and Azurite does not: compare it with the body that arrived.

    with CrcServer(azurite.endpoint) as server, FaultProxy(server.endpoint) as proxy:
        proxy.when("Put Block").do(Flip(1000, of="request"))
        ...
        assert server.refused == 1

It stands where the service stands, behind the `FaultProxy`. A block whose CRC64 is another one gets the answer of
https://learn.microsoft.com/rest/api/storageservices/put-block: 400 with the error code Crc64Mismatch. Everything else
goes on to the emulator.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from concurrent.futures import Future
from types import TracebackType
from urllib.parse import urlsplit

import awscrt.checksums  # type: ignore[import-untyped]

from tests.faults import exchange_of
from tests.wire import PIECE, HttpStream, is_chunked


class CrcServer:
    """See the module's docstring.

    Args:
        upstream: the emulator's endpoint, over plain HTTP.

    Attributes:
        checked: blocks that came with a CRC64, the refused ones included.
        unchecked: blocks that came without one.
        refused: blocks whose CRC64 was another one.
        checked_bytes: what the blocks of `checked` hold.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self.checked = self.unchecked = self.refused = self.checked_bytes = 0
        self._port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}{self._upstream.path}"

    def __enter__(self) -> CrcServer:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), name="crc-server", daemon=True)
        self._thread.start()
        started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _main(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=PIECE)
        except BaseException as error:
            started.set_exception(error)
            return
        self._port = listener.sockets[0].getsockname()[1]
        started.set_result(None)
        await self._stop.wait()
        listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = HttpStream(reader, writer)
        upstream: HttpStream | None = None
        try:
            upstream = HttpStream(
                *await asyncio.open_connection(self._upstream.hostname, self._upstream.port, limit=PIECE)
            )
            while True:
                await self._relay(client, upstream)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # one side went away, or the test is over
        finally:
            for side in (client, upstream):
                if side is not None:
                    side.end(reset=False)

    async def _relay(self, client: HttpStream, upstream: HttpStream) -> None:
        first, headers = await client.read_head()
        exchange = exchange_of(first, headers, 0)
        body = b"".join([piece async for piece in client.read_body(exchange.headers)])
        if exchange.kind == "Put Block" and not self._is_right(body, exchange.headers.get("x-ms-content-crc64")):
            await _refuse(client)
            return
        await upstream.send_head(" ".join(first), headers)
        if is_chunked(exchange.headers):
            await upstream.send_piece(body, True)
            await upstream.end_body(True)
        else:
            await upstream.send(body)
        first, headers = await upstream.read_head()
        answered = {name.lower(): value for name, value in headers}
        await client.send_head(" ".join(first), headers)
        if exchange.method == "HEAD" or int(first[1]) in (204, 304):
            return
        async for piece in upstream.read_body(answered):
            await client.send_piece(piece, is_chunked(answered))
        await client.end_body(is_chunked(answered))

    def _is_right(self, body: bytes, claimed: str | None) -> bool:
        if claimed is None:
            self.unchecked += 1
            return True
        self.checked += 1
        self.checked_bytes += len(body)
        # Not with the package's own functions, which are what is being tested.
        right = base64.b64encode(awscrt.checksums.crc64nvme(body).to_bytes(8, "little")).decode() == claimed
        self.refused += not right
        return right


async def _refuse(client: HttpStream) -> None:
    message = "The CRC64 value specified in the request did not match with the CRC64 value calculated by the server."
    body = f'<?xml version="1.0"?><Error><Code>Crc64Mismatch</Code><Message>{message}</Message></Error>'.encode()
    headers = [("x-ms-error-code", "Crc64Mismatch"), ("Content-Type", "application/xml")]
    await client.send_head("HTTP/1.1 400 Bad Request", [*headers, ("Content-Length", str(len(body)))])
    await client.send(body)
