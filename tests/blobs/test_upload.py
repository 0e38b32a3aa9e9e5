"""Uploads cut items into blocks and lose none."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from typing import Any

import pytest

from azure_torch_ckpt import options as options_module
from azure_torch_ckpt._internal.checksums import crc64, header_value
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.upload import Upload
from azure_torch_ckpt.errors import AccessDeniedError
from tests.blobs.stores import read, some_bytes, views_of
from tests.support.faults import Answer, Call, Cut, Gate, Hold
from tests.support.proxy import FaultProxy, meet

pytest_plugins = ("tests.blobs.stores",)


@pytest.mark.parametrize("checksums", [True, False])
def test_items_follow_one_another_across_blocks(
    make_store: Callable[..., BlobStore], proxy: FaultProxy, checksums: bool
) -> None:
    store = make_store(block_size=1000, checksums=checksums)
    sizes = [0, 1, 998, 1, 1000, 0, 1001, 3500, 7, 0, 999, 2000, 0]
    contents = [some_bytes(size) for size in sizes]
    with Upload(store, "blob", sum(sizes)) as upload:
        items = [upload.add(views_of(content, 1 + number % 4)) for number, content in enumerate(contents)]
        upload.finish()
    whole = b"".join(contents)
    assert read(store) == whole
    assert [item.length for item in items] == sizes
    assert [whole[item.offset : item.offset + item.length] for item in items] == contents
    if checksums:
        assert [item.crc64() for item in items] == [crc64(content) for content in contents]
    # Ids count upwards, and every block but the last is full.
    blocks = sorted(proxy.requests("Put Block"), key=lambda seen: base64.b64decode(seen.query["blockid"]))
    assert [seen.body_length for seen in blocks] == [1000] * (len(whole) // 1000) + [len(whole) % 1000]
    expected = [header_value(crc64(whole[start : start + 1000])) for start in range(0, len(whole), 1000)]
    sent = [seen.headers.get("x-ms-content-crc64") for seen in blocks]
    assert sent == (expected if checksums else [None] * len(blocks))
    assert proxy.count("Put Block List") == 1


@pytest.mark.parametrize("size", [999, 1000, 1001, 2000])
def test_a_blob_that_ends_with_its_block_has_no_empty_one(
    make_store: Callable[..., BlobStore], proxy: FaultProxy, size: int
) -> None:
    with Upload(make_store(block_size=1000), "blob", size) as upload:
        item = upload.add([memoryview(some_bytes(size))])
        upload.finish()
    assert item.crc64() == crc64(some_bytes(size))
    assert proxy.count("Put Block") == -(-size // 1000)
    assert read(make_store()) == some_bytes(size)


@pytest.mark.parametrize("items", [[], [[]], [[memoryview(b"")], [], [memoryview(b""), memoryview(b"")]]])
def test_without_bytes_nothing_is_written(
    make_store: Callable[..., BlobStore], proxy: FaultProxy, items: list[list[memoryview]]
) -> None:
    with Upload(make_store(), "blob", 0) as upload:
        added = [upload.add(views) for views in items]
        upload.finish()
    assert [(item.offset, item.length, item.crc64()) for item in added] == [(0, 0, 0)] * len(items)
    assert proxy.count() == 0


def test_blocks_grow_where_nobody_knows_the_length(
    make_store: Callable[..., BlobStore], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options_module, "_BLOCKS_PER_SIZE", 2)
    store = make_store(block_size=1000)
    data = some_bytes(20_500)
    with Upload(store, "blob", None) as upload:
        items = [upload.add([view]) for view in views_of(data, 9)]
        upload.finish()
    assert read(store) == data
    assert [item.crc64() for item in items] == [crc64(view) for view in views_of(data, 9)]
    blocks = sorted(proxy.requests("Put Block"), key=lambda seen: base64.b64decode(seen.query["blockid"]))
    sizes = [seen.body_length for seen in blocks[:-1]]
    assert sizes[:2] == [1000, 1000] and sizes == sorted(sizes) and sizes[-1] > 2000


def test_memory_can_be_taken_back_and_more_be_added(make_store: Callable[..., BlobStore]) -> None:
    store = make_store(block_size=1000)
    memory = bytearray(b"a" * 1500)
    with Upload(store, "blob", 5000) as upload:
        first = upload.add([memoryview(memory)[:700], memoryview(memory)[700:]])
        upload.settle()
        memory[:] = b"b" * 1500
        second = upload.add([memoryview(memory)])
        ids = upload.stage()
        memory[:] = b"c" * 1500
        upload.add([memoryview(b"end")])
        upload.finish()
    assert read(store) == b"a" * 1500 + b"b" * 1500 + b"end"
    assert (first.crc64(), second.crc64()) == (crc64(b"a" * 1500), crc64(b"b" * 1500))
    assert len(ids) == 3 and store.committed_blocks("blob")[:3] == ids


def test_views_that_are_copies_are_not_divided(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    data = some_bytes(4700)
    with Upload(make_store(block_size=1000), "blob", len(data)) as upload:
        item = upload.add([memoryview(data[:600]), memoryview(data[600:1200]), memoryview(data[1200:])], copies=True)
        upload.finish()
    assert read(make_store()) == data and item.crc64() == crc64(data)
    # The third one is longer than a block, so it is divided.
    assert sorted(seen.body_length for seen in proxy.requests("Put Block")) == [100, 600, 1000, 1000, 1000, 1000]


@pytest.mark.parametrize("wait", [True, False])
def test_an_aborted_upload_commits_nothing(make_store: Callable[..., BlobStore], proxy: FaultProxy, wait: bool) -> None:
    gate = Gate()
    proxy.when("Put Block", times=None).do(Hold(gate))
    upload = Upload(make_store(block_size=1000), "blob", 3500)
    upload.add([memoryview(bytes(3500))])
    gate.wait_for(3)
    upload.abort(wait=wait)  # although the gate stays closed
    with pytest.raises(ConnectionAbortedError):
        upload.finish()
    assert proxy.count("Put Block List") == 0


def test_an_error_of_a_block_stops_the_upload(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=1000)
    store.put("blob", b"old")
    proxy.when("Put Block", nth=3).do(Answer(403, "AuthorizationFailure"))
    proxy.when("Put Block", nth=4, times=None).do(Hold())
    with pytest.raises(AccessDeniedError), Upload(store, "blob", 200_000) as upload:
        for _ in range(200):
            upload.add([memoryview(bytes(1000))])
        upload.finish()
    assert proxy.count("Put Block") <= 2 + store.options.concurrency  # those in flight, and no later one
    assert proxy.count("Put Block List") == 0
    assert read(store) == b"old"


def test_an_error_of_the_last_block_is_raised_by_finish(
    make_store: Callable[..., BlobStore], proxy: FaultProxy
) -> None:
    proxy.when("Put Block").do(Answer(403, "AuthorizationFailure"))
    with Upload(make_store(), "blob", 4) as upload:
        upload.add([memoryview(b"data")])
        with pytest.raises(AccessDeniedError):
            upload.finish()
    assert proxy.count("Put Block List") == 0


@pytest.mark.usefixtures("patient")
def test_an_error_breaks_off_the_blocks_that_hang(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=1000)
    gate = Gate()
    proxy.when("Put Block", times=3).do(Hold(gate))
    proxy.when("Put Block", nth=4).do(Call(lambda: gate.wait_for(3), "request"), Answer(403, "AuthorizationFailure"))
    with pytest.raises(AccessDeniedError), Upload(store, "blob", 4000) as upload:
        upload.add([memoryview(bytes(4000))])
        upload.finish()


def test_an_error_of_the_caller_commits_nothing(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=1000)
    store.put("blob", b"old")
    gate = Gate()
    proxy.when("Put Block", times=None).do(Hold(gate))
    with pytest.raises(KeyError, match="mine"), Upload(store, "blob", 3500) as upload:
        upload.add([memoryview(bytes(3500))])
        gate.wait_for(3)
        raise KeyError("mine")  # the three that hang must not hold it up
    assert proxy.count("Put Block List") == 0
    assert read(store) == b"old"


def test_add_waits_while_enough_blocks_are_under_way(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=1000, concurrency=3)
    gate = Gate()
    proxy.when("Put Block", times=None).do(Hold(gate))
    added = 0
    noted = threading.Condition()

    def upload_all() -> None:
        nonlocal added
        with Upload(store, "blob", 20_000) as upload:
            for number in range(20):
                upload.add([memoryview(bytes([number]) * 1000)])
                with noted:
                    added += 1
                    noted.notify_all()
            upload.finish()

    thread = threading.Thread(target=upload_all)
    thread.start()
    gate.wait_for(3)
    with noted:
        # 3 in flight, 2 ready, and the one that is full and can only be handed over when there is room.
        assert noted.wait_for(lambda: added == 6, 60)
        assert not noted.wait_for(lambda: added > 6, 0.3)
    assert proxy.in_flight == 3
    gate.open()
    thread.join(60)
    assert added == 20 and proxy.most_in_flight == 3
    assert read(store) == b"".join(bytes([number]) * 1000 for number in range(20))


@pytest.mark.parametrize("fault", [Cut("answer"), Cut("request"), Answer(500, "InternalError")])
def test_an_upload_survives_faults(make_store: Callable[..., BlobStore], proxy: FaultProxy, fault: Any) -> None:
    store = make_store(block_size=100_000)
    data = some_bytes(1_050_000)
    for nth in (2, 5, 6, 11):
        proxy.when("Put Block", nth=nth).do(fault)
    proxy.when("Put Block List").do(fault)
    with Upload(store, "blob", len(data)) as upload:
        item = upload.add(views_of(data, 7))
        upload.finish()
    assert read(store) == data and item.crc64() == crc64(data)


def test_a_busy_service_gets_fewer_requests_and_everything(
    make_store: Callable[..., BlobStore], proxy: FaultProxy
) -> None:
    store = make_store(block_size=1000, concurrency=16, retry_seconds=60)
    proxy.max_in_flight = 2
    meet(proxy, 3, "Put Block")
    data = some_bytes(60_000)
    with Upload(store, "blob", len(data)) as upload:
        upload.add([memoryview(data)])
        upload.finish()
    assert read(store) == data
    refused = sum(seen.status == 503 for seen in proxy.log)
    assert 0 < refused < 60
