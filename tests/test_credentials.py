"""`resolve`: every kind of ``credential=``, the environment, and messages without secrets."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from azure.core.credentials import AzureKeyCredential, AzureNamedKeyCredential, AzureSasCredential
from azure.identity import ClientSecretCredential, DefaultAzureCredential
from azure.identity.aio import DefaultAzureCredential as AsyncDefaultAzureCredential
from azure.storage.blob import BlobServiceClient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import AzureBlobWriter, BlobIO
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import EMULATOR_ACCOUNT_KEY, Access, PickledCredential, resolve
from azure_torch_ckpt.datasets import BlobDataset
from azure_torch_ckpt.errors import AccessDeniedError, CredentialError
from azure_torch_ckpt.location import BlobLocation
from tests.support.containers import container_sas
from tests.support.fake_credentials import (
    AZURE,
    CUSTOM,
    EMULATOR,
    KEY,
    PLAIN,
    SAS,
    CountingCredential,
    GatedCredential,
    InfoCredential,
    named_key,
    signature,
    tokens,
)

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
    assert tokens(resolve(AZURE)).cache is tokens(resolve(other)).cache is tokens(resolve(CUSTOM)).cache


@pytest.mark.parametrize("location", [AZURE, EMULATOR, PLAIN], ids=lambda location: location.endpoint)
def test_an_account_key_belongs_to_the_account_of_the_url(location: BlobLocation) -> None:
    assert named_key(resolve(location, KEY)) == (location.account, KEY)
    assert named_key(resolve(location, KEY + "\n")) == (location.account, KEY)


def test_an_account_key_alone_is_refused_where_the_url_does_not_name_the_account() -> None:
    with pytest.raises(CredentialError, match=r"AzureNamedKeyCredential\(ACCOUNT, KEY\)"):
        resolve(CUSTOM, KEY)


@pytest.mark.parametrize("key", ["", "hello", "None", "not base64 at all!", KEY[:-1], KEY + "é"])
def test_text_that_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(CredentialError, match="not an account key"):
        resolve(AZURE, key)


@pytest.mark.parametrize("sas", [SAS, "?" + SAS, f" {SAS}\n", "sig=abc&sv=1"])
def test_a_sas_token_as_text(sas: str) -> None:
    assert signature(resolve(AZURE, sas)) == sas.strip().removeprefix("?")


@pytest.mark.parametrize("sas", ["?sv=1&sig=", "sv=1&sig=a b", "sv=1&sig=a\tb", "sv=1&sig=é"])
def test_a_broken_sas_is_refused(sas: str) -> None:
    for credential in (sas, AzureSasCredential(sas)):
        with pytest.raises(CredentialError, match=r"[Nn]ot a shared access signature"):
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
        (AZURE, f"AccountName={KEY};AccountKey=acct", "not an account's name"),
        (AZURE, f"BlobEndpoint=https://other.blob.core.windows.net;SharedAccessSignature={SAS}", "is not that of"),
        (CUSTOM, f"BlobEndpoint=https://evil.example.org;SharedAccessSignature={SAS}", "is not that of"),
        (AZURE, f"BlobEndpoint=nowhere;SharedAccessSignature={SAS}", "not a URL of Blob Storage"),
        (AZURE, f"SharedAccessSignature={SAS}", "neither AccountName nor BlobEndpoint"),
        (AZURE, f"AccountKey={KEY}", "neither AccountName nor BlobEndpoint"),
        (AZURE, "AccountName=acct", "neither AccountName and AccountKey nor SharedAccessSignature"),
        (AZURE, "AccountName=acct;AccountKey=hello", "not an account key"),
        (AZURE, "AccountName=acct;SharedAccessSignature=hello", "Not a shared access signature"),
        (AZURE, f"AccountName=acct;{KEY.rstrip('=')}", "malformed"),
        (AZURE, "UseDevelopmentStorage=true", "is for the emulator"),
        (PLAIN, "UseDevelopmentStorage=true", "is for the emulator"),
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


# --- the environment --------------------------------------------------------------------------------------------------

ACCOUNT = "AZURE_STORAGE_ACCOUNT"
STRING_VARIABLE, KEY_VARIABLE, SAS_VARIABLE = (
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
)
STRING = f"AccountName=acct;AccountKey={KEY}"
OTHERS_STRING = f"AccountName=other;AccountKey={KEY}"
EMULATOR_KEY = ("devstoreaccount1", EMULATOR_ACCOUNT_KEY)


def kind_of(resolved: Any) -> Any:
    """``(account, key)``, the SAS, or ``"tokens"``."""
    if isinstance(resolved, AzureNamedKeyCredential):
        return named_key(resolved)
    return signature(resolved) if isinstance(resolved, AzureSasCredential) else type(tokens(resolved)) and "tokens"


@pytest.mark.parametrize(
    ("location", "environment", "expected"),
    [
        (AZURE, {}, "tokens"),
        (AZURE, {STRING_VARIABLE: " ", KEY_VARIABLE: "", SAS_VARIABLE: "\n"}, "tokens"),
        # The first one counts.
        (AZURE, {STRING_VARIABLE: STRING, KEY_VARIABLE: "no", SAS_VARIABLE: "no"}, ("acct", KEY)),
        (AZURE, {KEY_VARIABLE: f" {KEY}\n", SAS_VARIABLE: "no"}, ("acct", KEY)),
        (AZURE, {SAS_VARIABLE: f"?{SAS}"}, SAS),
        # For the account that it names.
        (AZURE, {KEY_VARIABLE: KEY, ACCOUNT: "acct"}, ("acct", KEY)),
        (AZURE, {SAS_VARIABLE: SAS, ACCOUNT: "acct"}, SAS),
        (AZURE, {STRING_VARIABLE: f"BlobEndpoint=https://acct.blob.core.windows.net;SharedAccessSignature={SAS}"}, SAS),
        (AZURE, {KEY_VARIABLE: KEY, SAS_VARIABLE: SAS, ACCOUNT: "other"}, "tokens"),
        (AZURE, {STRING_VARIABLE: OTHERS_STRING}, "tokens"),
        (AZURE, {STRING_VARIABLE: f"BlobEndpoint=https://x.example.org;SharedAccessSignature={SAS}"}, "tokens"),
        (AZURE, {STRING_VARIABLE: "UseDevelopmentStorage=true"}, "tokens"),
        (AZURE, {STRING_VARIABLE: OTHERS_STRING, KEY_VARIABLE: KEY}, ("acct", KEY)),
        # A custom domain does not name the account.
        (CUSTOM, {STRING_VARIABLE: STRING}, ("acct", KEY)),
        (CUSTOM, {KEY_VARIABLE: KEY, ACCOUNT: "acct"}, ("acct", KEY)),
        (CUSTOM, {KEY_VARIABLE: KEY}, "tokens"),
        (CUSTOM, {SAS_VARIABLE: SAS}, SAS),
        # The emulator keeps its published key.
        (EMULATOR, {KEY_VARIABLE: KEY, SAS_VARIABLE: SAS}, EMULATOR_KEY),
        (EMULATOR, {STRING_VARIABLE: STRING, KEY_VARIABLE: KEY, ACCOUNT: "acct"}, EMULATOR_KEY),
        (EMULATOR, {STRING_VARIABLE: "UseDevelopmentStorage=true"}, EMULATOR_KEY),
        (EMULATOR, {STRING_VARIABLE: f"AccountName=devstoreaccount1;AccountKey={KEY}"}, ("devstoreaccount1", KEY)),
        (EMULATOR, {SAS_VARIABLE: SAS, ACCOUNT: "devstoreaccount1"}, SAS),
        (PLAIN, {KEY_VARIABLE: KEY}, ("acct", KEY)),
    ],
)
def test_the_environment_names_the_credential_of_its_account(
    location: BlobLocation, environment: dict[str, str], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert kind_of(resolve(location)) == expected
    assert signature(resolve(BlobLocation.parse(f"{location}?{SAS}"))) == SAS
    assert resolve(location, False) is None
    assert signature(resolve(location, "sv=1&sig=mine")) == "sv=1&sig=mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (STRING_VARIABLE, "AccountName"),
        (STRING_VARIABLE, f"AccountKey={KEY}"),
        (KEY_VARIABLE, "x"),
        (SAS_VARIABLE, "x"),
    ],
)
def test_a_variable_with_a_wrong_value_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(CredentialError, match=f"^{name}: ") as caught:
        resolve(AZURE)
    assert KEY not in str(caught.value)


def test_a_refusal_names_the_variables(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "A" * 40 + EMULATOR_ACCOUNT_KEY[40:]
    monkeypatch.setenv(STRING_VARIABLE, OTHERS_STRING)
    monkeypatch.setenv(KEY_VARIABLE, wrong)
    monkeypatch.setenv(ACCOUNT, "devstoreaccount1")
    location = BlobLocation.parse(container)
    with pytest.raises(AccessDeniedError) as caught:
        BlobStore(location).stat("blob")
    told = str(caught.value)
    assert f"{STRING_VARIABLE} was ignored" in told and f"The credential is from {KEY_VARIABLE}" in told
    assert KEY not in told and wrong not in told
    with pytest.raises(AccessDeniedError) as caught:
        BlobStore(location, Access(wrong)).stat("blob")
    assert STRING_VARIABLE not in str(caught.value)


ENTRY_POINTS: dict[str, Callable[[str], object]] = {
    "BlobStore": lambda container: BlobStore(BlobLocation.parse(container)).read("data/blob", limit=9),
    "BlobIO": lambda container: BlobIO(f"{container}/data/blob", "rb").read(),
    "dataset": lambda container: BlobDataset.from_container_url(container, prefix="data/")[0],
    "writer": lambda container: dcp.save({"x": torch.ones(1)}, storage_writer=AzureBlobWriter(f"{container}/run")),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("use", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
def test_every_entry_point_uses_the_environment(
    container: str, use: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    BlobStore(BlobLocation.parse(container)).put("data/blob", b"data")
    monkeypatch.setenv(ACCOUNT, "devstoreaccount1")
    monkeypatch.setenv(SAS_VARIABLE, container_sas(container, "w"))
    with pytest.raises((AccessDeniedError, CheckpointException), match="403"):
        use(container)
    monkeypatch.setenv(SAS_VARIABLE, container_sas(container))  # a new one is used from then on
    use(container)


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


# --- pickles ----------------------------------------------------------------------------------------------------------


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
