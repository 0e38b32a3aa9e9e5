"""`BlobIO` as a file: arguments, reading, wrong uses, credentials, versions."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
from typing import Any

import pytest
from azure.core.credentials import AzureNamedKeyCredential

from azure_torch_ckpt import (
    AccessDeniedError,
    BlobIO,
    BlobNotFoundError,
    ContainerNotFoundError,
    CredentialError,
    LocationError,
)
from tests.blobs.stores import sas_for
from tests.io.blobs import LINES, MIB, client, content, put
from tests.support.proxy import FaultProxy

pytest_plugins = ("tests.io.blobs",)

# Arguments


@pytest.mark.parametrize("mode", ["r", "w", "a", "ab", "rt", "rb+", "r+b", "wb+", "br", "", None, 1])
def test_refuses_other_modes(url: str, mode: Any):
    with pytest.raises(ValueError, match="Unsupported mode"):
        BlobIO(url, mode)


def test_refuses_arguments_that_are_not_for_the_mode(url: str, container: str):
    moment = "2026-01-31T12:00:00.1234567Z"
    for mode in ("wb", "xb"):
        for query in ("snapshot", "versionid"):
            with pytest.raises(LocationError, match="never changes"):
                BlobIO(f"{url}?{query}={moment}", mode)
    for settings in ({"content_type": "a/b"}, {"metadata": {"a": "b"}}, {"tags": {"a": "b"}}):
        with pytest.raises(ValueError, match="for writing"):
            BlobIO(url, "rb", **settings)
    with pytest.raises(ValueError, match="if_etag"):
        BlobIO(url, "xb", if_etag='"0x1"')
    with pytest.raises(LocationError, match="is a container"):
        BlobIO(container, "rb")
    with pytest.raises(ValueError, match="not a URL"):
        BlobIO("blob.bin", "rb")
    with pytest.raises(TypeError, match="positional"):
        BlobIO(url, "rb", None)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "settings",
    [
        {"content_type": "text/plain\r\nx-ms-lease-id: 1"},
        {"metadata": {"a-b": "c"}},
        {"metadata": {"a": "\u00fc"}},
        {"metadata": {"a": "x" * 8192}},
        {"tags": {str(number): "" for number in range(11)}},
        {"tags": {"": "a"}},
        {"tags": {"a": "b&c"}},
        {"tags": {"a": "b" * 257}},
    ],
    ids=str,
)
def test_settings_that_the_service_would_refuse_are_refused_before_anything_is_uploaded(url: str, settings: Any):
    with pytest.raises(ValueError):
        BlobIO(url, "wb", **settings)


# Reading


@pytest.mark.parametrize("seed", range(6))
def test_reads_what_a_local_file_reads(url: str, seed: int):
    chance = random.Random(seed)
    data = LINES[: chance.choice([1, 5_000, 700_000, 3 * MIB])]
    put(url, data)
    expected = io.BytesIO(data)
    file = BlobIO(url, "rb")
    for _ in range(300):
        size = chance.choice([0, 1, 7, 300, 5_000, 200_000, 2 * MIB])
        action = chance.randrange(8)
        if action == 0:
            offset = chance.randrange(len(data) + 100)
            assert file.seek(offset) == expected.seek(offset)
        elif action == 1:
            offset = -chance.randrange(len(data))
            assert file.seek(offset, os.SEEK_END) == expected.seek(offset, os.SEEK_END)
        elif action == 2:
            offset = max(-expected.tell(), chance.randrange(-1000, 1000))
            assert file.seek(offset, os.SEEK_CUR) == expected.seek(offset, os.SEEK_CUR)
        elif action == 3:
            ours, theirs = bytearray(size), bytearray(size)
            assert file.readinto(ours) == expected.readinto(theirs)
            assert ours == theirs
        elif action == 4:
            assert file.readline() == expected.readline()
        elif action == 5:
            assert file.readline(min(size, 300)) == expected.readline(min(size, 300))
        elif action == 6:
            ahead = file.peek(1)
            got = file.read1(size)
            assert got.startswith(ahead[:size]) and len(got) <= size and (got or not size or not ahead)
            assert got == expected.read(len(got))
        else:
            assert file.read(size) == expected.read(size)
        assert file.tell() == expected.tell()
    file.seek(0)
    assert file.read() == data
    assert file.read() == file.read(5) == file.readline() == file.read1() == file.peek() == b""
    assert file.readinto(bytearray(5)) == 0


def test_iterates_over_lines_and_serves_wrappers(url: str):
    put(url, b"one\ntwo\n\nfour")
    with BlobIO(url, "rb") as file:
        assert list(file) == [b"one\n", b"two\n", b"\n", b"four"]
        assert file.seek(0) == 0
        assert file.readlines(5) == [b"one\n", b"two\n"]
        assert file.readall() == b"\nfour"
        file.seek(4)
        assert file.read(None) == b"two\n\nfour"
        file.seek(0)
        assert io.TextIOWrapper(file, "ascii").read() == "one\ntwo\n\nfour"


def test_refuses_what_a_file_for_reading_refuses(url: str):
    put(url, b"data")
    file = BlobIO(url, "rb")
    assert (file.readable(), file.writable(), file.seekable(), file.isatty()) == (True, False, True, False)
    assert (file.mode, file.name, file.closed) == ("rb", url, False)
    for use in (lambda: file.write(b""), lambda: file.writelines([b"a"]), file.fileno, file.truncate, file.detach):
        with pytest.raises(io.UnsupportedOperation):
            use()
    for number in (1.0, "1", b"1"):
        for name in ("read", "readline", "seek"):
            with pytest.raises(TypeError):
                getattr(file, name)(number)
    with pytest.raises(TypeError):
        file.seek(0, None)  # type: ignore[arg-type]
    for wrong in (lambda: file.read(-2), lambda: file.seek(-1), lambda: file.seek(-5, 2), lambda: file.seek(0, 3)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError, match="writable buffer"):
        file.readinto(b"1234")
    assert file.tell() == 0
    file.flush()
    assert file.read() == b"data"
    file.close()
    file.close()
    for name in ("read", "readline", "tell", "readable", "seekable", "flush", "__enter__", "__next__"):
        with pytest.raises(ValueError, match="closed"):
            getattr(file, name)()
    assert not file.writable()
    with pytest.raises(io.UnsupportedOperation):
        file.write(b"")


@pytest.mark.parametrize("mode", ["rb", "wb"])
def test_cannot_be_pickled_or_copied(url: str, mode: Any):
    file = BlobIO(url + "?sig=secret", mode)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pass its URL") as caught:
            attempt(file)
        assert "secret" not in str(caught.value)
    file.abort()


def test_respects_sas_and_shows_it_nowhere(url: str, container: str):
    put(url, b"data")
    sas = sas_for(container, "r")
    with BlobIO(f"{url}?{sas}", "rb", credential=False) as file:
        assert file.read() == b"data"
        assert file.name == url
        assert "sig=" not in repr(file)
    with BlobIO(url, "rb", credential=False) as file, pytest.raises(PermissionError) as caught:
        file.read()
    assert isinstance(caught.value, AccessDeniedError)


def test_xb_needs_no_permission_to_read(url: str, container: str):
    sas = sas_for(container, "w")
    with BlobIO(f"{url}?{sas}", "xb") as file:
        file.write(b"new")
    with pytest.raises(FileExistsError), BlobIO(f"{url}?{sas}", "xb") as file:
        file.write(b"newer")
    assert content(url) == b"new"


@pytest.mark.parametrize(
    "wrong", [object(), AzureNamedKeyCredential, 1, True, b"key"], ids=["object", "class", "int", "bool", "bytes"]
)
def test_refuses_what_is_no_credential(url: str, wrong: Any):
    for mode in ("rb", "wb"):
        with pytest.raises(TypeError, match="not a credential") as caught:
            BlobIO(url, mode, credential=wrong)
        assert isinstance(caught.value, CredentialError)


def test_reads_snapshots_and_asks_for_versions(proxy: FaultProxy, proxied: str, url: str):
    put(url, b"old")
    snapshot = client(url).create_snapshot()["snapshot"]
    put(url, b"and new" * MIB)
    with BlobIO(f"{proxied}?snapshot={snapshot}", "rb") as file:
        assert file.seek(0, os.SEEK_END) == 3
        file.seek(0)
        assert file.read() == b"old"
    # Azurite has no versions and reads the current one; here it matters that every request names it, parallel ones too.
    proxy.log.clear()
    version = "2026-01-31T12:00:00.1234567Z"
    with BlobIO(f"{proxied}?versionid={version}", "rb") as file:
        assert file.read() == b"and new" * MIB
    requests = proxy.requests("Get Blob")
    assert len(requests) > 1
    assert {request.query.get("versionid") for request in requests} == {version}


def test_missing_blobs_show_at_the_first_read(url: str, container: str):
    for use in (BlobIO.read, BlobIO.readline, BlobIO.peek, lambda file: file.seek(0, 2), lambda file: file.etag):
        with BlobIO(url, "rb") as file, pytest.raises(FileNotFoundError) as caught:
            use(file)
        assert isinstance(caught.value, BlobNotFoundError)
    with BlobIO(container + "-gone/blob", "rb") as file, pytest.raises(ContainerNotFoundError):
        file.read()
