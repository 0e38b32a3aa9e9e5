"""What a request carries besides its headers: memory to send, memory to receive into, `Cancel` and `Doubt`."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence

__all__ = ["SEND_SLICE", "Cancel", "Doubt", "Gather", "Scatter"]

# Smaller views are joined before they are sent: a system call for each would cost more than the copy.
_JOIN_BELOW = 96 * 1024
_JOINED = 512 * 1024
SEND_SLICE = 1024 * 1024
"""``sendall`` applies its time-out to the whole buffer, so it gets slices of this size (bytes)."""


class Gather:
    """A request body made of views anywhere in memory.

    It has a length and can be iterated again for each attempt, as the SDK's retries need. Small neighbours are joined.

    Args:
        views: one-dimensional byte views, sent one after the other. They must not change until the request returns.
    """

    __slots__ = ("_size", "_views")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self._size = sum(view.nbytes for view in views)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview | bytes]:
        small: list[memoryview] = []
        waiting = 0
        for view in self._views:
            if view.nbytes < _JOIN_BELOW:
                small.append(view)
                waiting += view.nbytes
                if waiting < _JOINED:
                    continue
                view = memoryview(b"".join(small))
            elif small:
                yield b"".join(small)
            small, waiting = [], 0
            for start in range(0, view.nbytes, SEND_SLICE):
                yield view[start : start + SEND_SLICE]
        if small:
            yield b"".join(small)


class Scatter:
    """The destination of a successful response's body: views anywhere in memory.

    Args:
        views: writable one-dimensional byte views, filled one after the other.

    Attributes:
        received: whether the body is in the views. False after a response of another length, which leaves the views
            untouched, and where the SDK did not pass the keyword on.
    """

    __slots__ = ("received", "size", "views")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.views = views
        self.size = sum(view.nbytes for view in views)
        self.received = False


class Doubt:
    """Records whether an attempt of the request that carries it (``doubt=``) may have been carried out without answer.

    Attributes:
        exists: whether an attempt had no answer, or one that leaves it open (408, 5xx).
    """

    __slots__ = ("exists",)

    def __init__(self) -> None:
        self.exists = False


class Cancel:
    """Ends the requests that carry it (``cancel=``) at once and for good. Any thread may cancel."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()
        with self._lock:
            for sock in self._sockets:
                # Not SSLSocket.shutdown: it would remove the TLS state that another thread is using.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        """Sleep for some seconds, or until `cancel`."""
        self._cancelled.wait(seconds)

    @contextlib.contextmanager
    def holding(self, sock: socket.socket) -> Iterator[None]:
        """While the block lasts, `cancel` shuts `sock` down."""
        with self._lock:
            self._sockets.add(sock)
        try:
            if self.cancelled:
                raise ConnectionAbortedError("cancelled")
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)
