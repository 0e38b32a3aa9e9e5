"""Options: each one is applied, refused, or accepted because it has no meaning here."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
from azure.storage.blob import BlobClient, ContentSettings
from fsspec.asyn import get_loop
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import BlobChangedError, BlobExistsError, RequestRefusedError, UnknownOptionError
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from azure_torch_ckpt.filesystem.fsspec_options import refuse_unknown
from azure_torch_ckpt.filesystem.paths import strip
from tests.filesystem.emulated_filesystem import azblob, connection_string, filesystem
from tests.support.faults import Cut
from tests.support.proxy import FaultProxy

IGNORED: dict[str, Any] = {
    "asynchronous": True,
    "auto_mkdir": True,
    "batch_size": 4,
    "block_size": 0,
    "cache_type": "none",
    "default_block_size": 1 << 20,
    "default_cache": "parts",
    "default_cache_type": "bytes",
    "default_fill_cache": False,
    "fill_cache": False,
    "listings_expiry_time": 5,
    "max_paths": 10,
    "skip_instance_cache": True,
    "use_listings_cache": True,
}
NAMES = ("run/model.pt", "run/tmp-1", "run/tmp-2/a", "run/tmp-2/b/c", "run/tmp/x", "tmp-9")


@pytest.fixture
def fs(container: str) -> AzureBlobFileSystem:
    return filesystem(container)


@pytest.fixture
def root(fs: AzureBlobFileSystem, container: str) -> str:
    path: str = strip(azblob(container))
    fs.pipe({f"{path}/{name}": name.encode() for name in NAMES})
    return path


def below(root: str, *names: str) -> list[str]:
    return [f"{root}/{name}" for name in names]


# prefix=


def test_find_with_a_prefix(fs: AzureBlobFileSystem, root: str) -> None:
    run = f"{root}/run"
    tmp = below(run, "tmp-1", "tmp-2/a", "tmp-2/b/c")
    assert fs.find(run, prefix="tmp-") == tmp
    assert fs.find(f"azblob://{run}/", prefix="tmp-") == tmp
    assert list(fs.find(run, prefix="tmp-", detail=True)) == tmp
    assert fs.find(run, prefix="tmp-", withdirs=True) == below(run, "tmp-1", "tmp-2", "tmp-2/a", "tmp-2/b", "tmp-2/b/c")
    assert fs.find(run, prefix="tmp-", maxdepth=1) == below(run, "tmp-1")
    assert fs.find(run, prefix="tmp-", maxdepth=1, withdirs=True) == below(run, "tmp-1", "tmp-2")
    assert fs.find(run, prefix="tmp-", maxdepth=2) == below(run, "tmp-1", "tmp-2/a")
    assert fs.find(run, prefix="tmp-2/") == below(run, "tmp-2/a", "tmp-2/b/c")
    assert fs.find(run, prefix="tmp-2/b/", maxdepth=2) == []
    assert fs.find(run, prefix="tmp-2/b/", maxdepth=3) == below(run, "tmp-2/b/c")
    assert fs.find(root, prefix="tmp") == below(root, "tmp-9")
    assert fs.find(run, prefix="zzz") == fs.find(f"{run}/model.pt", prefix="m") == fs.find(run, prefix="run") == []
    assert fs.find(run, prefix="") == fs.find(run)


def test_what_takes_a_prefix_for_find(fs: AzureBlobFileSystem, root: str) -> None:
    run = f"{root}/run"
    assert fs.du(run, prefix="tmp-") == sum(len(name) for name in NAMES if name.startswith("run/tmp-"))
    assert fs.du(run, prefix="zzz") == 0
    assert fs.glob(f"{run}/*", prefix="tmp-") == below(run, "tmp-1", "tmp-2")
    fs.rm(fs.find(run, prefix="tmp-"))
    assert fs.find(run) == below(run, "model.pt", "tmp/x")


# Unknown options


def test_every_method_refuses_what_it_does_not_know(fs: AzureBlobFileSystem, root: str, tmp_path: Path) -> None:
    """Each method whose signature takes any keyword, and the methods of fsspec that call one."""
    (tmp_path / "f").write_bytes(b"f")
    local, one, two, new = str(tmp_path / "f"), f"{root}/run/model.pt", f"{root}/two", f"{root}/new"
    arguments: dict[str, tuple[Any, ...]] = {
        "cat": (one,),
        "cat_file": (one,),
        "cat_ranges": ([one], [0], [1]),
        "copy": (one, two),
        "cp": (one, two),
        "cp_file": (one, two),
        "disk_usage": (root,),
        "download": (one, str(tmp_path / "g")),
        "du": (root,),
        "exists": (one,),
        "find": (root,),
        "get": (one, str(tmp_path / "g")),
        "get_file": (one, str(tmp_path / "g")),
        "glob": (f"{root}/*",),
        "info": (one,),
        "listdir": (root,),
        "ls": (root,),
        "makedir": (two,),
        "mkdir": (two,),
        "move": (one, two),
        "mv": (one, two),
        "open": (new, "wb"),
        "pipe": (new, b"x"),
        "pipe_file": (new, b"x"),
        "put": (local, new),
        "put_file": (local, new),
        "read_bytes": (one,),
        "read_text": (one,),
        "rename": (one, two),
        "stat": (one,),
        "touch": (new,),
        "upload": (local, new),
        "write_bytes": (new, b"x"),
        "write_text": (new, "x"),
    }
    elsewhere = {
        "expand_path",  # for `find` and `glob`
        "from_dict",
        "lexists",  # for `exists`
        "sign",  # not implemented
        "transaction_type",  # a class
        "tree",
        "walk",  # a generator, below
    }
    anything = {
        name
        for name in dir(fs)
        if not name.startswith("_")
        and callable(getattr(type(fs), name, None))
        and any(one.kind is one.VAR_KEYWORD for one in inspect.signature(getattr(fs, name)).parameters.values())
    }
    assert anything - elsewhere - arguments.keys() == set()
    before = fs.find(root, detail=True)
    for name, given in arguments.items():
        with pytest.raises(UnknownOptionError, match="version_id="):
            getattr(fs, name)(*given, version_id="2026-01-31T12:00:00.1234567Z")
    with pytest.raises(UnknownOptionError):
        list(fs.walk(root, prefix="x"))
    with pytest.raises(UnknownOptionError):
        fs.expand_path([f"{root}/*"], wanted=True)  # with a string alone, fsspec 2025.5 drops the option
    assert fs.find(root, detail=True) == before and not (tmp_path / "g").exists()


def test_exists_takes_any_option_without_a_meaning_elsewhere(fs: AzureBlobFileSystem, root: str) -> None:
    assert fs.exists(f"{root}/run/model.pt", anything=1) and not fs.exists(f"{root}/none", anything=1)
    with pytest.raises(UnknownOptionError, match="exists does not know timeout=, version_id=,"):
        fs.exists(f"{root}/run/model.pt", anything=1, version_id="x", timeout=1)


def test_unknown_values_are_refused(fs: AzureBlobFileSystem, root: str, tmp_path: Path) -> None:
    one = f"{root}/run/model.pt"
    for attempt in (
        lambda: fs.cat([one], on_error="ignore"),
        lambda: fs.cat_ranges([one], 0, 1, on_error="omit"),
        lambda: fs.copy(one, f"{root}/two", on_error="omit"),
        lambda: fs.pipe_file(f"{root}/two", b"x", mode="creat"),
        lambda: fs.put_file(__file__, f"{root}/two", mode="exclusive"),
    ):
        with pytest.raises(ValueError, match="must be one of"):
            attempt()
    with pytest.raises(ValueError, match="binary mode doesn't take"):
        fs.open(one, "rb", encoding="utf-8")
    with pytest.raises(ValueError, match="are for writing"):
        fs.open(one, "rb", content_type="text/plain")
    assert not fs.exists(f"{root}/two")


def test_an_unknown_option_of_the_filesystem(container: str) -> None:
    with pytest.raises(UnknownOptionError, match=r"account_name=.*The account is a part of the path"):
        filesystem(container, account_name="devstoreaccount1")
    with pytest.raises(UnknownOptionError, match="c3VwZXI=") as caught:
        refuse_unknown("open", {"c3VwZXI": 1, "size": 2})
    assert "size" not in str(caught.value)
    error = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(error, TypeError) and isinstance(error, ValueError) and str(error) == str(caught.value)


# Ignored options


def test_ignored_options(container: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = filesystem(container, loop=get_loop(), **IGNORED)
    one, new = f"{root}/run/model.pt", f"{root}/new"
    ignored = {name: value for name, value in IGNORED.items() if name != "block_size"}
    with fs.open(one, "rb", block_size=5, cache_options={}, encoding=None, size=5, **ignored) as file:
        assert file.read() == b"run/model.pt"
    with fs.open(new, "wb", block_size=5, errors=None, **ignored) as file:
        file.write(b"1")
    with fs.open(new, "a", block_size=5, encoding="utf-16-le", **ignored) as text:
        text.write("2")
    assert fs.cat_file(new, **ignored) == b"1" + "2".encode("utf-16-le")
    assert fs.info(one, refresh=True, **ignored)["size"] == 12
    assert fs.ls(f"{root}/run", refresh=True, **ignored) and fs.exists(one, **ignored) and fs.find(root, **ignored)
    fs.pipe({new: b"3"}, **ignored)
    fs.cp(new, f"{root}/newer", **ignored)
    assert fs.cat_ranges([f"{root}/newer"], 0, 1, max_gap=7, **ignored) == [b"3"]
    again = pickle.loads(pickle.dumps(fs))
    assert again.cat_file(new) == b"3" and again.storage_options["cache_type"] == "none"
    assert fsspec.AbstractFileSystem.from_json(fs.to_json()).storage_options["max_paths"] == 10
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(container))
    for name, value in IGNORED.items():
        with fsspec.open(f"azblob://{one}", "rb", **{name: value}) as file:
            assert file.read(3) == b"run"


def test_a_filesystem_for_asyncio(container: str, root: str) -> None:
    """As Zarr makes one: it asks for ``asynchronous=True``, and wraps the filesystem."""
    fs = filesystem(container, asynchronous=True)
    wrapped = AsyncFileSystemWrapper(fs)
    assert wrapped.cat_file(f"{root}/run/model.pt", start=0, end=3) == b"run"
    wrapped.pipe_file(f"{root}/new", b"x", mode="create")
    with pytest.raises(BlobExistsError):
        wrapped.pipe_file(f"{root}/new", b"y", mode="create")


# Paths, and the settings of blobs


@pytest.mark.parametrize("name", ["city=New%20York/part-0", "100%", "a b#c?d", "%2F%25", "a+b&c=d"])
def test_protocol_and_path(fs: AzureBlobFileSystem, container: str, name: str) -> None:
    """The two are joined as datasets and pandas do it."""
    path = f"{strip(azblob(container))}/{name}"
    fs.pipe_file(path, b"x")
    client = BlobClient.from_connection_string(connection_string(container), path.split("/")[1], name)
    assert client.exists()
    assert fs.cat_file(f"azblob://{path}") == fs.cat_file(fs.unstrip_protocol(path)) == b"x"
    assert fs.find(f"azblob://{strip(azblob(container))}") == [path]
    with fs.open(f"{fs.protocol}://{path}", "rb") as file:
        assert file.read() == b"x"


def test_info_has_the_fields_of_adlfs(fs: AzureBlobFileSystem, root: str, container: str) -> None:
    path = f"{root}/run/model.pt"
    client = BlobClient.from_connection_string(connection_string(container), root.split("/")[1], "run/model.pt")
    content = ContentSettings("text/csv", "gzip", "de", "inline", "no-store")
    client.set_http_headers(content)
    client.set_blob_metadata({"Owner": "me"})
    client.set_blob_tags({"a": "b"})
    info = fs.info(path)
    assert info["metadata"] == {"Owner": "me"} and info["tag_count"] == 1
    assert info["content_settings"] == content and info["content_settings"]["content_type"] == "text/csv"
    assert info["content_settings"].content_encoding == "gzip"
    assert info["blob_type"] == "BlockBlob" and info["etag"].startswith('"')
    assert fs.info(f"{root}/run/tmp-1")["metadata"] == {}
    assert Azurite.account_key not in repr(info)


# Mode "a"


def client_of(container: str, name: str) -> BlobClient:
    return BlobClient.from_connection_string(connection_string(container), container.rpartition("/")[2], name)


@pytest.mark.parametrize("mode", ["ab", "a"])
def test_an_append_blob_is_appended_to(fs: AzureBlobFileSystem, container: str, mode: str) -> None:
    client = client_of(container, "log")
    client.create_append_blob(metadata={"kind": "log"}, content_settings=ContentSettings("text/plain"))
    client.append_block(b"one\n")
    path = azblob(f"{container}/log")
    more = "two\n" + "x" * (9 << 20)  # three blocks
    with fs.open(path, mode) as file:
        file.write(more if mode == "a" else more.encode())
        file.flush()
        assert fs.cat(path) == b"one\n"
    with pytest.raises(RuntimeError, match="dropped"), fs.open(path, mode) as file:
        file.write("three" if mode == "a" else b"three")
        raise RuntimeError("dropped")
    with fs.transaction, fs.open(path, "ab") as file:
        file.write(b"\nfour")
    assert fs.cat(path) == f"one\n{more}\nfour".encode()
    info = fs.info(path)
    assert (info["blob_type"], info["metadata"]) == ("AppendBlob", {"kind": "log"})
    with pytest.raises(ValueError, match="cannot change content_type"):
        fs.open(path, "ab", content_type="text/csv")
    with pytest.raises(BlobChangedError):
        fs.open(path, "ab", if_etag='"other"')
    file = fs.open(path, "ab")
    file.write(b"five")
    client.append_block(b"theirs")
    with pytest.raises(BlobChangedError, match="Another writer"):
        file.close()
    assert fs.cat(path).endswith(b"\nfourtheirs")


@pytest.mark.parametrize("at", ["request", "answer"])
def test_an_append_whose_answer_is_lost_is_made_once(proxy: FaultProxy, container: str, at: Any) -> None:
    client = client_of(container, "log")
    client.create_append_blob()
    client.append_block(b"one")
    fs = AzureBlobFileSystem(endpoint=proxy.endpoint, account_key=Azurite.account_key)
    proxy.when(lambda seen: seen.query.get("comp") == "appendblock").do(Cut(at))
    with fs.open(azblob(f"{container}/log"), "ab") as file:
        file.write(b"two")
    assert fs.cat(azblob(f"{container}/log")) == b"onetwo"
    assert file.etag == fs.info(azblob(f"{container}/log"))["etag"]


def test_page_and_append_blobs_are_not_replaced(fs: AzureBlobFileSystem, container: str) -> None:
    client_of(container, "page").create_page_blob(512)
    client_of(container, "log").create_append_blob()
    with pytest.raises(RequestRefusedError, match="is a page blob"):
        fs.open(azblob(f"{container}/page"), "ab")
    for name in ("page", "log"):
        file = fs.open(azblob(f"{container}/{name}"), "wb")
        file.write(b"x")
        with pytest.raises(RequestRefusedError, match="append blob or a page blob"):
            file.close()
    assert fs.info(azblob(f"{container}/page"))["blob_type"] == "PageBlob"


def test_an_append_to_a_block_blob_keeps_its_settings(fs: AzureBlobFileSystem, container: str) -> None:
    client = client_of(container, "a.csv")
    content = ContentSettings("text/csv", "gzip", "de", "inline", "no-store", bytearray(16))
    client.upload_blob(b"1\n", metadata={"Owner": "me"}, tags={"run": "7"})
    client.set_http_headers(content)
    path = azblob(f"{container}/a.csv")
    with fs.open(path, "ab") as file:
        file.write(b"2\n")
    info = fs.info(path)
    assert fs.cat(path) == b"1\n2\n" and info["metadata"] == {"Owner": "me"}
    content.content_md5 = None  # of another content
    assert info["content_settings"] == content and client.get_blob_tags() == {"run": "7"}
    with fs.open(path, "a", content_type="text/plain", metadata={}) as text:
        text.write("3\n")
    info = fs.info(path)
    assert info["metadata"] == {} and info["content_settings"].content_type == "text/plain"
    assert info["content_settings"].content_encoding == "gzip" and client.get_blob_tags() == {"run": "7"}
