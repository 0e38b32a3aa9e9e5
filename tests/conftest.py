"""Fixtures that many test modules share: running emulators and fresh containers in them."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken
from hypothesis import HealthCheck, settings

from azure_torch_ckpt.emulator import Azurite

# Last, so that an installed package has precedence over the checkout.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# Asserts in modules that tests import report as much as those in tests.
pytest.register_assert_rewrite(
    *(f"tests.{folder.name}" for folder in Path(__file__).parent.iterdir() if folder.is_dir())
)

from tests.faults.tally import Tally  # noqa: E402
from tests.support.hierarchical import HierarchicalAccount  # noqa: E402
from tests.support.proxy import FaultProxy  # noqa: E402
from tests.support.ranks import Ranks  # noqa: E402

# The time for one example, and for making examples, depends on the machine alone.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_configure() -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_STORAGE_")]:
        del os.environ[name]  # a credential of this machine
    # A process that a shell starts in the background ignores SIGINT, and so do the children that some tests signal.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_is_told_of_an_earlier_test() -> None:
    """What an earlier test broke off would be told when this one begins a save or a load."""
    report = sys.modules.get("azure_torch_ckpt.dcp.report")
    if report is not None:
        report.report_abandoned()


class UnsignedToken:
    """A `TokenCredential` whose tokens Azurite accepts (``--oauth basic``): it does not check signatures."""

    def __init__(self, audience: str = "https://storage.azure.com") -> None:
        self.audience = audience

    def get_token(self, *scopes: str, **_: Any) -> AccessToken:
        now = int(time.time())
        claims = {"aud": self.audience, "iss": "https://sts.windows.net/tests/", "iat": now, "nbf": now - 60}
        claims["exp"] = now + 3600
        parts = [{"alg": "RS256", "typ": "JWT"}, claims, "unsigned"]
        encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
        return AccessToken(".".join(encoded), now + 3600)


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """One emulator for all tests: plain HTTP, in memory. Start your own to stop it in the middle of a test."""
    with Azurite() as emulator:
        yield emulator


@pytest.fixture(scope="session")
def azurite_tls() -> Iterator[Azurite]:
    """One emulator for all tests that need TLS or tokens; clients must trust its `certificate`."""
    with Azurite(oauth=True) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def tls_files(azurite_tls: Azurite) -> tuple[Path, Path]:
    """PEM files of the certificate of `azurite_tls`, for 127.0.0.1, and of its key."""
    assert azurite_tls.certificate is not None
    return azurite_tls.certificate, azurite_tls.certificate.with_name("key.pem")


@pytest.fixture
def container(azurite: Azurite) -> str:
    """URL of a container that is empty and this test's own. The key is ``azurite.account_key``."""
    return azurite.create_container(f"test-{uuid.uuid4().hex}")


@pytest.fixture
def token_credential() -> UnsignedToken:
    """A `TokenCredential` that `azurite_tls` accepts."""
    return UnsignedToken()


@pytest.fixture
def proxy(azurite: Azurite) -> Iterator[FaultProxy]:
    """This test's own proxy in front of `azurite`."""
    with FaultProxy(azurite.endpoint) as between:
        yield between


@pytest.fixture
def proxied_container(proxy: FaultProxy, container: str) -> str:
    """URL of `container` through `proxy`. The request that made it is not in the proxy's log."""
    return proxy.through(container)


@pytest.fixture(scope="session")
def hierarchical(azurite: Azurite) -> Iterator[HierarchicalAccount]:
    """One double of an account with a hierarchical namespace for all tests. The key is ``azurite.account_key``."""
    with HierarchicalAccount(azurite.endpoint) as account:
        yield account


@pytest.fixture
def directories(hierarchical: HierarchicalAccount) -> str:
    """URL of a container with directories that is empty and this test's own."""
    return hierarchical.create_container(f"test-{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes under torchrun: ``ranks(4).run(function, *args)``. A group starts when a test first asks for it."""
    groups = Ranks()
    try:
        yield groups
    finally:
        groups.close()


@pytest.fixture(scope="session")
def tally() -> Tally:
    """Records what the tests of faults count."""
    return Tally()
