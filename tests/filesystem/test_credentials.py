"""Credentials and endpoints of the filesystem: their sources, and that no output contains a secret."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from importlib.metadata import EntryPoint
from typing import Any

import fsspec
import pytest
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from azure_torch_ckpt import AccessDeniedError, BlobLocation, CredentialError, TransferOptions
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from azure_torch_ckpt.filesystem.paths import Stores
from tests.conftest import UnsignedToken
from tests.filesystem.emulated_filesystem import VARIABLES, azblob, connection_string, filesystem
from tests.test_project import pyproject

KEY = Azurite.account_key


@pytest.fixture(autouse=True)
def no_credentials_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def sas(container: str, permission: str = "rwdlc") -> str:
    location = BlobLocation.parse(container)
    return generate_container_sas(
        location.account,
        location.container,
        account_key=KEY,
        permission=ContainerSasPermissions.from_string(permission),
        expiry=datetime.now(timezone.utc) + timedelta(hours=1),
    )


@pytest.mark.parametrize(
    "options",
    [
        lambda container: {"credential": KEY},
        lambda container: {"credential": AzureNamedKeyCredential("devstoreaccount1", KEY)},
        lambda container: {"credential": AzureSasCredential(sas(container))},
        lambda container: {"account_key": KEY},
        lambda container: {"sas_token": sas(container)},
        lambda container: {"sas_token": "?" + sas(container)},
        lambda container: {"connection_string": connection_string(container), "endpoint": None},
    ],
)
def test_every_form_of_a_credential_works_and_survives_a_pickle(
    container: str, options: Callable[[str], dict[str, Any]]
):
    fs = AzureBlobFileSystem(**{"endpoint": BlobLocation.parse(container).endpoint, **options(container)})
    url = azblob(container)
    fs.pipe_file(f"{url}/a", b"a")
    fs.cp(f"{url}/a", f"{url}/b")
    fs.mv(f"{url}/b", f"{url}/c")
    again = pickle.loads(pickle.dumps(fs))
    assert again.cat(url, recursive=True) == fs.cat(url, recursive=True)
    with again.open(f"{url}/c") as file:
        assert file.read() == b"a"
    for text in (fs.to_json(), repr(fs), str(fs), fs.fsid):
        assert KEY not in text and "sig=" not in text and "AccountKey" not in text


def test_tokens_work_over_tls(azurite_tls: Azurite, token_credential: UnsignedToken):
    url = azurite_tls.create_container("filesystem")
    fs = filesystem(url, credential=token_credential, ca_file=str(azurite_tls.certificate))
    fs.pipe_file(f"{azblob(url)}/a", b"a")
    assert fs.cat_file(f"{azblob(url)}/a") == b"a"


def test_anonymous_access_is_denied_by_a_private_container(container: str):
    fs = filesystem(container, anon=True)
    with pytest.raises(AccessDeniedError):
        fs.ls(azblob(container))


def test_a_repr_of_the_stores_hides_the_credential():
    assert KEY not in repr(Stores(None, Access(KEY)))


def test_two_credentials_at_a_time_are_refused():
    with pytest.raises(CredentialError, match="account_key, sas_token"):
        AzureBlobFileSystem(account_key=KEY, sas_token="sv=1&sig=x")
    with pytest.raises(TypeError, match="account_name"):
        AzureBlobFileSystem(account_name="account")


def test_the_environment_is_used_without_a_credential_and_read_for_every_call(
    container: str, monkeypatch: pytest.MonkeyPatch
):
    url = azblob(container)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(container))
    fs = fsspec.core.url_to_fs(url)[0]
    fs.pipe_file(f"{url}/a", b"a")
    assert fs.cat_file(f"{url}/a") == b"a"

    endpoint = BlobLocation.parse(container).endpoint
    there = AzureBlobFileSystem(endpoint=endpoint)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "devstoreaccount1")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", sas(container, "r"))
    assert there.cat_file(f"{url}/a") == b"a"
    with pytest.raises(AccessDeniedError):
        there.pipe_file(f"{url}/a", b"b")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", sas(container))  # say the old one has expired
    there.pipe_file(f"{url}/a", b"b")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "A" * 86 + "==")  # takes precedence over a SAS
    with pytest.raises(AccessDeniedError):
        there.cat_file(f"{url}/a")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    assert there.cat_file(f"{url}/a") == b"b"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(container).replace(KEY, "A" * 86 + "=="))
    with pytest.raises(AccessDeniedError):  # takes precedence over a key
        there.cat_file(f"{url}/a")
    assert AzureBlobFileSystem(endpoint=endpoint, account_key=KEY).cat_file(f"{url}/a") == b"b"


def test_a_connection_string_is_for_its_account_only(container: str):
    fs = AzureBlobFileSystem(connection_string=connection_string(container))
    with pytest.raises(CredentialError, match="for the account"):
        fs.ls("azblob://otheraccount/container")
    broken = AzureBlobFileSystem(connection_string=f"AccountKey={KEY};BlobEndpoint=nonsense")
    with pytest.raises(CredentialError, match="BlobEndpoint") as caught:
        broken.ls("azblob://account/container")
    assert KEY not in str(caught.value)


def test_json_restores_the_filesystem_without_its_secret(container: str, monkeypatch: pytest.MonkeyPatch):
    fs = filesystem(container, options=TransferOptions(concurrency=2))
    fields = json.loads(fs.to_json())
    assert fields["endpoint"] == BlobLocation.parse(container).endpoint
    assert not fields.keys() & {"account_key", "credential", "options"}
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    again = fsspec.AbstractFileSystem.from_json(fs.to_json())
    again.pipe_file(f"{azblob(container)}/a", b"a")
    assert fs.cat_file(f"{azblob(container)}/a") == b"a"


def test_no_log_contains_the_secret(container: str, caplog: pytest.LogCaptureFixture):
    token = sas(container)
    with caplog.at_level(logging.DEBUG):
        fs = filesystem(container, sas_token=token)
        fs.pipe_file(f"{azblob(container)}/a", b"a")
        fs.cp(f"{azblob(container)}/a", f"{azblob(container)}/b")
        with pytest.raises(FileNotFoundError) as caught:
            fs.cat_file(f"{azblob(container)}/none")
    signature = token.partition("sig=")[2].partition("&")[0]
    assert signature not in caplog.text and signature not in str(caught.value)


def test_equal_arguments_give_one_instance_to_a_thread(container: str):
    fs = filesystem(container)
    assert filesystem(container) is fs and pickle.loads(pickle.dumps(fs)) is fs
    assert filesystem(container, anon=True) is not fs
    others: list[AzureBlobFileSystem] = []
    thread = threading.Thread(target=lambda: others.append(filesystem(container)))
    thread.start()
    thread.join()
    others[0].pipe_file(f"{azblob(container)}/a", b"a")
    assert fs.cat_file(f"{azblob(container)}/a") == b"a"


def _read_in_child(fs: AzureBlobFileSystem, path: str, pipe) -> None:
    pipe.send((os.getpid(), fs.cat_file(path), fsspec.core.url_to_fs(path, **fs.storage_options)[0].exists(path)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_uses_the_filesystem_of_its_parent(container: str, method: str):
    fs = filesystem(container)
    path = f"{azblob(container)}/a"
    fs.pipe_file(path, b"a")  # opens connections
    context: Any = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=_read_in_child, args=(fs, path, there))
    child.start()
    assert here.poll(300)
    pid, content, exists = here.recv()
    child.join()
    assert pid != os.getpid() and content == b"a" and exists
    assert fs.cat_file(path) == b"a"


def test_the_package_names_the_filesystem_to_fsspec():
    value = pyproject()["project"]["entry-points"]["fsspec.specs"]["azblob"]
    assert EntryPoint("azblob", value, "fsspec.specs").load() is AzureBlobFileSystem
