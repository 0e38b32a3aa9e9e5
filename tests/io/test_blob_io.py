"""`BlobIO` as a file that is read: arguments, wrong uses, credentials, one state of the blob, requests, forks."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
from azure.core.credentials import AzureNamedKeyCredential

from azure_torch_ckpt import (
    AccessDeniedError,
    BlobChangedError,
    BlobIO,
    BlobNotFoundError,
    ContainerNotFoundError,
    CredentialError,
    LocationError,
    StoreError,
    TransferOptions,
)
from tests.io.blobs import LINES, MIB, client, content, opening, put
from tests.support.containers import container_sas
from tests.support.faults import Call, Gate, Hold
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
    sas = container_sas(container, "r")
    with BlobIO(f"{url}?{sas}", "rb", credential=False) as file:
        assert file.read() == b"data"
        assert file.name == url
        assert "sig=" not in repr(file)
    with BlobIO(url, "rb", credential=False) as file, pytest.raises(PermissionError) as caught:
        file.read()
    assert isinstance(caught.value, AccessDeniedError)


def test_xb_needs_no_permission_to_read(url: str, container: str):
    sas = container_sas(container, "w")
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


# One state of the blob for all reads


def test_every_request_is_for_the_state_that_was_read_first(proxy: FaultProxy, proxied: str, url: str):
    put(url, LINES * 4)
    with BlobIO(proxied, "rb") as file:
        file.read(1)
        etag = file.etag
        assert etag == client(url).get_blob_properties().etag
        file.read(MIB)
        file.readinto(bytearray(9 * MIB))
        first, *others = proxy.requests("Get Blob", "Head")
        assert "if-match" not in first.headers
        assert len(others) >= 3
        assert {request.headers["if-match"] for request in others} == {etag}


@pytest.mark.parametrize("amount", [100, 9 * MIB], ids=["small", "parallel"])
def test_a_blob_that_is_replaced_meanwhile_is_an_error(proxy: FaultProxy, proxied: str, url: str, amount: int):
    put(url, LINES * 4)
    file = BlobIO(proxied, "rb")
    assert file.read(10) == LINES[:10]
    proxy.when("Get Blob").do(Call(lambda: put(url, LINES * 4), "request"))
    file.seek(3 * MIB)
    memory = bytearray(amount)
    with pytest.raises(BlobChangedError, match="was replaced or removed while"):
        file.readinto(memory)
    assert file.tell() == 3 * MIB


def test_a_blob_that_is_deleted_meanwhile_is_an_error(lines: str, url: str):
    file = BlobIO(lines, "rb")
    file.read(1)
    client(url).delete_blob()
    file.seek(2 * MIB)
    with pytest.raises((BlobChangedError, BlobNotFoundError)):  # Azurite looks at the condition first
        file.read(1)


def test_reads_only_the_version_that_was_asked_for(lines: str, url: str):
    etag = str(client(url).get_blob_properties().etag)
    with BlobIO(lines, "rb", if_etag=etag) as file:
        assert file.read() == LINES
    put(url, b"another")
    for use in (BlobIO.read, lambda file: file.seek(0, os.SEEK_END)):
        with BlobIO(lines, "rb", if_etag=etag) as file, pytest.raises(BlobChangedError, match="another ETag"):
            use(file)


# Requests and memory


def test_a_small_blob_costs_one_request(proxy: FaultProxy, lines: str):
    with BlobIO(lines, "rb") as file:
        assert file.read() == LINES
        assert (file.read(), file.seek(0, 2), file.read(5)) == (b"", len(LINES), b"")
    assert [request.kind for request in proxy.log] == ["Get Blob"]


def test_read_ahead_grows_with_sequential_reads(proxy: FaultProxy, proxied: str, url: str):
    put(url, LINES * 10)
    with BlobIO(proxied, "rb") as file:
        while piece := file.read(10_000):
            pass
        assert piece == b""
    requests = proxy.requests("Get Blob")
    assert sum(request.sent for request in requests) == 30 * MIB  # each byte once
    sizes = [request.sent for request in requests]
    assert sizes[:3] == [256 * 1024, MIB, 4 * MIB]
    assert len(sizes) <= 7


def test_a_stream_of_reads_near_the_end_gets_the_rest_as_well(proxy: FaultProxy, lines: str):
    with BlobIO(lines, "rb") as file:
        file.read(10)
        assert list(file) == io.BytesIO(LINES[10:]).readlines()
    assert [request.sent for request in proxy.requests("Get Blob")] == [256 * 1024, len(LINES) - 256 * 1024]


def test_a_read_of_moderate_size_is_one_request(proxy: FaultProxy, lines: str):
    with BlobIO(lines, "rb") as file:
        for offset, size in ((MIB // 2, 700_000), (2 * MIB, 300_000), (0, 400_000)):
            file.seek(offset)
            before = proxy.count("Get Blob")
            assert file.read(size) == LINES[offset : offset + size]
            assert proxy.count("Get Blob") == before + 1


def test_read_ahead_shrinks_with_jumps(proxy: FaultProxy, proxied: str, url: str):
    put(url, LINES * 10)
    offsets = list(range(0, 28 * MIB, MIB))
    random.Random(1).shuffle(offsets)
    with BlobIO(proxied, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            file.read(100)
    sizes = [request.sent // 1024 for request in proxy.requests("Get Blob")]
    assert sizes == [256, 256, 128, 64] + [32] * 24


def test_the_end_is_read_once_also_backwards(proxy: FaultProxy, lines: str):
    with BlobIO(lines, "rb") as file:
        for distance in (22, 100, 5_000, 60_000, 120_000):
            file.seek(-distance, os.SEEK_END)
            assert file.read() == LINES[-distance:]
    assert [request.kind for request in proxy.log] == ["Head", "Get Blob"]


def test_ranges_stay_for_a_while_within_a_bound(proxy: FaultProxy, proxied: str, url: str):
    put(url, LINES * 10)
    with BlobIO(proxied, "rb", options=TransferOptions(memory_budget=MIB, block_size=MIB)) as file:
        for number, offset in enumerate(range(0, 30 * MIB, MIB)):
            file.seek(offset)
            file.read(10)
            file.seek(0)
            assert file.read(10) == LINES[:10]  # used again and again, so never dropped
            assert proxy.count("Get Blob") == number + 1
        file.seek(MIB)
        file.read(10)
        assert proxy.count("Get Blob") == 31  # not used again
    tracemalloc.start()  # without the proxy, which runs in this process
    with BlobIO(url, "rb", options=TransferOptions(memory_budget=2 * MIB, block_size=MIB)) as file:
        while file.read(100_000):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * MIB


def test_large_reads_go_into_the_callers_memory_in_parallel(proxy: FaultProxy, proxied: str, url: str):
    put(url, LINES * 10)
    gate = Gate()
    proxy.when("Get Blob", nth=2, times=None).do(Hold(gate, "answer"))
    memory = np.empty((29, MIB), dtype=np.uint8)
    with BlobIO(proxied, "rb") as file, opening(gate, at=4):
        file.read(1)
        file.seek(0)
        assert file.readinto(memory.data) == 29 * MIB
    assert memory.tobytes() == (LINES * 10)[: 29 * MIB]
    with BlobIO(url, "rb") as file:  # without the proxy, which runs in this process
        assert file.etag is not None
        tracemalloc.start()
        assert file.readinto(memory.data) == 29 * MIB
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3 * MIB


def test_files_of_a_container_share_their_connections(proxy: FaultProxy, lines: str):
    for _ in range(5):
        with BlobIO(lines, "rb") as file:
            file.read(10)
    assert proxy.connections == 1


# Forks


def _read_on(file: BlobIO) -> None:
    assert file.read(1000) == LINES[2 * MIB + 10 : 2 * MIB + 1010]


def _write_on(file: BlobIO) -> None:
    with pytest.raises(StoreError, match="another process"):
        file.write(b"x")
    with pytest.raises(StoreError, match="another process"):
        file.close()


def in_a_fork(function: Any, file: BlobIO) -> None:
    child = multiprocessing.get_context("fork").Process(target=function, args=(file,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_reads_on_and_cannot_write(lines: str, url: str):
    with BlobIO(lines, "rb") as file:
        file.seek(2 * MIB)
        file.read(10)
        in_a_fork(_read_on, file)
        assert file.read(10) == LINES[2 * MIB + 10 : 2 * MIB + 20]
    with BlobIO(url, "wb", options=TransferOptions(concurrency=2, block_size=100)) as file:
        file.write(LINES[:1050])
        in_a_fork(_write_on, file)
        file.write(LINES[1050:2000])
    assert content(url) == LINES[:2000]
