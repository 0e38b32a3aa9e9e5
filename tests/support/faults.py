"""The faults of the tests' proxy, and what it records of each request.

A fault happens at a point of an exchange: at ``"request"``, the proxy has the request's head and the service has seen
nothing of it; at ``"answer"``, the service has answered and the client has received nothing; at a number, the proxy has
sent so many bytes of the response's body (a reset may destroy the last of them on their way).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.support.wire import Headers, lowered

Kind: TypeAlias = Literal[
    "Put Block",
    "Put Block List",
    "Put Blob",
    "Copy Blob",
    "Get Blob",
    "Head",
    "List",
    "Delete",
    "Create Container",
    "Other",
]
At: TypeAlias = "Literal['request', 'answer'] | int"


@dataclass(slots=True)
class Exchange:
    """One request and its outcome. Header names are in lower case; times are ``time.monotonic()``."""

    kind: Kind
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    connection: int
    received_at: float
    body_length: int = 0
    status: int | None = None  # that was sent back; None before that, or if none was
    answered_at: float | None = None
    sent: int = 0  # bytes of the response's body
    finished_at: float | None = None


class Gate:
    """Stops exchanges until the test opens it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def open(self) -> None:
        with self._changed:
            self._open = True
            for loop, event in self._waiting:
                loop.call_soon_threadsafe(event.set)
            self._waiting = []

    def wait_for(self, count: int, seconds: float = 150) -> None:
        """Wait until `count` exchanges wait here.

        By default for longer than the 60 s after which a client sends a request again that got no answer.
        """
        with self._changed:
            came = self._changed.wait_for(lambda: len(self._waiting) >= count, seconds)
            assert came, f"{len(self._waiting)} of {count} requests came within {seconds} s"

    async def passed(self) -> None:
        event = asyncio.Event()
        with self._changed:
            if self._open:
                return
            self._waiting.append((asyncio.get_running_loop(), event))
            self._changed.notify_all()
        await event.wait()


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait for a gate (one that is never opened stalls for ever), or for seconds where time is the subject."""

    until: Gate | float = field(default_factory=Gate)
    at: At = "request"


@dataclass(frozen=True, slots=True)
class Cut:
    """End the connection: with a TCP reset, or in good order, so that a body is merely too short."""

    at: At
    reset: bool = True


@dataclass(frozen=True, slots=True)
class CutHead:
    """End the connection in good order when all but so many bytes of the head of the answer have gone back."""

    missing: int


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL a process and reset the connection: at ``"request"`` the service never sees the request."""

    pid: int
    at: At


@dataclass(frozen=True, slots=True)
class Call:
    """Call a function (in a thread: it may use the service itself) and go on when it returns."""

    function: Callable[[], object]
    at: At


@dataclass(frozen=True, slots=True)
class Flip:
    """Change one byte of a body on its way."""

    offset: int
    of: Literal["request", "response"] = "response"


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer in place of the service, which does not see the request.

    Attributes:
        code: ``x-ms-error-code``; also in the XML body.
        read_body: receive the request's body first. False answers at once and hangs up.
        body: sent as it is, and no header is added but its length. It comes in chunks if `headers` say so.
    """

    status: int
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    read_body: bool = True
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reframe:
    """Send the service's answer in another form: its body in chunks, or ``Connection: close`` and a real close."""

    chunked: bool = False
    close: bool = False


Action: TypeAlias = "Hold | Cut | CutHead | Kill | Call | Flip | Answer | Reframe"


@dataclass(slots=True)
class Rule:
    matches: Callable[[Exchange], bool]
    first: int
    times: int | None
    seen: int = 0
    actions: tuple[Action, ...] = ()

    def do(self, *actions: Action) -> None:
        self.actions = actions

    def actions_for(self, exchange: Exchange) -> tuple[Action, ...]:
        if not self.matches(exchange):
            return ()
        self.seen += 1
        late = self.times is not None and self.seen >= self.first + self.times
        return () if self.seen < self.first or late else self.actions


def exchange_of(first: list[str], headers: Headers, connection: int) -> Exchange:
    method, target = first[0], urlsplit(first[1])
    query = dict(parse_qsl(target.query, keep_blank_values=True))
    by_name = lowered(headers)
    kind = _kind(method, query, by_name)
    return Exchange(kind, method, unquote(target.path), query, by_name, connection, time.monotonic())


def _kind(method: str, query: dict[str, str], headers: dict[str, str]) -> Kind:
    comp, restype = query.get("comp"), query.get("restype")
    if method == "PUT" and comp == "block":
        return "Put Block"
    if method == "PUT" and comp == "blocklist":
        return "Put Block List"
    if method == "PUT" and restype == "container" and comp is None:
        return "Create Container"
    if method == "GET" and comp == "list":
        return "List"
    if comp is not None or restype is not None:
        return "Other"
    if method == "PUT":
        return "Copy Blob" if "x-ms-copy-source" in headers else "Put Blob"
    kinds: dict[str, Kind] = {"GET": "Get Blob", "HEAD": "Head", "DELETE": "Delete"}
    return kinds.get(method, "Other")
