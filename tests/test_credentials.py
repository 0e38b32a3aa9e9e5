"""Every kind of ``credential=`` against the one rule, and what the messages say of it."""

from __future__ import annotations

from typing import Any

import pytest
from azure.core.credentials import (
    AzureKeyCredential,
    AzureNamedKeyCredential,
    AzureSasCredential,
)
from azure.identity import DefaultAzureCredential
from azure.identity.aio import DefaultAzureCredential as AsyncDefaultAzureCredential
from azure.storage.blob import BlobServiceClient
from hypothesis import given, settings
from hypothesis import strategies as st

from azure_torch_ckpt.credentials import EMULATOR_ACCOUNT_KEY, resolve
from azure_torch_ckpt.errors import CredentialError
from azure_torch_ckpt.location import BlobLocation
from tests.support.credentials_support import (
    AZURE,
    CUSTOM,
    EMULATOR,
    KEY,
    PLAIN,
    SAS,
    CountingCredential,
    InfoCredential,
    named_key,
    signature,
    tokens,
)

pytest_plugins = ("tests.support.credentials_support",)


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
    assert tokens(resolve(AZURE))._cache is tokens(resolve(other))._cache is tokens(resolve(CUSTOM))._cache


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
