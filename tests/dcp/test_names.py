"""Legal names that look odd: ``a//b``, ``/a``, ``a/``. What one names is never another blob."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import ContainerClient

from azure_torch_ckpt import BlobIO, IterableBlobDataset
from azure_torch_ckpt.catalog import consolidate, list_checkpoints
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.dcp.blob_names import group_by_checkpoint
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import BlobNotFoundError, LocationError
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from azure_torch_ckpt.location import BlobLocation
from tests.support.containers import KEY, store_of

ODD = ["/", "//", "/a", "//a", "a/", "a//", "a//b", "a/b//c/d", "a/b/", "/a/b", "a///b"]
PLAIN = ["a", "a/b", "a/b/c/d", "b"]


@pytest.fixture
def client(container: str) -> ContainerClient:
    return ContainerClient.from_container_url(container, KEY)


@pytest.fixture
def fs(azurite: Azurite) -> AzureBlobFileSystem:
    return AzureBlobFileSystem(endpoint=azurite.endpoint, account_key=KEY)


@pytest.fixture
def root(container: str) -> str:
    return f"{Azurite.account_name}/{container.rpartition('/')[2]}"


def fill(client: ContainerClient, names: list[str]) -> None:
    for name in names:
        client.upload_blob(name, f"this is {name}")


# Locations and blobs


@pytest.mark.parametrize("name", [*ODD, *PLAIN])
@pytest.mark.parametrize("endpoint", ["https://acct.blob.core.windows.net", "http://127.0.0.1:10000/devstoreaccount1"])
def test_the_url_of_a_blob_keeps_every_slash(endpoint: str, name: str) -> None:
    location = BlobLocation.parse_blob(f"{endpoint}/container/{name}")
    assert location.path == name
    assert BlobLocation.parse_blob(str(location)) == location


@pytest.mark.parametrize("name", ODD)
def test_the_url_of_a_checkpoint_has_no_empty_segment_and_may_end_with_a_slash(name: str) -> None:
    url = f"https://acct.blob.core.windows.net/container/{name}"
    stripped = name.rstrip("/")
    if stripped.startswith("/") or "//" in stripped:
        with pytest.raises(LocationError, match="empty segment"):
            BlobLocation.parse(url)
    else:
        assert BlobLocation.parse(url).path == stripped


def test_blobio_and_the_store_know_each_name(client: ContainerClient, container: str) -> None:
    fill(client, [*ODD, *PLAIN])
    store = store_of(container)
    for name in [*ODD, *PLAIN]:
        url = str(BlobLocation.parse_blob(f"{container}/{name}"))
        assert BlobIO(url, "rb", credential=KEY).read() == f"this is {name}".encode()
        buffer = bytearray(len(f"this is {name}"))
        store.read_into(name, 0, [memoryview(buffer)])
        assert buffer.decode() == f"this is {name}"
        store.copy("copy", store.copy_source(name, store.stat(name).etag))
        assert store.read("copy", limit=100)[0] == f"this is {name}".encode()


def test_what_is_written_has_the_very_name(client: ContainerClient, container: str) -> None:
    fill(client, ["m"])
    with BlobIO(f"{container}/d//m", "wb", credential=KEY) as file:
        file.write(b"new")
    assert client.download_blob("d//m").readall() == b"new"
    for mode in ("wb", "xb"):
        with pytest.raises(LocationError, match="ends with a slash"):
            BlobIO(f"{container}/m/", mode, credential=KEY)
    with pytest.raises(BlobNotFoundError):
        BlobIO(f"{container}/m/", "rb", credential=KEY).read()
    assert [blob.name for blob in client.list_blobs()] == ["d//m", "m"]
    assert client.download_blob("m").readall() == b"this is m"


def test_a_listing_of_a_dataset_and_its_urls_lead_to_the_same_blobs(client: ContainerClient, container: str) -> None:
    fill(client, [*ODD, *PLAIN])
    listing = BlobListing.from_container_url(container, credential=KEY)
    again = BlobListing.from_blob_urls([blob.url for blob in listing])
    assert [blob.location.path for blob in listing] == [blob.location.path for blob in again]
    assert sorted(blob.location.path for blob in listing) == sorted([*ODD, *PLAIN])
    samples: Iterable[Any] = IterableBlobDataset.from_container_url(container, credential=KEY)
    assert {sample["url"].partition(container + "/")[2]: sample["data"].decode() for sample in samples} == {
        name: f"this is {name}" for name in [*ODD, *PLAIN]
    }


# The filesystem


def test_what_find_gives_can_be_read_and_is_in_one_listing(
    client: ContainerClient, fs: AzureBlobFileSystem, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(client, [*ODD, *PLAIN])
    expected = {f"{root}/{name}": f"this is {name}".encode() for name in [*ODD, *PLAIN] if not name.endswith("/")}
    assert fs.find(root) == sorted(expected)
    assert "is left out: no path can end with a slash" in caplog.text  # nothing is swallowed silently
    assert fs.cat(fs.find(root)) == expected
    for path in expected:
        assert fs.info(path)["name"] == path and fs.isfile(path)
        assert fs.info(fs.unstrip_protocol(path))["name"] == path
    listed: list[str] = []
    folders = [root]
    while folders:
        folder = folders.pop()
        for entry in fs.ls(folder):
            assert entry["name"] != folder
            (folders if entry["type"] == "directory" else listed).append(entry["name"])
    # Where a blob and a folder have one name, a listing has both.
    assert sorted(listed) == sorted(expected)


def test_trees_with_odd_names_are_copied_moved_and_removed_whole(
    client: ContainerClient, fs: AzureBlobFileSystem, root: str
) -> None:
    fill(client, ["d//y", "d/x", "d/e//f/z", "other"])
    fs.cp(f"{root}/d", f"{root}/c", recursive=True)
    assert fs.find(f"{root}/c") == [f"{root}/c//y", f"{root}/c/e//f/z", f"{root}/c/x"]
    assert fs.cat_file(f"{root}/c//y") == b"this is d//y"
    fs.mv(f"{root}/c", f"{root}/m", recursive=True)
    assert fs.find(f"{root}/c") == [] and len(fs.find(f"{root}/m")) == 3
    fs.rm(f"{root}/m", recursive=True)
    assert sorted(blob.name for blob in client.list_blobs()) == ["d//y", "d/e//f/z", "d/x", "other"]


def test_what_find_gives_is_no_pattern(
    client: ContainerClient, fs: AzureBlobFileSystem, root: str, tmp_path: Path
) -> None:
    names = ["b[1]/f", "st*r", "wh?t"]
    fill(client, [*names, "b1/f", "star", "what"])
    found = [f"{root}/{name}" for name in names]
    assert fs.cat(found) == {f"{root}/{name}": f"this is {name}".encode() for name in names}
    # Of a single path, a pattern is meant, and this one matches another blob.
    assert fs.cat(found[0]) == {f"{root}/b1/f": b"this is b1/f"}
    fs.rm(found)
    assert [blob.name for blob in client.list_blobs()] == ["b1/f", "star", "what"]
    fill(client, ["m[1].pt", "d[1]/x"])
    fs.get(f"{root}/m[1].pt", str(tmp_path / "m"))
    assert (tmp_path / "m").read_bytes() == b"this is m[1].pt"
    fs.mv(f"{root}/m[1].pt", f"{root}/m[2].pt")
    fs.cp(f"{root}/d[1]", f"{root}/d2", recursive=True)
    assert list(fs.cat([f"{root}/d[1]"], recursive=True, on_error="raise")) == [f"{root}/d[1]/x"]
    fs.rm([f"{root}/d[1]"], recursive=True)
    assert [blob.name for blob in client.list_blobs()] == ["b1/f", "d2/x", "m[2].pt", "star", "what"]
    with pytest.raises(BlobNotFoundError):
        fs.rm(f"{root}/none[1]", recursive=True)


def test_two_blobs_are_not_copied_or_moved_into_one(
    client: ContainerClient, fs: AzureBlobFileSystem, root: str
) -> None:
    names = ["r/1/x", "r/2/x", "r/old/2/x"]
    fill(client, names)
    for act in (fs.mv, fs.cp):
        with pytest.raises(LocationError, match="same destination"):
            act([f"{root}/r/1/x", f"{root}/r/2/x"], f"{root}/r/d/")
        # Which of the copies comes first is nobody's business, so r/old/2/x would be either of the two.
        with pytest.raises(LocationError, match=r"would overwrite azblob://.*/r/old/2/x"):
            act(f"{root}/r/", f"{root}/r/old", recursive=True)
        with pytest.raises(LocationError, match="would overwrite"):
            act([f"{root}/r/1/x", f"{root}/r/2/x"], [f"{root}/r/2/x", f"{root}/r/1/x"])
    assert {blob.name: client.download_blob(blob.name).readall() for blob in client.list_blobs()} == {
        name: f"this is {name}".encode() for name in names
    }
    fs.cp([f"{root}/r/1/x"] * 2, [f"{root}/r/3", f"{root}/r/4"])
    assert fs.cat_file(f"{root}/r/4") == b"this is r/1/x"


def test_two_blobs_are_not_put_into_one_file(
    client: ContainerClient, fs: AzureBlobFileSystem, root: str, tmp_path: Path
) -> None:
    fill(client, ["d//x", "d/x", "e//x"])
    with pytest.raises(LocationError, match="same destination"):
        fs.get(f"{root}/d/", str(tmp_path), recursive=True)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    fs.get(f"{root}/e/", str(tmp_path), recursive=True)
    assert (tmp_path / "x").read_bytes() == b"this is e//x"


def test_a_slash_at_the_end_never_means_a_blob(client: ContainerClient, fs: AzureBlobFileSystem, root: str) -> None:
    fill(client, ["m", "f", "f/below"])
    before = [(blob.name, blob.etag) for blob in client.list_blobs()]
    for act in (
        lambda path: fs.open(path, "wb"),
        lambda path: fs.open(path, "rb"),
        lambda path: fs.open(path, "ab"),
        lambda path: fs.open(path, "w"),
        lambda path: fs.pipe_file(path, b"lost"),
        lambda path: fs.pipe({path: b"lost"}),
        lambda path: fs.cp_file(f"{root}/f", path),
        lambda path: fs.cat_file(path),
        lambda path: fs.cat(path),
        lambda path: fs.rm_file(path),
        lambda path: fs.rm(path),
        lambda path: fs.touch(path),
    ):
        with pytest.raises(LocationError, match="ends with a slash"):
            act(f"{root}/m/")
    with pytest.raises(BlobNotFoundError):
        fs.rm(f"{root}/m/", recursive=True)
    with pytest.raises(BlobNotFoundError):
        fs.mv(f"{root}/m/", f"{root}/new")
    fs.cp(f"{root}/m/", f"{root}/new")  # as with every folder: nothing, without recursive=True
    assert [(blob.name, blob.etag) for blob in client.list_blobs()] == before
    fs.rm(f"{root}/f/", recursive=True)  # the folder, and not the blob of its name
    assert [blob.name for blob in client.list_blobs()] == ["f", "m"]


@pytest.mark.parametrize("mark", ["hdi_isfolder", "Hdi_isfolder", "HDI_ISFOLDER"])
def test_marks_of_folders_are_no_files(
    client: ContainerClient, fs: AzureBlobFileSystem, root: str, tmp_path: Path, mark: str
) -> None:
    for name in ("t", "t/empty", "t/full"):
        client.upload_blob(name, b"", metadata={mark: "true"})
    client.upload_blob("t/slash/", b"")
    client.upload_blob("t/full/x", b"x")
    assert fs.info(f"{root}/t/empty")["type"] == "directory" and fs.isdir(f"{root}/t")
    entries = {entry["name"].rpartition("/")[2]: entry["type"] for entry in fs.ls(f"{root}/t")}
    assert entries == {"empty": "directory", "full": "directory", "slash": "directory"}
    assert fs.ls(f"{root}/t/empty") == fs.find(f"{root}/t/empty") == []
    assert fs.find(root) == [f"{root}/t/full/x"] and fs.du(root) == 1
    assert fs.find(f"{root}/t", withdirs=True) == [
        f"{root}/t{name}" for name in ("", "/empty", "/full", "/full/x", "/slash")
    ]
    assert list(fs.cat(root, recursive=True)) == [f"{root}/t/full/x"]
    with pytest.raises(BlobNotFoundError, match="is a folder"):
        fs.cat_file(f"{root}/t/empty")
    fs.get(f"{root}/t", str(tmp_path / "t"), recursive=True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x"]
    assert (tmp_path / "t/empty").is_dir()
    fs.cp(f"{root}/t", f"{root}/c", recursive=True)
    assert fs.find(f"{root}/c", withdirs=True) == [f"{root}/c", f"{root}/c/full", f"{root}/c/full/x"]
    fs.rm(f"{root}/t", recursive=True)
    assert [blob.name for blob in client.list_blobs()] == ["c/full/x"]


# Checkpoints


def test_the_file_that_consolidate_writes_has_no_slash_at_its_end(client: ContainerClient, container: str) -> None:
    fill(client, ["model.pt"])
    with pytest.raises(LocationError, match="ends with a slash"):
        consolidate(f"{container}/run", f"{container}/model.pt/", format="torch", overwrite=True, credential=KEY)
    assert client.download_blob("model.pt").readall() == b"this is model.pt"


def test_no_checkpoint_is_taken_for_another_one(client: ContainerClient, container: str) -> None:
    data = f"{'0' * 32}/__0_0.distcp"
    for folder in ("", "/", "run//", "run/", "run//step/"):
        client.upload_blob(f"{folder}.metadata", folder.encode())
        client.upload_blob(f"{folder}{data}", folder.encode())
    blobs = list(store_of(container).list(""))
    assert {
        place.path: sorted(blob.path for blob in place.metadata.values()) for place in group_by_checkpoint(blobs)
    } == {
        "": [".metadata"],
        "run": ["run/.metadata"],
    }
    assert [entry.name for entry in list_checkpoints(container, credential=KEY)] == ["", "run"]
