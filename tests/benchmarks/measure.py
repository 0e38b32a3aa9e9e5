"""What a stretch of this process costs: time, CPU time, peak memory, and what the server counted meanwhile."""

from __future__ import annotations

import gc
import http.client
import json
import resource
import ssl
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from tests.benchmarks.counting import HttpCounts
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

    Attributes:
        values: after the block: ``start``, ``end`` (seconds of the monotonic clock), ``cpu`` (user and system seconds
            of all threads), ``rss`` (bytes that the resident memory rose above its level before), and as far as
            they were counted ``requests``, ``moved`` (bytes of bodies, both ways), ``connections``.
    """

    def __init__(self, address: Address | None) -> None:
        self.values: dict[str, float] = {}
        self._control = control(address) if address is not None and address.counts else None
        self._own_counts = HttpCounts() if address is not None and not address.counts else None

    def __enter__(self) -> Meter:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
        self._rss = _status("VmRSS")
        self._counts = self._ask()
        self._cpu = _cpu_seconds()
        self._start = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic()
        self.values = {"start": self._start, "end": end, "cpu": _cpu_seconds() - self._cpu}
        self.values["rss"] = max(_status("VmHWM") - self._rss, 0)
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


def _status(field: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
