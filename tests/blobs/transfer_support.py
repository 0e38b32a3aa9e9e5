"""What the tests of uploads and downloads have in common. Its fixtures come by ``pytest_plugins``."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport import connections

MIB = 1024 * 1024


@pytest.fixture
def make_store(proxied_container: str) -> Callable[..., BlobStore]:
    def make(**options: Any) -> BlobStore:
        chosen = replace(TransferOptions(concurrency=4, retry_seconds=10), **options)
        return BlobStore(BlobLocation.parse(proxied_container), Access(options=chosen))

    return make


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for an answer for longer than any test: who does not break them off waits for ever."""
    monkeypatch.setattr(connections, "IO_SECONDS", 3600.0)
    monkeypatch.setattr(connections, "TIMEVAL", struct.pack("ll", 3600, 0))


def some_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def views_of(data: bytes, parts: int) -> list[memoryview]:
    cuts = [len(data) * number // parts for number in range(parts + 1)]
    return [memoryview(data)[start:end] for start, end in pairwise(cuts)]


def stored(store: BlobStore, path: str = "blob") -> bytes:
    return store.read(path, limit=1 << 30)[0]
