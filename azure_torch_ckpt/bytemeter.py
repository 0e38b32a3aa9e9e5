"""Progress of one process' work as two numbers: bytes done and bytes in all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from azure_torch_ckpt.progress import Meter, Progress

__all__ = ["ByteProgress", "byte_meter"]

ByteProgress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all: ten times a second at most, one call at a time, from any thread."""


def byte_meter(operation: str, url: str, total: int, progress: ByteProgress | None) -> Meter:
    """A `Meter` for `total` bytes that reports to `progress`."""
    if progress is None:
        return Meter(None, Progress(operation, url, 0, 0, total, 0.0))
    return Meter(lambda now: progress(now.done, now.total or 0), Progress(operation, url, 0, 0, total, 0.0))
