"""Requests and memory of reading with `BlobIO`, one version of the blob for all reads, forks."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

from azure_torch_ckpt import BlobChangedError, BlobIO, BlobNotFoundError, StoreError, TransferOptions
from tests.io.blobs import LINES, MIB, client, content, opening, put
from tests.support.faults import Call, Gate, Hold
from tests.support.proxy import FaultProxy

pytest_plugins = ("tests.io.blobs",)


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
