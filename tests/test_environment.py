"""The credential that the environment names."""

from __future__ import annotations

import pytest

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import resolve
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.environment import VARIABLES, credential_from_environment
from azure_torch_ckpt.errors import CredentialError
from azure_torch_ckpt.location import BlobLocation

KEY = Azurite.account_key
SAS = "?sv=2021-08-06&ss=b&sig=abc%3D"


def test_nothing_set_and_blank_values_mean_the_default_credential() -> None:
    assert credential_from_environment({}) is None
    assert credential_from_environment(dict.fromkeys(VARIABLES, "  ")) is None


def test_the_connection_string_goes_before_the_key_and_the_key_before_the_sas() -> None:
    everything = {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true", "AZURE_STORAGE_KEY": KEY}
    everything["AZURE_STORAGE_SAS_TOKEN"] = SAS
    assert credential_from_environment(everything) == "UseDevelopmentStorage=true"
    del everything["AZURE_STORAGE_CONNECTION_STRING"]
    assert credential_from_environment(everything) == KEY
    del everything["AZURE_STORAGE_KEY"]
    assert credential_from_environment(everything) == SAS


@pytest.mark.parametrize(
    "environment",
    [
        {"AZURE_STORAGE_KEY": KEY},
        {"AZURE_STORAGE_KEY": f" {KEY}\n", "AZURE_STORAGE_ACCOUNT": "devstoreaccount1"},
        {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"},
    ],
)
def test_what_it_gives_opens_a_container(container: str, environment: dict[str, str]) -> None:
    store = BlobStore(BlobLocation.parse(container), Access(credential_from_environment(environment)))
    assert list(store.list("")) == []


def test_a_key_with_an_account_is_refused_for_another_one() -> None:
    credential = credential_from_environment({"AZURE_STORAGE_KEY": KEY, "AZURE_STORAGE_ACCOUNT": "mine"})
    resolve(BlobLocation.parse("azblob://mine/container"), credential)
    with pytest.raises(CredentialError, match="is for the account 'mine'") as refused:
        resolve(BlobLocation.parse("azblob://yours/container"), credential)
    assert KEY not in str(refused.value)


def test_it_reads_this_process_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", SAS)
    assert credential_from_environment() == SAS
