"""Token credentials that count and can be held up, locations, secrets; the clock that tokens see, as a fixture."""

from __future__ import annotations

import base64
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from azure.core.credentials import (
    AccessToken,
    AccessTokenInfo,
    AzureNamedKeyCredential,
    AzureSasCredential,
    TokenRequestOptions,
)

from azure_torch_ckpt._internal import shared_tokens
from azure_torch_ckpt._internal.shared_tokens import SharedTokens
from azure_torch_ckpt.location import BlobLocation

SCOPE = "https://storage.azure.com/.default"
SAS = "sv=2025-01-05&se=2026-12-31T00%3A00%3A00Z&sr=c&sp=rcwdl&sig=S3cr3tSignature%2Bab%2Fcd%3D"
KEY = base64.b64encode(bytes(range(64))).decode()
AZURE = BlobLocation.parse("https://acct.blob.core.windows.net/ckpt/run")
CUSTOM = BlobLocation.parse("https://data.example.org/ckpt/run")
EMULATOR = BlobLocation.parse("http://127.0.0.1:10000/devstoreaccount1/ckpt/run")
PLAIN = BlobLocation.parse("http://127.0.0.1:10000/acct/ckpt/run")
DEADLINE_S = 60.0


def now() -> float:
    """The time as `SharedTokens` sees it; see the fixture ``clock``."""
    return float(vars(shared_tokens)["time"].time())


class CountingCredential:
    """A ``TokenCredential`` of the old protocol that numbers its tokens."""

    def __init__(self, lifetime_s: float = 3600) -> None:
        self.lifetime_s = lifetime_s
        self.calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        self.calls.append((scopes, options))
        return AccessToken(f"token {len(self.calls)}", int(now() + self.lifetime_s))


class InfoCredential(CountingCredential):
    """The newer protocol, with a time to refresh at."""

    refresh_in_s = 600

    def get_token_info(self, *scopes: str, options: TokenRequestOptions | None = None) -> AccessTokenInfo:
        token = self.get_token(*scopes, **(options or {}))
        return AccessTokenInfo(token.token, token.expires_on, refresh_on=int(now() + self.refresh_in_s))


class GatedCredential(CountingCredential):
    """Fetches only while its gate is open; ``fetching`` is set while a thread fetches."""

    def __init__(self, lifetime_s: float = 3600) -> None:
        super().__init__(lifetime_s)
        self.gate = threading.Event()
        self.fetching = threading.Event()
        self.error: Exception | None = None

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        token = super().get_token(*scopes, **options)
        self.fetching.set()
        assert self.gate.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        return token


def named_key(value: object) -> tuple[str, str]:
    assert isinstance(value, AzureNamedKeyCredential)
    return value.named_key.name, value.named_key.key


def signature(value: object) -> str:
    assert isinstance(value, AzureSasCredential)
    return value.signature


def tokens(value: object) -> SharedTokens:
    assert isinstance(value, SharedTokens)
    return value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of `SharedTokens`, to be set by hand: an hour is too long for a test."""
    clock = SimpleNamespace(now=1_800_000_000.0)
    clock.time = lambda: clock.now
    monkeypatch.setattr(shared_tokens, "time", clock)
    return clock
