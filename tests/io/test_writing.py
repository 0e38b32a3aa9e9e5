"""Writing with `BlobIO`: blocks, memory, conditions, and writes that are not committed."""

from __future__ import annotations

import array
import io
import os
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

import azure_torch_ckpt.blobs.block_writer
import azure_torch_ckpt.options
from azure_torch_ckpt import AccessDeniedError, BlobChangedError, BlobExistsError, BlobIO, StoreError, TransferOptions
from tests.io.blobs import LINES, MIB, client, content, put
from tests.support.faults import Answer, Cut, Gate, Hold
from tests.support.proxy import FaultProxy

pytest_plugins = ("tests.io.blobs",)

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
    assert not file.readable() and not file.seekable()
    with pytest.raises(io.UnsupportedOperation):
        file.read()
    file.close()


def test_memory_may_change_after_write(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(azure_torch_ckpt.blobs.block_writer, "_DIRECT", 2 * MIB)
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
    assert large < 3 * MIB  # the rest in the last block
    assert small < 14 * MIB  # 3 blocks in flight, 2 ready, 1 full, 1 being filled, of 30


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
    monkeypatch.setattr(azure_torch_ckpt.blobs.block_writer, "_SHORT_BLOCKS", 3)
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


# Writes that are not committed


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
    file.abort()  # returns, although the gate stays closed
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
        monkeypatch.setattr(azure_torch_ckpt.blobs.block_writer, "_DIRECT", 1000)
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
