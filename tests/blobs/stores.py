"""Stores of a test's own container, directly and through the fault proxy, and data for them.

The fixtures come by ``pytest_plugins``.
"""

from __future__ import annotations

import random
import struct
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport import connections

MIB = 1024 * 1024
KEY = Azurite.account_key
ODD_NAMES = [
    "a b",
    "sub folder/x y.pt",
    "ümläut/日本語/🙂",
    "100%",
    "%41",
    "a%2Fb",
    "a+b",
    "a#b",
    "a?b",
    "a&b=c;d,e",
    "'quotes\"",
    "epoch=1-step=200.ckpt",
    ".metadata",
    "x/.metadata",
    "tilde~!$()*[]{}|^`<>:@",
]


@pytest.fixture
def store(container: str) -> BlobStore:
    return BlobStore(BlobLocation.parse(container), Access(KEY))


@pytest.fixture
def proxied(proxied_container: str) -> BlobStore:
    return BlobStore(BlobLocation.parse(proxied_container), Access(KEY))


@pytest.fixture
def make_store(proxied_container: str) -> Callable[..., BlobStore]:
    def make(**options: Any) -> BlobStore:
        chosen = replace(TransferOptions(concurrency=4, retry_seconds=10), **options)
        return BlobStore(BlobLocation.parse(proxied_container), Access(options=chosen))

    return make


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for an answer longer than any test, so a test that does not cancel them waits for ever."""
    monkeypatch.setattr(connections, "IO_SECONDS", 3600.0)
    monkeypatch.setattr(connections, "TIMEVAL", struct.pack("ll", 3600, 0))


def read(store: BlobStore, path: str = "blob") -> bytes:
    return store.read(path, limit=1 << 30)[0]


def texts_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


def some_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def views_of(data: bytes, parts: int) -> list[memoryview]:
    cuts = [len(data) * number // parts for number in range(parts + 1)]
    return [memoryview(data)[start:end] for start, end in pairwise(cuts)]
