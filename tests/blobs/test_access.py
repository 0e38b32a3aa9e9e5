"""Credentials that the service refuses, and secrets that no error shows. `test_direct_requests` has accepted ones."""

from __future__ import annotations

from typing import Any

import pytest

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Gather
from tests.blobs.stores import KEY, MIB, read, sas_for, texts_of

pytest_plugins = ("tests.blobs.stores",)


def test_a_sas_in_the_url_is_let_in_and_stays_out_of_sight(container: str) -> None:
    sas = sas_for(container)
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
    sas = sas_for(container, "r")
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
    sas = sas_for(container, hours=-24)
    with pytest.raises(AccessDeniedError, match="expired"):
        BlobStore(BlobLocation.parse(container), Access(sas)).put("blob", b"data")


def test_a_large_block_that_is_refused_is_refused_for_the_right_reason(container: str) -> None:
    store = BlobStore(BlobLocation.parse(container), Access(sas_for(container, "r")))
    with pytest.raises(AccessDeniedError):
        store.stage_block("blob", "0001", Gather([memoryview(bytes(32 * MIB))]))
