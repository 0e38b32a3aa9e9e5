"""The cost of a ``with`` block: time, CPU time, peak memory, requests and bytes."""

from __future__ import annotations

import gc
import http.client
import json
import resource
import socket
import ssl
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tests.benchmarks.spec import Address

_COUNTS = ("requests", "bytes_in", "bytes_out", "conns")


def control(address: Address) -> http.client.HTTPConnection:
    """A connection to the server for its ``/__`` commands, opened."""
    parts = urlsplit(address.account)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=address.ca_file)
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, context=context)
    connection.connect()
    return connection


def ask(connection: http.client.HTTPConnection, command: str) -> dict[str, float]:
    connection.request("GET", command)
    answer: dict[str, float] = json.loads(connection.getresponse().read())
    return answer


class Meter:
    """Measures its ``with`` block.

    Args:
        address: the server that is asked for its counts, which are of all clients together; where it keeps none, this
            process counts for itself. None counts nothing.
        collect: whether garbage is collected first, which takes seconds in a process with millions of objects.

    Attributes:
        values: after the block: ``start``, ``end`` (seconds of the monotonic clock), ``cpu`` (user and system seconds
            of all threads), ``rss`` (bytes that the resident memory rose above its level before), and as far as
            they were counted ``requests``, ``moved`` (bytes of bodies, both ways), ``connections``.
    """

    def __init__(self, address: Address | None, *, collect: bool = True) -> None:
        self.values: dict[str, float] = {}
        self._collect = collect
        self._control = control(address) if address is not None and address.counts else None
        self._own_counts = HttpCounts() if address is not None and not address.counts else None

    def __enter__(self) -> Meter:
        if self._collect:
            gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
        self._rss = process_memory("VmRSS")
        self._counts = self._ask()
        self._cpu = _cpu_seconds()
        self._start = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic()
        self.values = {"start": self._start, "end": end, "cpu": _cpu_seconds() - self._cpu}
        self.values["rss"] = max(process_memory("VmHWM") - self._rss, 0)
        counts = self._ask()
        if counts:
            requests, sent, received, connections = (counts[name] - self._counts[name] for name in _COUNTS)
            seen = {"requests": requests, "moved": sent + received, "connections": connections}
            # Own counts do not see everything; at a server no case needs none.
            self.values |= {name: number for name, number in seen.items() if number}
        if self._control is not None:
            self._control.close()

    def _ask(self) -> dict[str, float]:
        if self._control is not None:
            return ask(self._control, "/__stats")
        return self._own_counts.now() if self._own_counts is not None else {}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def process_memory(field: str) -> int:
    """A field of /proc/self/status that is given in kB (``VmRSS``, ``VmHWM``), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


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
