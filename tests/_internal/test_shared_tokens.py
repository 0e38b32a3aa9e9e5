"""`SharedTokens`: the tokens that the threads of a process and its forked children share."""

from __future__ import annotations

import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from azure.core.credentials import AccessToken

import azure_torch_ckpt
from azure_torch_ckpt._internal.shared_tokens import TokenCache
from azure_torch_ckpt.credentials import resolve
from tests.support.fake_credentials import (
    AZURE,
    CUSTOM,
    DEADLINE_S,
    SCOPE,
    CountingCredential,
    GatedCredential,
    InfoCredential,
    tokens,
)

pytest_plugins = ("tests.support.fake_credentials",)


# --- shared tokens ----------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        pause.wait(0.001)


def waiting_for_the_token() -> int:
    """Return how many threads wait for the lock of TokenCache.token, or hold it."""
    return sum(
        frame.f_code is TokenCache.token.__code__ and "lock" in frame.f_locals
        for top in sys._current_frames().values()
        for frame in frames(top)
    )


def frames(top: Any) -> Iterator[Any]:
    while top is not None:
        yield top
        top = top.f_back


def ask_in_8_threads(credential: GatedCredential) -> list[Any]:
    """Return the answers to 8 threads, each with its client, that all ask before the first answer."""
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
    cache = weakref.ref(tokens(resolve(AZURE, credential)).cache)
    assert cache() is not None
    del credential
    assert cache() is None


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
    package = Path(azure_torch_ckpt.__file__).parents[1]
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
from azure_torch_ckpt.credentials import resolve
from azure_torch_ckpt.location import BlobLocation

barrier = threading.Barrier(8)
answers = []

def ask(number):
    shared = resolve(BlobLocation.parse(f"https://account{number}.blob.core.windows.net/ckpt"))
    barrier.wait(60)
    answers.append(shared.get_token("https://storage.azure.com/.default").token)

resolve(BlobLocation.parse("https://acct.blob.core.windows.net/ckpt"))
assert "azure.identity" not in sys.modules
import azure.identity

made = []

class Counted(azure.identity.DefaultAzureCredential):
    def __init__(self):
        made.append(self)
        super().__init__()

azure.identity.DefaultAzureCredential = Counted
threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join(60)
assert answers == ["token of az"] * 8, answers

assert len(made) == 1
child = os.fork()
if child == 0:
    status = 1
    try:
        shared = resolve(BlobLocation.parse("https://acct.blob.core.windows.net/ckpt"))
        assert shared.get_token("https://other.example.org/.default").token == "token of az"
        assert len(made) == 2
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
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
