"""`BlobIO` as a file: what it promises about reading, writing, errors and requests."""

from __future__ import annotations

import array
import contextlib
import copy
import io
import multiprocessing
import os
import pickle
import random
import threading
import tracemalloc
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobClient, ContainerSasPermissions, generate_container_sas

import azure_torch_ckpt.blockwriter
import azure_torch_ckpt.options
from azure_torch_ckpt import (
    AccessDeniedError,
    BlobChangedError,
    BlobExistsError,
    BlobIO,
    BlobLocation,
    BlobNotFoundError,
    ContainerNotFoundError,
    LocationError,
    StoreError,
    TransferOptions,
)
from azure_torch_ckpt.emulator import Azurite
from tests.faults import Answer, Call, Cut, Gate, Hold
from tests.proxy import FaultProxy

MIB = 1024 * 1024
LINES = random.Random(0).randbytes(3 * MIB).replace(b"\x07", b"\n")


def client(url: str) -> BlobClient:
    location = BlobLocation.parse(url)
    return BlobClient(location.endpoint, location.container, location.path, credential=Azurite.account_key)


def put(url: str, data: bytes) -> None:
    client(url).upload_blob(data, overwrite=True)


def content(url: str) -> bytes:
    return client(url).download_blob().readall()


@pytest.fixture
def url(container: str) -> str:
    return container + "/folder/blob.bin"


@pytest.fixture
def proxied(proxied_container: str) -> str:
    return proxied_container + "/folder/blob.bin"


@pytest.fixture
def lines(proxied: str, url: str) -> str:
    """A blob of 3 MiB with a line end every 256 bytes or so."""
    put(url, LINES)
    return proxied


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
    with pytest.raises(ValueError, match="no URL"):
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
    for name in ("read", "readline", "tell", "readable", "writable", "seekable", "flush", "__enter__", "__next__"):
        with pytest.raises(ValueError, match="closed"):
            getattr(file, name)()


@pytest.mark.parametrize("mode", ["rb", "wb"])
def test_cannot_be_pickled_or_copied(url: str, mode: Any):
    file = BlobIO(url + "?sig=secret", mode)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pass its URL") as caught:
            attempt(file)
        assert "secret" not in str(caught.value)
    file.abort()


def test_respects_sas_and_shows_it_nowhere(url: str):
    put(url, b"data")
    location = BlobLocation.parse(url)
    sas = generate_container_sas(
        Azurite.account_name,
        location.container,
        account_key=Azurite.account_key,
        permission=ContainerSasPermissions(read=True),
        expiry=datetime.now(timezone.utc) + timedelta(hours=1),
    )
    with BlobIO(f"{url}?{sas}", "rb", credential=False) as file:
        assert file.read() == b"data"
        assert file.name == url
        assert "sig=" not in repr(file)
    with BlobIO(url, "rb", credential=False) as file, pytest.raises(PermissionError) as caught:
        file.read()
    assert isinstance(caught.value, AccessDeniedError)


def test_xb_needs_no_permission_to_read(url: str):
    location = BlobLocation.parse(url)
    sas = generate_container_sas(
        Azurite.account_name,
        location.container,
        account_key=Azurite.account_key,
        permission=ContainerSasPermissions(write=True),
        expiry=datetime.now(timezone.utc) + timedelta(hours=1),
    )
    with BlobIO(f"{url}?{sas}", "xb") as file:
        file.write(b"new")
    with pytest.raises(FileExistsError), BlobIO(f"{url}?{sas}", "xb") as file:
        file.write(b"newer")
    assert content(url) == b"new"


@pytest.mark.parametrize(
    "credential",
    [
        None,
        Azurite.account_key,
        AzureNamedKeyCredential(Azurite.account_name, Azurite.account_key),
        f"AccountName={Azurite.account_name};AccountKey={Azurite.account_key}",
    ],
    ids=["default", "key", "named key", "connection string"],
)
def test_takes_every_kind_of_credential(url: str, credential: Any):
    with BlobIO(url, "wb", credential=credential) as file:
        file.write(b"data")
    with BlobIO(url, "rb", credential=credential) as file:
        assert file.read() == b"data"


def test_takes_tokens_over_tls(azurite_tls: Azurite, token_credential: Any):
    container = azurite_tls.create_container(f"test-{uuid.uuid4().hex}")
    options: dict[str, Any] = {"credential": token_credential, "ca_file": str(azurite_tls.certificate)}
    with BlobIO(container + "/blob", "wb", **options) as file:
        file.write(LINES)
    with BlobIO(container + "/blob", "rb", **options) as file:
        assert file.read() == LINES


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


# What reading costs


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
    assert sizes[:4] == [256 * 1024, 512 * 1024, MIB, 2 * MIB]
    assert len(sizes) <= 12


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


# Writing


@pytest.mark.parametrize("seed", range(4))
def test_writes_what_was_written(url: str, seed: int):
    chance = random.Random(seed)
    expected = io.BytesIO()
    options = TransferOptions(concurrency=3, block_size=chance.choice([1_000, 100_000, MIB]))
    with BlobIO(url, "wb", options=options) as file:
        for _ in range(40):
            data = chance.randbytes(chance.choice([0, 1, 50, 3_000, 40_000]))
            assert file.write(data) == len(data)
            expected.write(data)
            if chance.random() < 0.1:
                file.flush()
            assert file.tell() == expected.tell()
    assert content(url) == expected.getvalue()
    assert file.etag == client(url).get_blob_properties().etag


def test_takes_every_contiguous_buffer_and_nothing_else(url: str):
    numbers = np.arange(6, dtype=np.int32).reshape(2, 3)
    buffers: list[Any] = [
        b"a",
        bytearray(b"bc"),
        memoryview(b"def"),
        numbers.data,
        array.array("i", range(6)),
        np.ones((0, 3)).data,
    ]
    with BlobIO(url, "wb") as file:
        assert [file.write(buffer) for buffer in buffers] == [1, 2, 3, 24, 24, 0]
        file.writelines([b"x", b"yz"])
        for wrong in ("text", 1, None, [b"a"], memoryview(b"abcd")[::2]):
            with pytest.raises(TypeError):
                file.write(wrong)  # type: ignore[arg-type]
    assert content(url) == b"abcdef" + numbers.tobytes() * 2 + b"xyz"


def test_refuses_what_a_file_for_writing_refuses(url: str):
    with BlobIO(url, "wb") as file:
        assert (file.readable(), file.writable(), file.seekable(), file.tell()) == (False, True, False, 0)
        refused = (file.read, file.readline, file.peek, file.read1, file.readall, file.fileno, file.truncate)
        for use in (*refused, lambda: file.seek(0), lambda: next(file), lambda: file.readinto(bytearray(1))):
            with pytest.raises(io.UnsupportedOperation):
                use()
    for name in ("flush", "tell", "writable", "__enter__"):
        with pytest.raises(ValueError, match="closed"):
            getattr(file, name)()
    with pytest.raises(ValueError, match="closed"):
        file.write(b"")
    file.close()


def test_memory_may_change_after_write(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(azure_torch_ckpt.blockwriter, "_DIRECT", 2 * MIB)
    data = bytearray(5 * MIB // 2)
    with BlobIO(url, "wb", options=TransferOptions(block_size=MIB)) as file:
        for letter in b"abc":
            data[:] = bytes([letter]) * len(data)
            file.write(data)
            file.write(data[:10])
        data[:] = bytes(len(data))
    got = content(url)
    assert len(got) == 3 * (len(data) + 10)
    for number, letter in enumerate(b"abc"):
        assert got[number * (len(data) + 10) : (number + 1) * (len(data) + 10)].strip(bytes([letter])) == b""


def test_large_writes_are_not_copied_and_small_ones_are_bounded(url: str):
    options = TransferOptions(concurrency=3, block_size=MIB)
    data = np.ones(70 * MIB, dtype=np.uint8)
    tracemalloc.start()
    with BlobIO(url, "wb", options=options) as file:
        file.write(data.data)
        large = tracemalloc.get_traced_memory()[1]
        for _ in range(300):
            file.write(data[:100_000].data)
        small = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert large < 3 * MIB  # the part of the last block
    assert small < 14 * MIB  # 3 blocks on their way, 2 ready, 1 full, 1 being filled, of 30


def test_blocks_wait_for_nobody(proxy: FaultProxy, proxied: str, url: str):
    gate = Gate()
    proxy.when("Put Block", times=None).do(Hold(gate))
    with BlobIO(proxied, "wb", options=TransferOptions(concurrency=4, block_size=1000)) as file:
        file.write(LINES[:5500])
        gate.wait_for(4)
        gate.open()
    assert content(url) == LINES[:5500]


def test_blocks_grow_with_the_blob(proxy: FaultProxy, proxied: str, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(azure_torch_ckpt.options, "_BLOCKS_PER_SIZE", 4)
    with BlobIO(proxied, "wb", options=TransferOptions(concurrency=1, block_size=1000)) as file:
        file.write(LINES[:40_000])
    sizes = [request.body_length for request in proxy.requests("Put Block")]
    assert sizes == [1000] * 4 + [2000] * 2 + [4000] * 2 + [8000] * 2 + [8000]
    assert content(url) == LINES[:40_000]


@pytest.mark.parametrize("block_size", [None, 1, MIB, 4_000 * MIB])
def test_50_000_blocks_are_enough(block_size: int | None):
    options = TransferOptions(block_size=block_size)
    offset = 0
    for _ in range(50_000 - 4_000):  # flushes may make 4,000 short ones
        size = options.block_size_at(offset)
        assert size <= 4_000 * MIB
        offset += size
    assert offset > (block_size or 8 * MIB) * 4 * 10**6 or offset > 40 * 1024**4


def test_nothing_is_there_before_close(url: str):
    put(url, b"old")
    with BlobIO(url, "wb", options=TransferOptions(block_size=100)) as file:
        file.write(LINES[:1000])
        file.flush()
        assert content(url) == b"old"
    assert content(url) == LINES[:1000]


def test_flush_sends_everything_until_it_would_cost_too_many_blocks(
    proxy: FaultProxy, proxied: str, url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(azure_torch_ckpt.blockwriter, "_SHORT_BLOCKS", 3)
    with BlobIO(proxied, "wb", options=TransferOptions(block_size=1000)) as file:
        for blocks in (1, 2, 3, 3, 3, 3, 4, 5):  # a full one is sent when the next one begins
            file.write(b"x" * 600)
            file.flush()
            assert proxy.count("Put Block") == blocks
    assert content(url) == b"x" * 4800


def test_writes_an_empty_blob(url: str):
    put(url, b"old")
    BlobIO(url, "wb").close()
    assert content(url) == b""
    with BlobIO(url, "rb") as file:
        assert file.read() == file.readline() == file.peek() == b""
        assert file.seek(0, os.SEEK_END) == 0


def test_carries_content_type_metadata_and_tags(url: str):
    settings: dict[str, Any] = {"content_type": "application/x-pt", "metadata": {"step": "7"}, "tags": {"run": "a/b 1"}}
    for mode in ("xb", "wb"):
        with BlobIO(url, mode, **settings) as file:
            file.write(b"data")
        properties = client(url).get_blob_properties()
        assert properties.content_settings.content_type == "application/x-pt"
        assert properties.metadata == {"step": "7"}
        assert client(url).get_blob_tags() == {"run": "a/b 1"}
    with BlobIO(url, "wb") as file:
        file.write(b"data")
    properties = client(url).get_blob_properties()
    assert properties.content_settings.content_type == "application/octet-stream"
    assert properties.metadata == {} == client(url).get_blob_tags()


# What is not committed


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_exception_inside_with_commits_nothing(
    proxy: FaultProxy, proxied: str, url: str, error: type[BaseException], old: bytes | None
):
    if old is not None:
        put(url, old)
    with pytest.raises(error), BlobIO(proxied, "wb", options=TransferOptions(block_size=100)) as file:
        file.write(LINES[:1050])
        raise error
    assert file.closed
    assert_untouched(proxy, url, old)


def test_garbage_collection_commits_nothing_and_tells(proxy: FaultProxy, proxied: str, url: str):
    put(url, b"old")
    file = BlobIO(proxied, "wb", options=TransferOptions(block_size=100))
    file.write(LINES[:1050])
    with pytest.warns(ResourceWarning, match="never closed, so nothing was written"):
        del file
    assert_untouched(proxy, url, b"old")


def test_abort_commits_nothing_and_stops_what_is_under_way(proxy: FaultProxy, proxied: str, url: str):
    gate = Gate()
    proxy.when("Put Block", times=None).do(Hold(gate))
    file = BlobIO(proxied, "wb", options=TransferOptions(concurrency=2, block_size=100))
    file.write(b"x" * 400)
    gate.wait_for(2)
    file.abort()  # returns, although nobody opens the gate
    assert file.closed
    file.close()
    gate.open()
    assert_untouched(proxy, url, None)


def assert_untouched(proxy: FaultProxy, url: str, old: bytes | None) -> None:
    assert proxy.count("Put Block List", "Put Blob", "Delete") == 0
    if old is None:
        assert not client(url).exists()
    else:
        assert content(url) == old


@pytest.mark.parametrize("direct", [False, True])
def test_after_a_failed_write_nothing_is_committed(
    proxy: FaultProxy, proxied: str, url: str, direct: bool, monkeypatch: pytest.MonkeyPatch
):
    if direct:
        monkeypatch.setattr(azure_torch_ckpt.blockwriter, "_DIRECT", 1000)
    put(url, b"old")
    proxy.when("Put Block", nth=2, times=None).do(Answer(403, "AuthorizationPermissionMismatch"))
    file = BlobIO(proxied, "wb", options=TransferOptions(concurrency=2, block_size=100))
    with pytest.raises(AccessDeniedError, match="403"):
        file.write(bytes(1000))
        file.flush()
    for _ in range(10):  # more often than there are places for blocks
        for use in (lambda: file.write(b"x"), file.flush):
            with pytest.raises(StoreError, match="Open the blob again") as caught:
                use()
            assert isinstance(caught.value.__cause__, AccessDeniedError)
    with pytest.raises(StoreError, match="nothing of it is committed"):
        file.close()
    assert file.closed
    file.close()
    assert_untouched(proxy, url, b"old")


def test_writes_over_a_service_that_falters(proxy: FaultProxy, proxied: str, url: str):
    proxy.when("Put Block", nth=2).do(Cut("request"))
    proxy.when("Put Block", nth=4).do(Answer(503, "ServerBusy"))
    proxy.when("Put Block List").do(Cut("answer"))
    with BlobIO(proxied, "wb", options=TransferOptions(concurrency=2, block_size=100)) as file:
        file.write(LINES[:1050])
    assert content(url) == LINES[:1050]
    proxy.when("Get Blob").do(Cut(70_000))
    with BlobIO(proxied, "rb") as file:
        assert file.read() == LINES[:1050]


# Conditions on what is written


def test_xb_makes_a_blob_and_never_replaces_one(proxy: FaultProxy, proxied: str, url: str):
    with BlobIO(proxied, "xb") as file:
        file.write(b"first")
    with pytest.raises(FileExistsError) as caught:
        BlobIO(proxied, "xb")
    assert isinstance(caught.value, BlobExistsError)
    assert content(url) == b"first"
    assert proxy.count("Put Block") == 1  # the second one did not upload anything


@pytest.mark.parametrize("data", [b"", b"mine"])
def test_xb_loses_a_race_and_leaves_the_winner_alone(url: str, data: bytes):
    file = BlobIO(url, "xb")
    file.write(data)
    put(url, b"theirs")
    with pytest.raises(BlobExistsError, match="left alone"):
        file.close()
    assert content(url) == b"theirs"


def test_replaces_only_the_version_that_was_meant(url: str):
    put(url, b"one")
    etag = client(url).get_blob_properties().etag
    with BlobIO(url, "wb", if_etag=etag) as file:
        file.write(b"two")
    assert content(url) == b"two"
    with pytest.raises(BlobChangedError, match="left alone"), BlobIO(url, "wb", if_etag=etag) as file:
        file.write(b"three")
    assert content(url) == b"two"


@pytest.mark.parametrize("mode", ["xb", "wb"])
def test_a_conditional_commit_survives_the_loss_of_its_answer(proxy: FaultProxy, proxied: str, url: str, mode: Any):
    etag = None
    if mode == "wb":
        put(url, b"old")
        etag = client(url).get_blob_properties().etag
    proxy.when("Put Block List").do(Cut("answer"))
    with BlobIO(proxied, mode, if_etag=etag) as file:
        file.write(b"new")
    assert content(url) == b"new"
    assert file.etag == client(url).get_blob_properties().etag
    assert [request.status for request in proxy.requests("Put Block List")][1] in (409, 412)


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
    child.join(30)
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


@contextlib.contextmanager
def opening(gate: Gate, at: int) -> Iterator[None]:
    """Open the gate as soon as `at` requests stand before it at once. The caller waits for ever with fewer."""

    def run() -> None:
        gate.wait_for(at)
        gate.open()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
