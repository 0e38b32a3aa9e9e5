"""The double of an account with a hierarchical namespace answers as the service does: its recorded facts.

`test_directories` has what the package does there.
"""

from __future__ import annotations

import pytest
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobPrefix, ContainerClient

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.location import BlobLocation
from tests.blobs.stores import KEY
from tests.support.hierarchical import HierarchicalAccount


@pytest.fixture
def client(directories: str) -> ContainerClient:
    return ContainerClient.from_container_url(directories, KEY)


def code(error: HttpResponseError) -> tuple[int | None, str | None]:
    return error.status_code, error.response.headers.get("x-ms-error-code")  # type: ignore[union-attr]


def test_a_directory_is_an_empty_blob_that_comes_by_itself_and_stays(
    client: ContainerClient, directories: str, hierarchical: HierarchicalAccount
) -> None:
    client.upload_blob("a/b/file", b"data")
    assert hierarchical.paths(directories) == ["a/", "a/b/", "a/b/file"]
    properties = client.get_blob_client("a/b").get_blob_properties()
    assert (properties.size, properties.metadata) == (0, {"hdi_isfolder": "true"})
    client.delete_blob("a/b/file")
    assert hierarchical.paths(directories) == ["a/", "a/b/"]


def test_how_directories_are_listed(client: ContainerClient) -> None:
    client.upload_blob("a/b/file", b"data")
    client.upload_blob("a/c", b"", metadata={"hdi_isfolder": "true"})
    flat = list(client.list_blobs(include=["metadata"]))
    assert [(blob.name, bool(blob.metadata)) for blob in flat] == [
        ("a", True),
        ("a/b", True),
        ("a/b/file", False),
        ("a/c", True),
    ]
    top = list(client.walk_blobs(delimiter="/"))
    assert [(entry.name, isinstance(entry, BlobPrefix)) for entry in top] == [("a/", True)]
    below = list(client.walk_blobs("a/", delimiter="/"))
    assert [(entry.name, isinstance(entry, BlobPrefix)) for entry in below] == [("a/b/", True), ("a/c/", True)]


def test_resource_types_are_told(client: ContainerClient) -> None:
    client.upload_blob("a/file", b"data")
    told: list[str] = []
    for path in ("a", "a/file"):
        client.get_blob_client(path).get_blob_properties(
            raw_response_hook=lambda response: told.append(response.http_response.headers["x-ms-resource-type"])
        )
    assert told == ["directory", "file"]


def test_how_directories_are_deleted(client: ContainerClient) -> None:
    client.upload_blob("a/b/file", b"data")
    with pytest.raises(HttpResponseError) as caught:
        client.delete_blob("a", delete_snapshots="include")
    assert code(caught.value) == (400, "OperationNotSupportedOnDirectory")
    for path in ("a", "a/b"):
        with pytest.raises(HttpResponseError) as caught:
            client.delete_blob(path)
        assert code(caught.value) == (409, "DirectoryIsNotEmpty")
    for path in ("a/b/file", "a/b", "a"):
        client.delete_blob(path)
    assert not list(client.list_blobs())


def test_a_path_is_a_file_or_a_directory(client: ContainerClient) -> None:
    client.upload_blob("a/file", b"data")
    for path in ("a", "a/file/below", "a/file/below/that"):
        with pytest.raises(HttpResponseError) as caught:
            client.upload_blob(path, b"", overwrite=True)
        assert code(caught.value)[0] == 409
    with pytest.raises(HttpResponseError):
        list(client.list_blobs("a/file/"))
    assert [blob.name for blob in client.list_blobs("a/fi")] == ["a/file"]


def test_paths_are_normalised(directories: str, hierarchical: HierarchicalAccount) -> None:
    with ContainerClient.from_container_url(directories, KEY) as client:
        client.upload_blob("/a//b/", b"data", metadata={"some": "metadata"})
        assert hierarchical.paths(directories) == ["a/", "a/b"]
        assert client.download_blob("a/b").readall() == client.download_blob("a//b").readall() == b"data"
        client.delete_blob("a/b/")
    assert hierarchical.paths(directories) == ["a/"]


def test_a_sas_for_a_directory_is_good_for_nothing_above_it(
    directories: str, hierarchical: HierarchicalAccount
) -> None:
    BlobStore(BlobLocation.parse(directories), Access(KEY)).put("run/step-1/x", b"data")
    url = f"{directories}/run/step-1"
    store = BlobStore(BlobLocation.parse(url), Access(hierarchical.directory_sas(url, "rl")))
    assert store.read("run/step-1/x", limit=10)[0] == b"data"
    assert [blob.path for blob in store.list("run/step-1/")] == ["run/step-1/x"]
    for prefix in ("", "run/", "run/step-2/"):
        with pytest.raises(PermissionError):
            list(store.list(prefix))
    with pytest.raises(PermissionError):
        store.put("run/step-1/x", b"data")
    assert all(isinstance(entry, BlobInfo) for entry in store.list("run/step-1/"))
