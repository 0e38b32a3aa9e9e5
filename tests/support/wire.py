"""HTTP messages over an asyncio stream, in and out, for the tests' proxy."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from typing import TypeAlias

PIECE = 1024 * 1024
Headers: TypeAlias = "list[tuple[str, str]]"


def lowered(headers: Headers) -> dict[str, str]:
    return {name.lower(): value for name, value in headers}


def is_chunked(headers: dict[str, str]) -> bool:
    """Whether a body comes in chunks; `headers` have lower-case names."""
    return "chunked" in headers.get("transfer-encoding", "")


def head_of(first_line: str, headers: Headers) -> bytes:
    lines = [first_line, *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


class HttpStream:
    """One side of the proxy: HTTP messages in and out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        # `send` returns when the kernel has it all. Not 0: asyncio's TLS would pause at an empty buffer, for ever.
        writer.transport.set_write_buffer_limits(1)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def is_over(self) -> bool:
        return self._reader.at_eof() or self.writer.is_closing()

    async def read_head(self) -> tuple[list[str], Headers]:
        """The three parts of the first line, and the headers. EOFError where the connection ended before."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:-2])
        return lines[0].split(" ", 2), [(name, value.strip()) for name, _, value in pairs]

    async def read_body(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        if not is_chunked(headers):
            async for piece in self._read(int(headers.get("content-length", 0))):
                yield piece
            return
        while size := int((await self._reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            async for piece in self._read(size):
                yield piece
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)

    async def _read(self, left: int) -> AsyncIterator[bytes]:
        while left:
            piece = await self._reader.read(min(left, PIECE))
            if not piece:
                raise EOFError
            left -= len(piece)
            yield piece

    async def send(self, data: bytes | memoryview) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_head(self, first_line: str, headers: Headers) -> None:
        await self.send(head_of(first_line, headers))

    async def send_piece(self, piece: bytes | memoryview, chunked: bool) -> None:
        if not chunked:
            await self.send(piece)
        elif piece:  # an empty chunk would be the last
            await self.send(b"".join([b"%x\r\n" % len(piece), piece, b"\r\n"]))

    async def end_body(self, chunked: bool) -> None:
        if chunked:
            await self.send(b"0\r\n\r\n")

    def end(self, *, reset: bool) -> None:
        if self.writer.is_closing():
            return
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.writer.transport.abort()
        else:
            self.writer.close()
            # Over TLS that says good-bye and waits up to 30 s for the other side to say it too. Servers do not wait.
            asyncio.get_running_loop().call_later(0.05, self.writer.transport.abort)
