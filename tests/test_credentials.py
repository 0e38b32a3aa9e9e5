"""Every kind of ``credential=`` against the one rule, and the tokens that a process shares."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from azure.core.credentials import (
    AccessToken,
    AccessTokenInfo,
    AzureKeyCredential,
    AzureNamedKeyCredential,
    AzureSasCredential,
    TokenRequestOptions,
)
from azure.identity import ClientSecretCredential, DefaultAzureCredential
from azure.identity.aio import DefaultAzureCredential as AsyncDefaultAzureCredential
from azure.storage.blob import BlobServiceClient
from hypothesis import given, settings
from hypothesis import strategies as st

import azure_torch_ckpt.credentials
from azure_torch_ckpt.credentials import EMULATOR_ACCOUNT_KEY, PickledCredential, SharedTokens, resolve
from azure_torch_ckpt.errors import CredentialError
from azure_torch_ckpt.location import BlobLocation

SCOPE = "https://storage.azure.com/.default"
SAS = "sv=2025-01-05&se=2026-12-31T00%3A00%3A00Z&sr=c&sp=rcwdl&sig=S3cr3tSignature%2Bab%2Fcd%3D"
KEY = base64.b64encode(bytes(range(64))).decode()
AZURE = BlobLocation.parse("https://acct.blob.core.windows.net/ckpt/run")
CUSTOM = BlobLocation.parse("https://data.example.org/ckpt/run")
EMULATOR = BlobLocation.parse("http://127.0.0.1:10000/devstoreaccount1/ckpt/run")
PLAIN = BlobLocation.parse("http://127.0.0.1:10000/acct/ckpt/run")
DEADLINE_S = 30.0


def now() -> float:
    """The time as credentials.py sees it; see the fixture ``clock``."""
    return float(vars(azure_torch_ckpt.credentials)["time"].time())


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
    """Fetches only while its gate is open; ``fetching`` tells that somebody is inside."""

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
    """The clock of credentials.py, to be set by hand: an hour is too long for a test."""
    clock = SimpleNamespace(now=1_800_000_000.0)
    clock.time = lambda: clock.now
    monkeypatch.setattr(azure_torch_ckpt.credentials, "time", clock)
    return clock


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credential", [None, False, KEY, AzureNamedKeyCredential("other", KEY), CountingCredential()])
@pytest.mark.parametrize("location", [AZURE, CUSTOM, EMULATOR, PLAIN], ids=lambda location: location.endpoint)
def test_a_sas_in_the_url_wins(location: BlobLocation, credential: Any) -> None:
    with_sas = BlobLocation.parse(f"{location}?{SAS}")
    assert signature(resolve(with_sas, credential)) == SAS


@pytest.mark.parametrize("location", [AZURE, CUSTOM, EMULATOR, PLAIN], ids=lambda location: location.endpoint)
def test_false_is_anonymous(location: BlobLocation) -> None:
    assert resolve(location, False) is None


def test_none_is_the_published_key_on_the_emulator() -> None:
    assert named_key(resolve(EMULATOR)) == ("devstoreaccount1", EMULATOR_ACCOUNT_KEY)


def test_none_is_one_shared_credential_elsewhere() -> None:
    other = BlobLocation.parse("https://other.blob.core.windows.net/ckpt")
    assert tokens(resolve(AZURE)) is resolve(other) is resolve(CUSTOM)


@pytest.mark.parametrize("location", [AZURE, EMULATOR, PLAIN], ids=lambda location: location.endpoint)
def test_an_account_key_belongs_to_the_account_of_the_url(location: BlobLocation) -> None:
    assert named_key(resolve(location, KEY)) == (location.account, KEY)
    assert named_key(resolve(location, KEY + "\n")) == (location.account, KEY)


def test_an_account_key_alone_is_refused_where_the_url_does_not_name_the_account() -> None:
    with pytest.raises(CredentialError, match=r"AzureNamedKeyCredential\(ACCOUNT, KEY\)"):
        resolve(CUSTOM, KEY)


@pytest.mark.parametrize("key", ["", "hello", "None", "not base64 at all!", KEY[:-1], KEY + "é"])
def test_text_that_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(CredentialError, match="no account key"):
        resolve(AZURE, key)


@pytest.mark.parametrize("sas", [SAS, "?" + SAS, f" {SAS}\n", "sig=abc&sv=1"])
def test_a_sas_token_as_text(sas: str) -> None:
    assert signature(resolve(AZURE, sas)) == sas.strip().removeprefix("?")


@pytest.mark.parametrize("sas", ["?sv=1&sig=", "sv=1&sig=a b", "sv=1&sig=a\tb", "sv=1&sig=é"])
def test_a_broken_sas_is_refused(sas: str) -> None:
    for credential in (sas, AzureSasCredential(sas)):
        with pytest.raises(CredentialError, match="no shared access signature"):
            resolve(AZURE, credential)


def test_a_url_as_the_credential_is_refused() -> None:
    with pytest.raises(CredentialError, match="is a URL"):
        resolve(AZURE, f"https://acct.blob.core.windows.net/ckpt?{SAS}")


@pytest.mark.parametrize(
    "text",
    [
        f"DefaultEndpointsProtocol=https;AccountName=acct;AccountKey={KEY};EndpointSuffix=core.windows.net",
        f"AccountName=acct;AccountKey={KEY};",
        f"accountkey={KEY}; accountname=acct",
        f"BlobEndpoint=https://data.example.org/;AccountName=acct;AccountKey={KEY}",
    ],
)
def test_a_connection_string_with_a_key(text: str) -> None:
    assert named_key(resolve(AZURE, text)) == ("acct", KEY)
    assert named_key(resolve(CUSTOM, text)) == ("acct", KEY)


@pytest.mark.parametrize(
    ("location", "endpoint"),
    [
        (AZURE, "https://acct.blob.core.windows.net/"),
        (AZURE, "https://acct-secondary.blob.core.windows.net"),
        (CUSTOM, "https://data.example.org/"),
        (EMULATOR, "http://127.0.0.1:10000/devstoreaccount1"),
    ],
)
def test_a_connection_string_with_a_sas(location: BlobLocation, endpoint: str) -> None:
    assert signature(resolve(location, f"BlobEndpoint={endpoint};SharedAccessSignature=?{SAS}")) == SAS


def test_a_connection_string_with_account_and_sas() -> None:
    assert signature(resolve(AZURE, f"AccountName=acct;SharedAccessSignature={SAS}")) == SAS


@pytest.mark.parametrize(
    ("location", "text", "says"),
    [
        (AZURE, f"AccountName=other;AccountKey={KEY}", "for the account 'other'"),
        (AZURE, f"AccountName={KEY};AccountKey=acct", "no account name"),
        (AZURE, f"BlobEndpoint=https://other.blob.core.windows.net;SharedAccessSignature={SAS}", "another place"),
        (CUSTOM, f"BlobEndpoint=https://evil.example.org;SharedAccessSignature={SAS}", "another place"),
        (AZURE, f"BlobEndpoint=nowhere;SharedAccessSignature={SAS}", "no URL of Blob Storage"),
        (AZURE, f"SharedAccessSignature={SAS}", "neither AccountName nor BlobEndpoint"),
        (AZURE, f"AccountKey={KEY}", "neither AccountName nor BlobEndpoint"),
        (AZURE, "AccountName=acct", "neither AccountName and AccountKey nor SharedAccessSignature"),
        (AZURE, "AccountName=acct;AccountKey=hello", "no account key"),
        (AZURE, "AccountName=acct;SharedAccessSignature=hello", "no shared access signature"),
        (AZURE, f"AccountName=acct;{KEY.rstrip('=')}", "malformed"),
        (AZURE, "UseDevelopmentStorage=true", "is the emulator"),
        (PLAIN, "UseDevelopmentStorage=true", "is the emulator"),
    ],
)
def test_a_connection_string_that_is_refused(location: BlobLocation, text: str, says: str) -> None:
    with pytest.raises(CredentialError) as caught:
        resolve(location, text)
    assert says in str(caught.value)
    assert KEY.rstrip("=") not in str(caught.value) and "Signature%2B" not in str(caught.value)


def test_the_development_connection_string() -> None:
    assert named_key(resolve(EMULATOR, "UseDevelopmentStorage=true;")) == ("devstoreaccount1", EMULATOR_ACCOUNT_KEY)


def test_key_and_sas_objects_are_taken_as_they_are_so_that_update_works() -> None:
    key, sas = AzureNamedKeyCredential("acct", KEY), AzureSasCredential("?" + SAS)
    assert resolve(AZURE, key) is key
    assert resolve(AZURE, sas) is sas


def test_a_named_key_of_another_account_is_refused_unless_the_url_names_none() -> None:
    for name in ("other", KEY):
        with pytest.raises(CredentialError) as caught:
            resolve(AZURE, AzureNamedKeyCredential(name, KEY))
        assert "Pass this account's credential" in str(caught.value) and KEY not in str(caught.value)
    assert named_key(resolve(CUSTOM, AzureNamedKeyCredential("other", KEY))) == ("other", KEY)


@pytest.mark.parametrize("credential", [None, CountingCredential(), InfoCredential(), DefaultAzureCredential()])
@pytest.mark.parametrize("location", [PLAIN, BlobLocation.parse("http://data.example.org/ckpt")], ids=["path", "host"])
def test_no_token_over_plain_http(location: BlobLocation, credential: Any) -> None:
    with pytest.raises(CredentialError, match="plain HTTP"):
        resolve(location, credential)


def test_no_token_over_plain_http_to_the_emulator_either() -> None:
    credential = CountingCredential()
    for given_credential in (credential, resolve(AZURE, credential)):
        with pytest.raises(CredentialError, match="plain HTTP"):
            resolve(EMULATOR, given_credential)


@pytest.mark.parametrize(
    "credential",
    [
        True,
        0,
        b"key",
        {"account_name": "acct", "account_key": KEY},
        AzureKeyCredential(KEY),
        DefaultAzureCredential,
        object(),
    ],
    ids=lambda credential: type(credential).__name__,
)
def test_other_types_are_refused(credential: Any) -> None:
    with pytest.raises(CredentialError, match="Pass None"):
        resolve(AZURE, credential)


def test_an_asynchronous_credential_is_refused() -> None:
    with pytest.raises(CredentialError, match=r"azure\.identity\.aio"):
        resolve(AZURE, AsyncDefaultAzureCredential())  # type: ignore[arg-type]


@pytest.mark.parametrize("location", [AZURE, CUSTOM, EMULATOR], ids=lambda location: location.endpoint)
@pytest.mark.parametrize("credential", [None, False, f"AccountName=devstoreaccount1;AccountKey={KEY}", SAS])
def test_the_sdk_takes_what_we_resolve(location: BlobLocation, credential: Any) -> None:
    if location is AZURE and isinstance(credential, str):
        credential = credential.replace("devstoreaccount1", "acct")
    client = BlobServiceClient(location.endpoint, credential=resolve(location, credential))
    assert client.url.rstrip("/") == location.endpoint


# --- shared tokens ----------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        pause.wait(0.001)


def waiting_for_the_token() -> int:
    """How many threads stand at the lock of TokenCache.token (or hold it)."""
    return sum(
        frame.f_code is azure_torch_ckpt.credentials.TokenCache.token.__code__ and "lock" in frame.f_locals
        for top in sys._current_frames().values()
        for frame in frames(top)
    )


def frames(top: Any) -> Iterator[Any]:
    while top is not None:
        yield top
        top = top.f_back


def ask_in_8_threads(credential: GatedCredential) -> list[Any]:
    """What 8 threads with a client each get if all of them ask before the first answer."""
    barrier = threading.Barrier(8)

    def ask() -> Any:
        shared = tokens(resolve(AZURE, credential))
        barrier.wait(DEADLINE_S)
        try:
            return shared.get_token(SCOPE).token
        except Exception as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask) for _ in range(8)]
        try:
            wait_until(lambda: waiting_for_the_token() == 8)
        finally:
            credential.gate.set()
        return [answer.result(DEADLINE_S) for answer in answers]


def test_8_threads_fetch_one_token() -> None:
    credential = GatedCredential()
    assert ask_in_8_threads(credential) == ["token 1"] * 8
    assert len(credential.calls) == 1


def test_8_threads_share_one_failure_and_the_next_asks_again() -> None:
    credential = GatedCredential()
    credential.error = RuntimeError("no identity here")
    assert ask_in_8_threads(credential) == [credential.error] * 8
    assert len(credential.calls) == 1
    credential.error = None
    assert tokens(resolve(AZURE, credential)).get_token(SCOPE).token == "token 2"


def test_a_refresh_does_not_hold_up_the_others(clock: SimpleNamespace) -> None:
    credential = GatedCredential()
    shared = tokens(resolve(AZURE, credential))
    credential.gate.set()
    shared.get_token(SCOPE)
    credential.gate.clear()
    credential.fetching.clear()
    clock.now += 3600 - 200
    with ThreadPoolExecutor(1) as pool:
        refresh = pool.submit(shared.get_token, SCOPE)
        try:
            assert credential.fetching.wait(DEADLINE_S)
            assert shared.get_token(SCOPE).token == "token 1"
        finally:
            credential.gate.set()
        assert refresh.result(DEADLINE_S).token == "token 2"
    assert shared.get_token(SCOPE).token == "token 2"


def test_the_same_object_shares_its_tokens_and_another_does_not() -> None:
    first, second = CountingCredential(), CountingCredential()
    for location in (AZURE, CUSTOM, AZURE):
        tokens(resolve(location, first)).get_token(SCOPE)
    tokens(resolve(AZURE, tokens(resolve(AZURE, first)))).get_token(SCOPE)
    assert (len(first.calls), len(second.calls)) == (1, 0)
    tokens(resolve(AZURE, second)).get_token(SCOPE)
    assert (len(first.calls), len(second.calls)) == (1, 1)


def test_tokens_are_dropped_with_their_credential() -> None:
    credential = CountingCredential()
    tokens(resolve(AZURE, credential)).get_token(SCOPE)
    known = azure_torch_ckpt.credentials._cache_of
    key = id(credential)
    assert key in known
    del credential
    assert key not in known


def test_a_credential_without_weak_references_or_hash_works() -> None:
    class Slotted:
        __slots__ = ("calls",)
        __hash__ = None  # type: ignore[assignment]

        def get_token(self, *scopes: str, **options: Any) -> AccessToken:
            return AccessToken("slotted", int(time.time()) + 3600)

    assert tokens(resolve(AZURE, Slotted())).get_token(SCOPE).token == "slotted"


@pytest.mark.parametrize("kind", [CountingCredential, InfoCredential])
def test_scopes_and_options_have_tokens_of_their_own(kind: type[CountingCredential]) -> None:
    credential = kind()
    shared = tokens(resolve(AZURE, credential))
    for _ in range(2):
        assert shared.get_token(SCOPE).token == "token 1"
        assert shared.get_token_info(SCOPE, options={}).token == "token 1"
        assert shared.get_token("other/.default").token == "token 2"
        assert shared.get_token(SCOPE, claims="{}").token == "token 3"
        assert shared.get_token_info(SCOPE, options={"claims": "{}"}).token == "token 3"
        assert shared.get_token(SCOPE, tenant_id="t", enable_cae=True).token == "token 4"
    assert credential.calls == [
        ((SCOPE,), {}),
        (("other/.default",), {}),
        ((SCOPE,), {"claims": "{}"}),
        ((SCOPE,), {"tenant_id": "t", "enable_cae": True}),
    ]


def test_a_token_is_replaced_five_minutes_before_its_end(clock: SimpleNamespace) -> None:
    shared = tokens(resolve(AZURE, CountingCredential()))
    start = clock.now
    for seconds, token in [(0, 1), (3299, 1), (3301, 2), (3301 + 3299, 2), (3301 + 3301, 3), (99_999, 4)]:
        clock.now = start + seconds
        assert shared.get_token(SCOPE).token == f"token {token}"


def test_a_token_is_replaced_when_its_credential_says_so(clock: SimpleNamespace) -> None:
    shared = tokens(resolve(AZURE, InfoCredential()))
    start = clock.now
    for seconds, token in [(0, 1), (599, 1), (600, 2)]:
        clock.now = start + seconds
        info = shared.get_token_info(SCOPE)
        assert (info.token, info.refresh_on) == (f"token {token}", start + (0 if token == 1 else 600) + 600)


def test_a_credential_with_short_tokens_is_not_asked_for_every_request(clock: SimpleNamespace) -> None:
    credential = CountingCredential(lifetime_s=200)
    shared = tokens(resolve(AZURE, credential))
    for _ in range(100):
        shared.get_token(SCOPE)
        clock.now += 1
    assert len(credential.calls) == 4  # at 0, 30, 60 and 90 seconds


def test_a_failed_refresh_keeps_the_valid_token(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    credential = GatedCredential()
    credential.gate.set()
    shared = tokens(resolve(AZURE, credential))
    shared.get_token(SCOPE)
    credential.error = RuntimeError("S3cr3t body of the answer")
    clock.now += 3400
    assert shared.get_token(SCOPE).token == "token 1"
    assert "RuntimeError" in caplog.text and "S3cr3t" not in caplog.text
    clock.now += 201
    with pytest.raises(RuntimeError, match="S3cr3t"):
        shared.get_token(SCOPE)


def test_the_wrapper_shows_and_pickles_no_token() -> None:
    shared = tokens(resolve(AZURE, CountingCredential()))
    assert shared.get_token(SCOPE).token == "token 1"
    assert repr(shared) == "SharedTokens(CountingCredential)"
    stored = pickle.dumps(shared)
    assert b"token 1" not in stored
    assert pickle.loads(stored).get_token(SCOPE).token == "token 2"


# --- other processes --------------------------------------------------------------------------------------------------


def in_forked_child(work: Callable[[], bool]) -> bool:
    """Whether ``work`` was true in a forked child; a child that hangs is ended by its alarm."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(int(DEADLINE_S))
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


needs_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the threads are the point


@needs_fork
def test_a_fork_in_the_middle_of_a_fetch_leaves_a_working_child() -> None:
    credential = GatedCredential()
    shared = tokens(resolve(AZURE, credential))
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(shared.get_token, SCOPE)
        try:
            assert credential.fetching.wait(DEADLINE_S)

            def work() -> bool:
                credential.gate = threading.Event()
                credential.gate.set()
                return shared.get_token(SCOPE).token == "token 2" and resolve(AZURE, CountingCredential()) is not None

            assert in_forked_child(work)
        finally:
            credential.gate.set()
        assert fetch.result(DEADLINE_S).token == "token 1"


@needs_fork
def test_a_forked_child_goes_on_with_the_token_of_its_parent() -> None:
    credential = CountingCredential()
    shared = tokens(resolve(AZURE, credential))
    shared.get_token(SCOPE)
    assert in_forked_child(lambda: shared.get_token(SCOPE).token == "token 1")


def run_python(script: str, **env: str) -> str:
    package = Path(azure_torch_ckpt.credentials.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        env={**os.environ, "PYTHONPATH": str(package), **env},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_default_credential_is_made_once_and_late_and_anew_after_a_fork(tmp_path: Path) -> None:
    """With the real DefaultAzureCredential, which finds a command ``az`` that counts its calls."""
    az = tmp_path / "az"
    az.write_text(
        f"""#!/bin/sh
echo called >> {tmp_path}/calls
echo '{{"accessToken": "token of az", "expires_on": {int(time.time()) + 3600}, "expiresOn": "2099-01-01 00:00:00.0"}}'
"""
    )
    az.chmod(az.stat().st_mode | stat.S_IXUSR)
    script = """
import os, sys, threading
from azure_torch_ckpt.credentials import resolve, _process_default
from azure_torch_ckpt.location import BlobLocation

barrier = threading.Barrier(8)
answers = []

def ask(number):
    shared = resolve(BlobLocation.parse(f"https://account{number}.blob.core.windows.net/ckpt"))
    barrier.wait(30)
    answers.append(shared.get_token("https://storage.azure.com/.default").token)

resolve(BlobLocation.parse("https://acct.blob.core.windows.net/ckpt"))
assert "azure.identity" not in sys.modules
threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join(30)
assert answers == ["token of az"] * 8, answers

parents = _process_default._current()
child = os.fork()
if child == 0:
    status = 1
    try:
        shared = resolve(BlobLocation.parse("https://acct.blob.core.windows.net/ckpt"))
        assert shared.get_token("https://other.example.org/.default").token == "token of az"
        assert _process_default._current() is not parents
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
assert _process_default._current() is parents
"""
    run_python(script, PATH=f"{tmp_path}:/usr/bin:/bin", AZURE_TOKEN_CREDENTIALS="AzureCliCredential")
    assert (tmp_path / "calls").read_text().split() == ["called", "called"]


def test_a_default_credential_that_rejects_the_environment_is_our_error() -> None:
    script = """
from azure_torch_ckpt.credentials import resolve
from azure_torch_ckpt.errors import CredentialError
from azure_torch_ckpt.location import BlobLocation
try:
    resolve(BlobLocation.parse("https://acct.blob.core.windows.net/ckpt")).get_token("scope")
except CredentialError as error:
    print(error, type(error.__cause__).__name__)
"""
    said = run_python(script, AZURE_TOKEN_CREDENTIALS="nonsense")
    assert "AZURE_* variables" in said and "ValueError" in said


@pytest.mark.parametrize("credential", [None, False, SAS, KEY])
def test_plain_values_travel(credential: Any) -> None:
    assert pickle.loads(pickle.dumps(PickledCredential.of(credential))).restore() == credential


def test_key_and_sas_objects_travel() -> None:
    key = pickle.loads(pickle.dumps(PickledCredential.of(AzureNamedKeyCredential("acct", KEY)))).restore()
    assert named_key(key) == ("acct", KEY)
    sas = pickle.loads(pickle.dumps(PickledCredential.of(AzureSasCredential(SAS)))).restore()
    assert signature(sas) == SAS


@pytest.mark.parametrize(
    "credential",
    [
        DefaultAzureCredential(),
        ClientSecretCredential("00000000-0000-0000-0000-000000000000", "client", "S3cr3t"),
        CountingCredential(),
    ],
    ids=lambda credential: type(credential).__name__,
)
def test_token_credentials_travel_where_they_can(credential: Any) -> None:
    pickled = PickledCredential.of(credential)
    assert type(pickle.loads(pickle.dumps(pickled)).restore()) is type(credential)
    assert "S3cr3t" not in repr(pickled)


def test_a_credential_that_cannot_travel_says_what_to_do() -> None:
    credential = GatedCredential()
    with pytest.raises(CredentialError, match="credential=None") as caught:
        PickledCredential.of(credential)
    assert "GatedCredential" in str(caught.value) and isinstance(caught.value.__cause__, TypeError)


# --- secrets ----------------------------------------------------------------------------------------------------------

secrets = st.from_regex(r"[A-Za-z0-9]{25,40}", fullmatch=True)


@settings(deadline=None)
@given(
    st.sampled_from([AZURE, CUSTOM, PLAIN]),
    st.sampled_from(
        [
            "{}!",
            "?sv=1&sig={} x",
            "https://acct.blob.core.windows.net/ckpt?sv=1&sig={}",
            "https://user:{}@acct.blob.core.windows.net/ckpt",
            "AccountName=other;AccountKey={}!!",
            "AccountName={};AccountKey=",
            "AccountKey={}",
            "AccountName=acct;{}",
            "BlobEndpoint=https://user:{}@other.blob.core.windows.net;SharedAccessSignature=sv=1",
            "BlobEndpoint=https://other.blob.core.windows.net/?sig={};SharedAccessSignature=sv=1&sig={}",
            "SharedAccessSignature=sv=1&sig={}",
            "UseDevelopmentStorage=true;AccountKey={}",
        ]
    ),
    secrets,
)
def test_no_message_repeats_a_secret(location: BlobLocation, template: str, secret: str) -> None:
    with pytest.raises(CredentialError) as caught:
        resolve(location, template.replace("{}", secret))
    error: BaseException | None = caught.value
    while error is not None:
        assert secret not in str(error) and secret not in repr(error)
        error = error.__cause__ or error.__context__


@settings(deadline=None)
@given(st.sampled_from([AZURE, PLAIN]), secrets)
def test_no_message_repeats_a_secret_of_an_object(location: BlobLocation, secret: str) -> None:
    for credential in (
        AzureNamedKeyCredential("other", secret),
        AzureNamedKeyCredential(secret, "acct"),
        AzureSasCredential(secret),
        secret.encode(),
        {"account_name": "acct", "account_key": secret},
        AzureKeyCredential(secret),
    ):
        with pytest.raises(CredentialError) as caught:
            resolve(location, credential)  # type: ignore[arg-type]
        assert secret not in str(caught.value)
