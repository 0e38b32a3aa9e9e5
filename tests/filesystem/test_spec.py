"""`AzureBlobFileSystem`: paths, listings, files, copies, removals."""

from __future__ import annotations

import gc
import gzip
import random
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.callbacks import Callback

import azure_torch_ckpt.blobs.blob_copy
from azure_torch_ckpt import (
    AccessDeniedError,
    BlobChangedError,
    BlobExistsError,
    BlobLocation,
    BlobNotFoundError,
    ContainerNotFoundError,
    LocationError,
    ServiceUnavailableError,
    TransferOptions,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from azure_torch_ckpt.filesystem.paths import strip, unstrip
from tests.filesystem.emulated_filesystem import azblob, filesystem
from tests.support.faults import Answer, Gate, Hold
from tests.support.proxy import FaultProxy

MIB = 1024 * 1024
SMALL = TransferOptions(block_size=64 * 1024, concurrency=4)


@pytest.fixture
def fs(container: str) -> AzureBlobFileSystem:
    return filesystem(container, options=SMALL)


@pytest.fixture
def root(container: str) -> str:
    """The container's URL for the filesystem."""
    return azblob(container)


@pytest.fixture
def tree(fs: AzureBlobFileSystem, root: str) -> str:
    """Blobs at three depths, one with a name that URLs escape."""
    names = ["a", "d/b", "d/e/c", "d/e/100% of it #1?", "dd/x"]
    fs.pipe({f"{strip(root)}/{name}": name.encode() for name in names})
    return root


def store_of(fs: AzureBlobFileSystem, root: str) -> BlobStore:
    """Return a store for the container of `root` that shares nothing with the filesystem."""
    location = BlobLocation.parse(f"{fs.storage_options['endpoint']}/{strip(root).split('/')[1]}")
    return BlobStore(location, Access(Azurite.account_key))


def below(fs: AzureBlobFileSystem, root: str) -> list[str]:
    """Return the names of all blobs in the container, from the service."""
    return [blob.path for blob in store_of(fs, root).list("")]


# Paths


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("azblob://acct/c/a/b", "acct/c/a/b"),
        ("azblob://acct/c/a/", "acct/c/a"),
        ("azblob:/acct/c", "acct/c"),  # Path turns a URL into this
        ("azblob://acct/c/a%20b%3F", "acct/c/a%20b%3F"),  # protocol and path, as libraries join them
        ("https://acct.blob.core.windows.net/c/a%20b%3F", "acct/c/a b?"),
        ("azblob://acct.blob.core.windows.net/c/a", "acct/c/a"),
        ("https://ACCT.blob.core.windows.net/c/a", "acct/c/a"),
        ("https://acct-secondary.blob.core.windows.net/c", "acct-secondary.blob.core.windows.net/c"),
        ("https://models.example.org/c/a", "models.example.org/c/a"),
        ("acct/c/100%25", "acct/c/100%25"),  # not a URL, so nothing is encoded
        ("azblob://acct/c/*.csv", "acct/c/*.csv"),
    ],
)
def test_a_path_is_a_url_without_its_protocol(url: str, path: str):
    assert strip(url) == path
    assert strip(path) == path
    assert strip(unstrip(path)) == path


def test_invalid_paths_are_refused_and_no_sas_is_repeated(fs: AzureBlobFileSystem, root: str):
    with pytest.raises(LocationError, match="sas_token=") as caught:
        strip("azblob://acct/c/a?sv=2024&sig=c2VjcmV0")
    assert "c2VjcmV0" not in str(caught.value)
    with pytest.raises(LocationError, match="endpoint="):
        strip("http://127.0.0.1:10000/devstoreaccount1/c/a")
    with pytest.raises(LocationError, match="has no container"):
        fs.ls("azblob://devstoreaccount1")
    with pytest.raises(LocationError, match="one filesystem"):
        fs.ls("azblob://otheraccount/container")
    with pytest.raises(LocationError, match=r"segment '.' or '..'"):
        fs.exists(f"{root}/a/../b")
    with pytest.raises(LocationError, match="endpoint= is"):
        AzureBlobFileSystem(endpoint="127.0.0.1:10000")


# Listings


def test_listings_have_files_and_folders(fs: AzureBlobFileSystem, tree: str):
    path = strip(tree)
    assert fs.ls(tree, detail=False) == [f"{path}/{name}" for name in ("a", "d", "dd")]
    assert [entry["type"] for entry in fs.ls(tree)] == ["file", "directory", "directory"]
    assert fs.ls(f"{tree}/d/", detail=False) == [f"{path}/d/b", f"{path}/d/e"]
    assert fs.ls(f"{tree}/a") == [fs.info(f"{tree}/a")]
    odd = f"{path}/d/e/100% of it #1?"
    assert fs.find(f"{tree}/d") == sorted([f"{path}/d/b", f"{path}/d/e/c", odd])
    assert fs.find(f"{tree}/d", maxdepth=1) == [f"{path}/d/b"]
    assert fs.find(f"{tree}/d", withdirs=True) == sorted(
        [f"{path}/d", f"{path}/d/b", f"{path}/d/e", f"{path}/d/e/c", odd]
    )
    assert fs.find(f"{tree}/a") == [f"{path}/a"] and fs.find(f"{tree}/none") == []
    assert fs.glob(f"{tree}/d*/?") == [f"{path}/d/b", f"{path}/d/e", f"{path}/dd/x"]
    assert fs.glob(f"{tree}/**/c") == [f"{path}/d/e/c"]
    assert [(folder, names) for folder, _, names in fs.walk(f"{tree}/dd")] == [(f"{path}/dd", ["x"])]
    assert fs.du(tree) == sum(len(name) for name in ("a", "d/b", "d/e/c", "d/e/100% of it #1?", "dd/x"))
    assert fs.cat_file(unstrip(odd)) == fs.cat_file(odd) == b"d/e/100% of it #1?"


def test_info_describes_a_blob(fs: AzureBlobFileSystem, tree: str):
    info = fs.info(f"{tree}/d/b")
    assert (info["name"], info["size"], info["type"]) == (f"{strip(tree)}/d/b", 3, "file")
    assert fs.modified(f"{tree}/d/b") == info["last_modified"] and fs.created(f"{tree}/d/b") == info["created"]
    assert fs.isfile(f"{tree}/a") and not fs.isdir(f"{tree}/a")
    assert fs.isdir(f"{tree}/d") and not fs.isfile(f"{tree}/d") and fs.exists(f"{tree}/d") and fs.isdir(tree)
    assert fs.isdir(f"{tree}/d/") and not fs.exists(f"{tree}/e")
    for path in ("d", "none"):
        with pytest.raises(FileNotFoundError):
            fs.modified(f"{tree}/{path}")
    keys = fs.ukey(f"{tree}/a"), fs.checksum(f"{tree}/a")
    assert keys == (fs.ukey(f"{tree}/a"), fs.checksum(f"{tree}/a"))
    fs.pipe_file(f"{tree}/a", b"a")
    assert keys[0] != fs.ukey(f"{tree}/a") and keys[1] != fs.checksum(f"{tree}/a")


def test_no_answer_is_cached(fs: AzureBlobFileSystem, tree: str):
    assert fs.exists(f"{tree}/dd") and len(fs.ls(tree)) == 3
    store = store_of(fs, tree)
    store.delete("dd/x")
    store.put("new", b"new")
    assert not fs.exists(f"{tree}/dd") and not fs.isdir(f"{tree}/dd")
    assert fs.ls(tree, detail=False) == [f"{strip(tree)}/{name}" for name in ("a", "d", "new")]
    store.put("a", b"longer")
    assert fs.info(f"{tree}/a")["size"] == 6


def test_empty_blobs_that_mark_folders_are_folders(fs: AzureBlobFileSystem, root: str):
    """Other tools, and accounts with a hierarchical namespace, create them."""
    fs.pipe({f"{root}/folder": b"", f"{root}/folder/x": b"x", f"{root}/empty": b""})
    assert fs.isdir(f"{root}/folder") and fs.isfile(f"{root}/empty")
    assert [entry["type"] for entry in fs.ls(root)] == ["file", "directory"]
    assert fs.find(root) == [f"{strip(root)}/empty", f"{strip(root)}/folder/x"]
    fs.rm(f"{root}/folder", recursive=True)
    assert below(fs, root) == ["empty"]


def test_a_missing_blob_and_a_failed_request_are_not_the_same(container: str):
    url = azblob(container)
    wrong = filesystem(container, account_key="A" * 86 + "==")
    for ask in (wrong.exists, wrong.isdir, wrong.isfile, wrong.ls, wrong.glob, lambda path: list(wrong.walk(path))):
        with pytest.raises(PermissionError) as caught:
            ask(f"{url}/a*" if ask == wrong.glob else f"{url}/a")
        assert isinstance(caught.value, AccessDeniedError)
    missing = f"{url[:-3]}not"
    fs = filesystem(container)
    assert not fs.exists(missing)
    for ask in (fs.ls, fs.find, fs.info):
        with pytest.raises(ContainerNotFoundError):
            ask(missing)
    dead = filesystem("http://127.0.0.1:9/devstoreaccount1/container", options=TransferOptions(retry_seconds=0))
    with pytest.raises(ServiceUnavailableError):
        dead.exists("azblob://devstoreaccount1/container/a")


# Files


def test_a_blob_appears_when_its_file_is_closed(fs: AzureBlobFileSystem, root: str):
    with fs.open(f"{root}/f", "wb") as file:
        file.write(b"x" * 200_000)
        assert file.tell() == file.size == 200_000
        assert not fs.exists(f"{root}/f")
    assert fs.size(f"{root}/f") == 200_000
    with pytest.raises(KeyError), fs.open(f"{root}/f", "wb") as file:
        file.write(b"half")
        raise KeyError
    with pytest.raises(KeyError), fs.open(f"{root}/f", "w") as text:
        text.write("half")
        raise KeyError
    text = fs.open(f"{root}/f", "w")
    text.write("lost")
    with pytest.warns(ResourceWarning, match="never closed"):
        del text
        gc.collect()
    assert fs.cat_file(f"{root}/f") == b"x" * 200_000


def test_texts_and_modes(fs: AzureBlobFileSystem, root: str):
    with fs.open(f"{root}/t", "w", encoding="latin-1", newline="\r\n") as text:
        text.write("ä\nö\n")
    with fs.open(f"{root}/t", "r", encoding="latin-1") as text:
        assert text.read() == "ä\nö\n"
    with fs.open(f"{root}/t", "w") as text:
        text.write("one\n")
    assert fs.read_text(f"{root}/t") == "one\n"
    with pytest.raises(FileExistsError):
        fs.open(f"{root}/t", "x")
    for mode in ("r+b", "w+b", "a+b"):
        with pytest.raises(ValueError, match="mode"):
            fs.open(f"{root}/t", mode)
    with pytest.raises(BlobNotFoundError):
        fs.open(f"{root}/none")
    with pytest.raises(FileNotFoundError):
        fs.open(f"{root}/none", "r")
    with pytest.raises(LocationError, match="is a container"):
        fs.open(root, "wb")
    with pytest.raises(ValueError, match="compression"):
        fs.open(f"{root}/t.gz", "wb", compression="gzip")
    with fsspec.open(f"{root}/t.gz", "wb", compression="gzip", **fs.storage_options) as zipped:
        zipped.write(b"zipped")
    assert gzip.decompress(fs.cat_file(f"{root}/t.gz")) == b"zipped"
    with fs.open(f"{root}/t.gz", compression="infer") as zipped:
        assert zipped.read() == b"zipped"


def test_appending_keeps_the_content_unless_another_writer_changed_it(fs: AzureBlobFileSystem, root: str):
    for line in ("one\n", "two\n"):
        with fs.open(f"{root}/log", "a") as log:
            log.write(line)
    with fs.open(f"{root}/log", "ab") as log:
        assert log.tell() == 8
        log.write(b"x" * 200_000)
    assert fs.cat_file(f"{root}/log") == b"one\ntwo\n" + b"x" * 200_000
    log = fs.open(f"{root}/log", "ab")
    log.write(b"mine")
    fs.pipe_file(f"{root}/log", b"theirs")
    with pytest.raises(BlobChangedError):
        log.close()
    assert fs.cat_file(f"{root}/log") == b"theirs"
    new = fs.open(f"{root}/new", "ab")
    fs.pipe_file(f"{root}/new", b"theirs")
    with pytest.raises(FileExistsError):
        new.close()


def test_a_transaction_creates_all_blobs_at_its_end_or_none(fs: AzureBlobFileSystem, root: str):
    fs.pipe_file(f"{root}/old", b"old")
    with fs.transaction:
        with fs.open(f"{root}/old", "wb") as file:
            file.write(b"new" * 100_000)
        with fs.open(f"{root}/text", "w") as text:
            text.write("text")
        fs.pipe_file(f"{root}/piped", b"piped")
        with pytest.raises(KeyError), fs.open(f"{root}/failed", "wb") as file:
            file.write(b"x")
            raise KeyError
        never_closed = fs.open(f"{root}/open", "wb")
        never_closed.write(b"open")
        assert below(fs, root) == ["old"] and fs.cat_file(f"{root}/old") == b"old"
    assert below(fs, root) == ["old", "open", "piped", "text"]
    assert fs.cat_file(f"{root}/old") == b"new" * 100_000 and fs.cat_file(f"{root}/open") == b"open"
    with pytest.raises(KeyError), fs.transaction:
        fs.pipe_file(f"{root}/old", b"discarded")
        with fs.open(f"{root}/other", "wb") as file:
            file.write(b"discarded")
        raise KeyError
    assert below(fs, root) == ["old", "open", "piped", "text"] and fs.size(f"{root}/old") == 300_000
    fs.start_transaction()
    fs.pipe_file(f"{root}/old", b"newest")
    fs.end_transaction()
    assert fs.cat_file(f"{root}/old") == b"newest"


def test_slices_of_many_blobs(fs: AzureBlobFileSystem, root: str):
    data = {f"{strip(root)}/{number}": random.Random(number).randbytes(300_000 * number) for number in range(4)}
    data[f"{strip(root)}/large"] = random.Random(9).randbytes(9 * MIB)
    fs.pipe(data)
    assert fs.cat(list(data)) == data
    assert fs.cat(root, recursive=True) == data
    slices = [(0, 10), (None, None), (-5, None), (100, 1 << 40), (50, 40), (10, -10), (None, 5 * MIB)]
    wanted = [(path, start, end) for path in data for start, end in slices]
    paths, starts, ends = (list(column) for column in zip(*wanted, strict=True))
    assert fs.cat_ranges(paths, starts, ends) == [data[path][start:end] for path, start, end in wanted]
    found = fs.cat_ranges([*data, f"{root}/none"], 0, 5)
    assert found[:-1] == [content[:5] for content in data.values()] and isinstance(found[-1], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges([f"{root}/none"], 0, 5, on_error="raise")
    with pytest.raises(FileNotFoundError):
        fs.cat([f"{root}/none", *data])
    assert fs.cat([f"{root}/none", f"{root}/1"], on_error="omit") == {f"{strip(root)}/1": data[f"{strip(root)}/1"]}
    assert fs.head(f"{root}/1", 7) == data[f"{strip(root)}/1"][:7]
    assert fs.tail(f"{root}/large", 7) == data[f"{strip(root)}/large"][-7:]
    assert fs.read_block(f"{root}/large", 5 * MIB, 100) == data[f"{strip(root)}/large"][5 * MIB : 5 * MIB + 100]


# Copying


class Counting(Callback):  # type: ignore[misc]
    """Keeps its children."""

    def __init__(self) -> None:
        super().__init__()
        self.children: list[Counting] = []

    def branched(self, path_1: str, path_2: str, **_: Any) -> Counting:
        self.children.append(Counting())
        return self.children[-1]


def test_folders_are_copied_to_disk_and_back_with_progress(fs: AzureBlobFileSystem, root: str, tmp_path: Path):
    sizes = {"a": 0, "sub/b": 5, "sub/deep/c": 9 * MIB + 1}
    for name, size in sizes.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(random.Random(size).randbytes(size))
    up, down = Counting(), Counting()
    fs.put(f"{tmp_path}/in", f"{root}/up", recursive=True, callback=up)
    assert fs.find(f"{root}/up") == [f"{strip(root)}/up/{name}" for name in sizes]
    fs.get(f"{root}/up", f"{tmp_path}/out", recursive=True, callback=down)
    for name, size in sizes.items():
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), size
    assert sorted(str(one.relative_to(tmp_path / "out")) for one in (tmp_path / "out").rglob("*") if one.is_file()) == [
        "a",
        "sub/b",
        "sub/deep/c",
    ]
    for callback in (up, down):
        assert (callback.size, callback.value) == (3, 3)
        assert sorted(child.value for child in callback.children) == sorted(sizes.values())
        assert all(child.value == child.size for child in callback.children)


def test_a_download_that_fails_leaves_the_old_file(proxied_container: str, proxy: FaultProxy, tmp_path: Path):
    fs = filesystem(proxied_container, options=TransferOptions(retry_seconds=0, block_size=MIB))
    url = f"{azblob(proxied_container)}/large"
    fs.pipe_file(url, b"x" * 9 * MIB)
    (tmp_path / "large").write_bytes(b"old")
    proxy.when("Get Blob", nth=4).do(Answer(500, "InternalError"))
    with pytest.raises(ServiceUnavailableError):
        fs.get(url, f"{tmp_path}/large")
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("large", b"old")]


def test_a_blob_moves_with_its_properties(fs: AzureBlobFileSystem, root: str):
    fs.pipe_file(f"{root}/a", b"a", content_type="text/plain", metadata={"made_by": "test"})
    fs.mv(f"{root}/a", f"{root}/b/c")
    assert below(fs, root) == ["b/c"]
    assert fs.info(f"{root}/b/c")["metadata"] == {"made_by": "test"}
    with pytest.raises(FileNotFoundError):
        fs.mv(f"{root}/a", f"{root}/d")
    with pytest.raises(FileNotFoundError, match="recursive"):
        fs.mv(f"{root}/b", f"{root}/d")
    fs.mv(f"{root}/b", f"{root}/d", recursive=True)
    assert below(fs, root) == ["d/c"]
    fs.mv(f"{root}/d/c", f"{root}/d/c")
    assert below(fs, root) == ["d/c"]


def test_large_blobs_are_copied_where_the_service_lacks_the_call(
    fs: AzureBlobFileSystem, root: str, monkeypatch: pytest.MonkeyPatch
):
    """Above 256 MiB a copy consists of blocks, which the emulator cannot take from a URL."""
    monkeypatch.setattr(azure_torch_ckpt.blobs.blob_copy, "_LARGEST_WHOLE", 100)
    monkeypatch.setattr(azure_torch_ckpt.blobs.blob_copy, "SERVICE_PART", 100_000)
    data = random.Random(1).randbytes(350_001)
    with fs.open(f"{root}/a", "wb", metadata={"kind": "noise"}) as file:
        file.write(data)
    fs.cp(f"{root}/a", f"{root}/b")
    assert fs.cat_file(f"{root}/b") == data
    assert fs.info(f"{root}/b")["metadata"] == {"kind": "noise"}


def test_a_blob_that_changed_during_a_move_is_not_removed(proxied_container: str, proxy: FaultProxy, container: str):
    fs = filesystem(proxied_container)
    root = azblob(proxied_container)
    fs.pipe_file(f"{root}/a", b"old")
    gate = Gate()
    proxy.when("Delete").do(Hold(gate))
    errors: list[BaseException] = []

    def move() -> None:
        try:
            fs.mv(f"{root}/a", f"{root}/b")
        except BlobChangedError as error:
            errors.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    gate.wait_for(1)
    BlobStore(BlobLocation.parse(container), Access(Azurite.account_key)).put("a", b"new")
    gate.open()
    thread.join()
    assert len(errors) == 1
    assert fs.cat([f"{root}/a", f"{root}/b"]) == {f"{strip(root)}/a": b"new", f"{strip(root)}/b": b"old"}


# Removal


def test_a_removal_removes_only_what_it_names(fs: AzureBlobFileSystem, tree: str):
    for path in (f"{tree}/none", f"{tree}/d"):
        with pytest.raises(FileNotFoundError):
            fs.rm(path)
        with pytest.raises(FileNotFoundError):
            fs.rm_file(path)
    with pytest.raises(FileNotFoundError):
        fs.rm(f"{tree}/none", recursive=True)
    with pytest.raises(FileNotFoundError):
        fs.rm_file(tree)
    fs.rm(f"{tree}/d", recursive=True)
    assert below(fs, tree) == ["a", "dd/x"]
    fs.rm([f"{tree}/a", f"{tree}/d*/x"])
    assert below(fs, tree) == []
    fs.rm(tree, recursive=True)
    assert fs.exists(tree)


def test_a_removal_of_overlapping_trees(fs: AzureBlobFileSystem, tree: str):
    for path in (
        f"{tree}/**",
        [f"{tree}/a", f"{tree}/d", f"{tree}/d/", f"{tree}/d/x", f"{tree}/dd", f"{tree}/d*"],
        [f"{tree}/*", f"{tree}/*"],
    ):
        fs.pipe({f"{tree}/{name}": b"" for name in ("a", "d/x", "d/y/z", "dd/x")})
        fs.rm(path, recursive=True)
        assert below(fs, tree) == []
    with pytest.raises(BlobNotFoundError, match="there is no blob and no folder"):
        fs.rm(f"{tree}/none*", recursive=True)


def test_folders_follow_from_blobs_and_containers_are_created_only_on_request(fs: AzureBlobFileSystem, tree: str):
    fs.mkdir(f"{tree}/new")
    fs.makedirs(f"{tree}/new/deep")
    fs.rmdir(f"{tree}/new")
    assert not fs.exists(f"{tree}/new")
    with pytest.raises(BlobExistsError):
        fs.makedirs(f"{tree}/d")
    fs.makedirs(f"{tree}/d", exist_ok=True)
    other = f"{tree}2"
    fs.mkdir(other)
    assert not fs.exists(other)
    fs.mkdir(other, create_container=True)
    assert fs.exists(other) and fs.ls(other) == []
