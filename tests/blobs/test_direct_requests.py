"""`DirectRequests`: the service accepts or refuses their signatures; azure-storage-blob sends the other requests."""

from __future__ import annotations

import base64
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential
from azure.core.settings import settings
from azure.core.tracing.ext.opentelemetry_span import OpenTelemetrySpan

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt._internal.shared_tokens import STORAGE_SCOPE
from azure_torch_ckpt.blobs.blob_info import BlobSettings
from azure_torch_ckpt.blobs.direct_requests import USER_AGENT
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import AccessDeniedError, BlobChangedError, BlobNotFoundError, RequestRefusedError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Gather
from tests.blobs.stores import KEY, MIB, ODD_NAMES, read, texts_of
from tests.support.containers import container_sas
from tests.support.faults import Answer, Exchange, Kind
from tests.support.proxy import FaultProxy

pytest_plugins = ("tests.blobs.stores",)

DATA = bytes(range(256)) * 1000
HOT: tuple[Kind, ...] = ("Put Block", "Get Blob")


def write_and_read(store: BlobStore, name: str) -> bytes:
    """Write and read `DATA` by each of the direct requests; return the bytes read."""
    blocks = [DATA[:100_000], DATA[100_000:]]
    for number, block in enumerate(blocks):
        store.stage_block(name, f"{number:032d}", Gather([memoryview(block)]), crc64(block))
    etag = store.commit_blocks(name, [f"{number:032d}" for number in range(len(blocks))])
    received = bytearray(len(DATA))
    views = [memoryview(received)[:1000], memoryview(received)[1000:]]
    assert store.read_into(name, 0, views, if_etag=etag) == etag
    some, info = store.read_some(name, 10, 20, if_etag=etag)
    assert (some, info.size, info.etag) == (DATA[10:30], len(DATA), etag)
    return bytes(received)


def by_client(exchange: Exchange) -> bool:
    """Whether the client of azure-storage-blob sent it. Direct requests name this package, too."""
    assert exchange.headers["user-agent"].startswith(USER_AGENT)
    return "azsdk-python-storage-blob/" in exchange.headers["user-agent"]


def assert_short(log: list[Exchange]) -> None:
    hot = [exchange for exchange in log if exchange.kind in HOT]
    assert {exchange.kind for exchange in hot} == set(HOT)
    assert not any(by_client(exchange) for exchange in hot)
    assert all(by_client(exchange) for exchange in log if exchange.kind not in HOT)


@pytest.fixture(params=["default", "key", "named key", "connection string", "SAS", "SAS credential", "SAS in the URL"])
def url_and_credential(request: pytest.FixtureRequest, proxied_container: str) -> tuple[str, Credential]:
    sas = container_sas(proxied_container)
    if request.param == "SAS in the URL":
        return f"{proxied_container}?{sas}", None
    credentials: dict[str, Credential] = {
        "default": None,
        "key": KEY,
        "named key": AzureNamedKeyCredential(Azurite.account_name, KEY),
        "connection string": f"AccountName={Azurite.account_name};AccountKey={KEY}",
        "SAS": sas,
        "SAS credential": AzureSasCredential(sas),
    }
    return proxied_container, credentials[request.param]


def test_every_kind_of_credential_is_accepted(url_and_credential: tuple[str, Credential], proxy: FaultProxy) -> None:
    store = BlobStore(BlobLocation.parse(url_and_credential[0]), Access(url_and_credential[1]))
    assert write_and_read(store, "blob") == DATA
    assert_short(proxy.log)


class CountedToken:
    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.scopes: list[tuple[str, ...]] = []

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        self.scopes.append(scopes)
        token: AccessToken = self.inner.get_token(*scopes, **options)
        return token


def test_a_token_is_fetched_once_for_both_paths(
    azurite_tls: Azurite, tls_files: tuple[Path, Path], token_credential: Any
) -> None:
    certificate = tls_files[0]
    credential = CountedToken(token_credential)
    azurite_tls.create_container("direct")
    with FaultProxy(azurite_tls.endpoint, tls_files) as proxy:
        store = BlobStore(BlobLocation.parse(f"{proxy.endpoint}/direct"), Access(credential, ca_file=str(certificate)))
        assert write_and_read(store, "blob") == DATA
        assert_short(proxy.log)
    assert credential.scopes == [(STORAGE_SCOPE,)]


TENANT = "72f988bf-86f1-41af-91ab-2d7cd011db47"
CHALLENGE = (
    f"Bearer authorization_uri=https://login.microsoftonline.com/{TENANT}/oauth2/authorize "
    "resource_id=https://storage.azure.com"
)


class TenantToken(CountedToken):
    """Of a user whose own tenant is not the account's. Where a signature would be, the token names its tenant."""

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        token = super().get_token(*scopes)
        tenant = options.get("tenant_id", "home")
        self.scopes[-1] += (tenant,)
        signed = token.token.rpartition(".")[0]
        return AccessToken(f"{signed}.{base64.b64encode(tenant.encode()).decode().rstrip('=')}", token.expires_on)


def test_the_tenant_that_a_challenge_names_is_remembered(
    azurite_tls: Azurite, tls_files: tuple[Path, Path], token_credential: Any
) -> None:
    """The proxy answers a token of another tenant as the service does; Azurite knows no tenants."""
    certificate = tls_files[0]
    credential = TenantToken(token_credential)
    container = f"tenant-{uuid.uuid4().hex}"
    azurite_tls.create_container(container)
    home = base64.b64encode(b"home").decode().rstrip("=")
    with FaultProxy(azurite_tls.endpoint, tls_files) as proxy:
        proxy.when(lambda seen: seen.headers["authorization"].endswith(home), times=None).do(
            Answer(401, "InvalidAuthenticationInfo", {"WWW-Authenticate": CHALLENGE})
        )
        for number in range(3):  # a new store for each checkpoint
            location = BlobLocation.parse(f"{proxy.endpoint}/{container}")
            store = BlobStore(location, Access(credential, ca_file=str(certificate)))
            assert write_and_read(store, f"blob-{number}") == DATA
            assert len(list(store.list(""))) == number + 1
        refused = [exchange.kind for exchange in proxy.log if exchange.status == 401]
        assert refused == ["Put Block"]
        assert proxy.count("Put Block") == 1 + 2 * 3
        assert not any(by_client(exchange) for exchange in proxy.log if exchange.kind in (*HOT, "List"))
    assert credential.scopes == [(STORAGE_SCOPE, "home"), (STORAGE_SCOPE, TENANT)]


def test_a_tenant_that_does_not_help_is_not_remembered(
    azurite_tls: Azurite, tls_files: tuple[Path, Path], token_credential: Any
) -> None:
    certificate = tls_files[0]
    container = f"tenant-{uuid.uuid4().hex}"
    azurite_tls.create_container(container)
    with FaultProxy(azurite_tls.endpoint, tls_files) as proxy:
        proxy.when("Get Blob", times=4).do(Answer(401, "InvalidAuthenticationInfo", {"WWW-Authenticate": CHALLENGE}))
        credential = TenantToken(token_credential)
        store = BlobStore(
            BlobLocation.parse(f"{proxy.endpoint}/{container}"), Access(credential, ca_file=str(certificate))
        )
        with pytest.raises(AccessDeniedError, match="401 InvalidAuthenticationInfo"):
            store.read_some("blob", 0, 10)
        with pytest.raises(BlobNotFoundError):
            store.read_some("blob", 0, 10)
        used = [base64.b64decode(one.headers["authorization"].rpartition(".")[2] + "==") for one in proxy.log]
        assert used[-1] == b"home"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_every_kind_are_signed_right(name: str, proxied: BlobStore, proxy: FaultProxy) -> None:
    assert write_and_read(proxied, name) == DATA
    assert_short(proxy.log)


def test_anonymous_requests_carry_no_authorization(proxied_container: str, proxy: FaultProxy) -> None:
    with pytest.raises((AccessDeniedError, BlobNotFoundError)):
        BlobStore(BlobLocation.parse(proxied_container), Access(False)).read_some("blob", 0, 10)
    assert "authorization" not in proxy.log[0].headers


def test_a_challenge_is_answered_by_the_client(proxied: BlobStore, proxy: FaultProxy) -> None:
    for kind in HOT:
        proxy.when(kind, nth=1).do(Answer(401, "InvalidAuthenticationInfo"))
    assert write_and_read(proxied, "blob") == DATA
    for kind in HOT:
        first, second = [exchange for exchange in proxy.log if exchange.kind == kind][:2]
        assert (first.status, by_client(first), by_client(second)) == (401, False, True)
        assert second.status in (201, 206)


def test_what_the_service_refuses_is_told_with_its_code(proxied_container: str) -> None:
    store = BlobStore(BlobLocation.parse(proxied_container), Access(KEY))
    assert write_and_read(store, "blob") == DATA
    view = memoryview(bytearray(10))
    with pytest.raises(BlobChangedError, match="412 ConditionNotMet"):
        store.read_into("blob", 0, [view], if_etag='"0x1"')
    with pytest.raises(BlobNotFoundError, match="404 BlobNotFound"):
        store.read_into("other", 0, [view])
    with pytest.raises(RequestRefusedError, match="416 InvalidRange") as caught:
        store.read_into("blob", len(DATA) + 1, [view])  # Azurite answers 206 without a byte at the end itself
    assert (caught.value.status, caught.value.error_code) == (416, "InvalidRange")
    wrong = BlobStore(BlobLocation.parse(proxied_container), Access("d3JvbmcgLSB3cm9uZyAtIHdyb25nIC0gd3Jvbmc="))
    with pytest.raises(AccessDeniedError, match="403 AuthorizationFailure"):
        wrong.stage_block("blob", "0" * 32, Gather([memoryview(b"x")]))


def test_a_blob_is_described_as_its_properties_describe_it(proxied: BlobStore) -> None:
    proxied.put("whole", DATA)  # stores an MD5
    proxied.stage_block("parts", "1", Gather([memoryview(DATA)]))
    proxied.commit_blocks("parts", ["1"], BlobSettings(metadata={"run": "7", "Name": "x y"}))
    for name in ("whole", "parts"):
        assert proxied.read_some(name, 5, 10)[1] == proxied.stat(name)
    assert proxied.stat("whole").md5 is not None
    assert proxied.read_some("parts", 0, 1)[1].metadata == {"run": "7", "Name": "x y"}


@pytest.fixture
def tracing() -> Iterator[None]:
    settings.tracing_implementation = OpenTelemetrySpan
    yield
    settings.tracing_implementation = None


@pytest.mark.usefixtures("tracing")
def test_with_tracing_the_client_sends_everything(proxied: BlobStore, proxy: FaultProxy) -> None:
    assert write_and_read(proxied, "blob") == DATA
    assert all(by_client(exchange) for exchange in proxy.log)


def test_azure_cores_log_shows_the_requests_without_the_signature(
    proxied_container: str, caplog: pytest.LogCaptureFixture
) -> None:
    sas = container_sas(proxied_container)
    with caplog.at_level(logging.INFO, "azure.core.pipeline.policies.http_logging_policy"):
        assert write_and_read(BlobStore(BlobLocation.parse(f"{proxied_container}?{sas}")), "blob") == DATA
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("azure.core")]
    assert any("comp=block&" in message or "comp=REDACTED" in message for message in messages)
    signature = sas.partition("sig=")[2].partition("&")[0]
    assert len(signature) > 20 and not any(signature in message for message in messages)


# ---- Refused credentials, and secrets that no error shows ------------------------------------------------------------


def test_a_sas_in_the_url_is_let_in_and_stays_out_of_sight(container: str) -> None:
    sas = container_sas(container)
    store = BlobStore(BlobLocation.parse(f"{container}?{sas}"), Access(KEY[::-1]))  # of the two, the SAS counts
    store.put("blob", b"data")
    assert read(store, "blob") == b"data"
    assert repr(store) == f"BlobStore({container!r})"
    with pytest.raises(BlobNotFoundError) as caught:
        store.stat("missing")
    assert f"{container}/missing" in str(caught.value)
    assert "sig=" not in texts_of(caught.value)


def test_a_token_for_another_audience_is_refused(azurite_tls: Azurite, token_credential: Any) -> None:
    elsewhere = type(token_credential)("https://elsewhere.example")
    location = BlobLocation.parse(azurite_tls.url("container"))
    with pytest.raises(AccessDeniedError) as caught:
        BlobStore(location, Access(elsewhere, ca_file=str(azurite_tls.certificate))).put("blob", b"data")
    assert elsewhere.get_token().token.split(".")[1] not in texts_of(caught.value)


def test_a_credential_that_gives_no_token_is_our_error(azurite_tls: Azurite) -> None:
    class Broken:
        def get_token(self, *scopes: str, **options: Any) -> Any:
            from azure.core.exceptions import ClientAuthenticationError

            raise ClientAuthenticationError("nobody is logged in\nsecond line")

    store = BlobStore(
        BlobLocation.parse(azurite_tls.url("container")), Access(Broken(), ca_file=str(azurite_tls.certificate))
    )
    with pytest.raises(AccessDeniedError, match=r"nobody is logged in.*az login"):
        store.put("blob", b"data")


def test_a_wrong_key_is_refused(container: str) -> None:
    wrong = "A" * 40 + KEY[40:]
    with pytest.raises(AccessDeniedError) as caught:
        BlobStore(BlobLocation.parse(container), Access(wrong)).put("blob", b"data")
    assert caught.value.status == 403 and "devstoreaccount1" in str(caught.value)
    assert wrong not in texts_of(caught.value)


def test_nobody_is_refused(container: str) -> None:
    with pytest.raises(AccessDeniedError):
        BlobStore(BlobLocation.parse(container), Access(False)).put("blob", b"data")


def test_a_sas_allows_what_it_says(container: str) -> None:
    BlobStore(BlobLocation.parse(container), Access(KEY)).put("blob", b"data")
    sas = container_sas(container, "r")
    store = BlobStore(BlobLocation.parse(f"{container}?{sas}"))
    assert read(store, "blob") == b"data"
    for refused in (
        lambda: store.put("blob", b"other"),
        lambda: store.stage_block("blob", "0001", Gather([memoryview(b"other")])),
        lambda: store.commit_blocks("blob", []),
        lambda: store.delete("blob"),
        lambda: list(store.list("")),
        lambda: list(store.list_folder("")),
    ):
        with pytest.raises(AccessDeniedError) as caught:
            refused()
        assert caught.value.status == 403 and "sig=" not in texts_of(caught.value)
    assert read(store, "blob") == b"data"


def test_an_expired_sas_is_refused(container: str) -> None:
    sas = container_sas(container, hours=-24)
    with pytest.raises(AccessDeniedError, match="expired"):
        BlobStore(BlobLocation.parse(container), Access(sas)).put("blob", b"data")


def test_a_large_block_that_is_refused_is_refused_for_the_right_reason(container: str) -> None:
    store = BlobStore(BlobLocation.parse(container), Access(container_sas(container, "r")))
    with pytest.raises(AccessDeniedError):
        store.stage_block("blob", "0001", Gather([memoryview(bytes(32 * MIB))]))
