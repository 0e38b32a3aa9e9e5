"""Uploads cut items into blocks and lose none; downloads fetch what was asked for, with few requests."""

from __future__ import annotations

import base64
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from azure_torch_ckpt import options as options_module
from azure_torch_ckpt.checksums import crc64, header_value
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobChangedError,
    BlobNotFoundError,
    CorruptCheckpointError,
    RequestRefusedError,
    ServiceUnavailableError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.store import BlobStore
from azure_torch_ckpt.transfer import GAP, Check, Download, Read, Upload
from azure_torch_ckpt.workers import Workers
from azure_torch_ckpt.workers import __file__ as workers_file
from tests.faults import Answer, Call, Cut, Flip, Gate, Hold
from tests.proxy import FaultProxy

MIB = 1024 * 1024


@pytest.fixture
def make_store(proxied_container: str) -> Callable[..., BlobStore]:
    def make(**options: Any) -> BlobStore:
        chosen = replace(TransferOptions(concurrency=4, retry_seconds=10), **options)
        return BlobStore(BlobLocation.parse(proxied_container), options=chosen)

    return make


def some_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def views_of(data: bytes, parts: int) -> list[memoryview]:
    cuts = [len(data) * number // parts for number in range(parts + 1)]
    return [memoryview(data)[start:end] for start, end in pairwise(cuts)]


def stored(store: BlobStore, path: str = "blob") -> bytes:
    return store.read(path, limit=1 << 30)[0]


# ---- Upload --------------------------------------------------------------------------------------------------------


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
    assert stored(store) == whole
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
    assert stored(make_store()) == some_bytes(size)


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
    assert stored(store) == data
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
    assert stored(store) == b"a" * 1500 + b"b" * 1500 + b"end"
    assert (first.crc64(), second.crc64()) == (crc64(b"a" * 1500), crc64(b"b" * 1500))
    assert len(ids) == 3 and store.committed_blocks("blob")[:3] == ids


def test_views_that_are_copies_are_not_divided(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    data = some_bytes(4700)
    with Upload(make_store(block_size=1000), "blob", len(data)) as upload:
        item = upload.add([memoryview(data[:600]), memoryview(data[600:1200]), memoryview(data[1200:])], copies=True)
        upload.finish()
    assert stored(make_store()) == data and item.crc64() == crc64(data)
    # The third one is longer than a block: there is no sparing it.
    assert sorted(seen.body_length for seen in proxy.requests("Put Block")) == [100, 600, 1000, 1000, 1000, 1000]


@pytest.mark.parametrize("wait", [True, False])
def test_an_aborted_upload_commits_nothing(make_store: Callable[..., BlobStore], proxy: FaultProxy, wait: bool) -> None:
    gate = Gate()
    proxy.when("Put Block", times=None).do(Hold(gate))
    upload = Upload(make_store(block_size=1000), "blob", 3500)
    upload.add([memoryview(bytes(3500))])
    gate.wait_for(3)
    upload.abort(wait=wait)  # although nobody opens the gate
    with pytest.raises(ConnectionAbortedError):
        upload.finish()
    assert proxy.count("Put Block List") == 0


def test_an_error_of_a_block_stops_the_upload(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=1000)
    store.put("blob", b"old")
    proxy.when("Put Block", nth=3).do(Answer(403, "AuthorizationFailure"))
    with pytest.raises(AccessDeniedError), Upload(store, "blob", 200_000) as upload:
        for _ in range(200):
            upload.add([memoryview(bytes(1000))])
        upload.finish()
    assert proxy.count("Put Block") < 20
    assert proxy.count("Put Block List") == 0
    assert stored(store) == b"old"


def test_an_error_of_the_last_block_is_raised_by_finish(
    make_store: Callable[..., BlobStore], proxy: FaultProxy
) -> None:
    proxy.when("Put Block").do(Answer(403, "AuthorizationFailure"))
    with Upload(make_store(), "blob", 4) as upload:
        upload.add([memoryview(b"data")])
        with pytest.raises(AccessDeniedError):
            upload.finish()
    assert proxy.count("Put Block List") == 0


def test_an_error_breaks_off_the_blocks_that_hang(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=1000)
    gate = Gate()
    proxy.when("Put Block", times=3).do(Hold(gate))
    proxy.when("Put Block", nth=4).do(Call(lambda: gate.wait_for(3), "request"), Answer(403, "AuthorizationFailure"))
    started = time.monotonic()
    with pytest.raises(AccessDeniedError), Upload(store, "blob", 4000) as upload:
        upload.add([memoryview(bytes(4000))])
        upload.finish()
    assert time.monotonic() - started < 10


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
    assert stored(store) == b"old"


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
        assert noted.wait_for(lambda: added == 6, 20)
        assert not noted.wait_for(lambda: added > 6, 0.3)
    assert proxy.in_flight == 3
    gate.open()
    thread.join(30)
    assert added == 20 and proxy.most_in_flight == 3
    assert stored(store) == b"".join(bytes([number]) * 1000 for number in range(20))


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
    assert stored(store) == data and item.crc64() == crc64(data)


def test_a_busy_service_gets_fewer_requests_and_everything(
    make_store: Callable[..., BlobStore], proxy: FaultProxy
) -> None:
    store = make_store(block_size=1000, concurrency=16, retry_seconds=60)
    proxy.max_in_flight = 2
    data = some_bytes(60_000)
    with Upload(store, "blob", len(data)) as upload:
        upload.add([memoryview(data)])
        upload.finish()
    assert stored(store) == data
    refused = sum(seen.status == 503 for seen in proxy.log)
    assert 0 < refused < 60


# ---- Download ------------------------------------------------------------------------------------------------------


def ranges(proxy: FaultProxy) -> list[str]:
    return sorted(seen.headers["x-ms-range"].removeprefix("bytes=") for seen in proxy.requests("Get Blob"))


def test_runs_that_lie_close_together_share_a_request(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store()
    data = some_bytes(2 * MIB)
    store.put("blob", data)
    wanted = [(0, 100), (100, 50), (1000, 5), (1005 + GAP, 10), (1016 + 2 * GAP, 20), (1_500_000, 0), (2 * MIB - 1, 1)]
    memory = [bytearray(length) for _, length in wanted]
    reads = [
        Read("blob", offset, length, memoryview(into)) for (offset, length), into in zip(wanted, memory, strict=True)
    ]
    Download(store, sum(length for _, length in wanted)).run(reversed(reads))
    assert memory == [data[offset : offset + length] for offset, length in wanted]
    one, two, three = (0, 1014 + GAP), (1016 + 2 * GAP, 1035 + 2 * GAP), (2 * MIB - 1, 2 * MIB - 1)
    assert ranges(proxy) == sorted(f"{first}-{last}" for first, last in (one, two, three))


def test_runs_of_different_blobs_do_not_share_a_request(
    make_store: Callable[..., BlobStore], proxy: FaultProxy
) -> None:
    store = make_store()
    places = [("a", 0), ("b", 4), ("c", 8)]  # each goes on where the one before ends
    for path, _ in places:
        store.put(path, path.encode() * 12)
    memory = [bytearray(4) for _ in places]
    Download(store, 12).run(
        Read(path, offset, 4, memoryview(into)) for (path, offset), into in zip(places, memory, strict=True)
    )
    assert memory == [b"aaaa", b"bbbb", b"cccc"]
    assert ranges(proxy) == ["0-3", "4-7", "8-11"]


def test_runs_that_overlap_are_all_right(make_store: Callable[..., BlobStore]) -> None:
    store = make_store()
    data = some_bytes(5000)
    store.put("blob", data)
    wanted = [(0, 5000), (10, 20), (10, 20), (15, 4000), (4999, 1)]
    memory = [bytearray(length) for _, length in wanted]
    Download(store, 5000).run(
        Read("blob", offset, length, memoryview(into)) for (offset, length), into in zip(wanted, memory, strict=True)
    )
    assert memory == [data[offset : offset + length] for offset, length in wanted]


def test_long_runs_are_split(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=300_000)
    data = some_bytes(3_100_000)
    store.put("blob", data)
    memory = bytearray(3_000_000)
    Download(store, len(data)).run([Read("blob", 50_000, len(memory), memoryview(memory))])
    assert memory == data[50_000:3_050_000]
    starts = range(50_000, 3_050_000, 300_000)
    assert ranges(proxy) == sorted(f"{start}-{start + 299_999}" for start in starts)
    assert 1 < proxy.most_in_flight <= 4


def test_runs_without_a_place_are_handed_to_use(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store()
    data = some_bytes(10_000)
    store.put("blob", data)
    used: dict[int, bytes] = {}

    def note(offset: int) -> Callable[[memoryview], None]:
        return lambda view: used.update({offset: bytes(view)})

    place = bytearray(1000)
    reads = [Read("blob", offset, 1000, use=note(offset)) for offset in range(0, 9000, 1000)]
    Download(store, 10_000).run([*reads, Read("blob", 9000, 1000, memoryview(place), note(9000))])
    assert used == {offset: data[offset : offset + 1000] for offset in range(0, 10_000, 1000)}
    assert place == data[9000:]
    assert proxy.count("Get Blob") == 1


def test_an_error_of_use_is_raised(make_store: Callable[..., BlobStore]) -> None:
    store = make_store()
    store.put("blob", b"data")

    def fail(view: memoryview) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Download(store, 4).run([Read("blob", 0, 4, use=fail)])


def corrupt(found: int) -> None:
    raise CorruptCheckpointError(f"found {found:016x}")


@pytest.mark.parametrize("block_size", [None, 200_000])
@pytest.mark.parametrize("damaged", [None, 0, 323_456, 599_999])
def test_a_damaged_byte_is_noticed(
    make_store: Callable[..., BlobStore], proxy: FaultProxy, block_size: int | None, damaged: int | None
) -> None:
    store = make_store(block_size=block_size)
    data = some_bytes(600_000)
    store.put("blob", data)
    if damaged is not None:
        part = block_size or len(data)
        start = damaged // part * part
        proxy.when(lambda seen: f"bytes={start}-" in seen.headers.get("x-ms-range", "")).do(Flip(damaged - start))
    memory = bytearray(len(data))
    read = Read("blob", 0, len(data), memoryview(memory), check=Check(crc64(data), len(data), corrupt))
    if damaged is None:
        Download(store, len(data)).run([read])
        assert memory == data
    else:
        wrong = bytearray(data)
        wrong[damaged] ^= 0xFF
        with pytest.raises(CorruptCheckpointError, match=f"found {crc64(wrong):016x}"):
            Download(store, len(data)).run([read])


def test_a_byte_damaged_on_the_way_up_is_noticed(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    """The emulator does not compare the checksum of a block, as the service would."""
    store = make_store()
    data = some_bytes(10_000)
    proxy.when("Put Block").do(Flip(5000, "request"))
    with Upload(store, "blob", len(data)) as upload:
        item = upload.add([memoryview(data)])
        upload.finish()
    read = Read("blob", 0, len(data), memoryview(bytearray(len(data))), check=Check(item.crc64(), len(data), corrupt))
    with pytest.raises(CorruptCheckpointError):
        Download(store, len(data)).run([read])


def test_a_blob_that_is_replaced_in_the_middle_is_noticed(
    make_store: Callable[..., BlobStore], proxy: FaultProxy, container: str
) -> None:
    store = make_store(block_size=200_000, concurrency=1)
    data = bytes(2 * MIB)
    store.put("blob", data)
    direct = BlobStore(BlobLocation.parse(container))
    proxy.when("Get Blob", nth=4).do(Call(lambda: direct.put("blob", data), at="request"))
    with pytest.raises(BlobChangedError, match="blob was replaced while it was read"):
        Download(store, len(data)).run([Read("blob", 0, len(data), memoryview(bytearray(data)))])
    assert proxy.count("Get Blob") < 8


def test_a_download_can_have_a_condition(make_store: Callable[..., BlobStore]) -> None:
    store = make_store()
    etag = store.put("blob", b"data")
    memory = bytearray(4)
    Download(store, 4, if_etag=etag).run([Read("blob", 0, 4, memoryview(memory))])
    assert memory == b"data"
    store.put("blob", b"more")
    with pytest.raises(BlobChangedError):
        Download(store, 4, if_etag=etag).run([Read("blob", 0, 4, memoryview(memory))])
    assert memory == b"data"


def test_a_blob_that_is_too_short_or_missing_is_an_error(make_store: Callable[..., BlobStore]) -> None:
    store = make_store(block_size=1000)
    store.put("blob", bytes(2500))
    with pytest.raises(RequestRefusedError) as caught:
        Download(store, 3000).run([Read("blob", 0, 3000, memoryview(bytearray(3000)))])
    assert caught.value.status == 416
    with pytest.raises(BlobNotFoundError, match="/missing"):
        Download(store, 10).run([Read("missing", 0, 10, memoryview(bytearray(10)))])


def test_an_error_breaks_off_the_requests_that_hang(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=200_000)
    store.put("blob", bytes(600_000))
    gate = Gate()
    proxy.when(lambda seen: seen.kind == "Get Blob" and seen.path.endswith("/blob"), times=None).do(Hold(gate, 50_000))
    proxy.when(lambda seen: seen.path.endswith("/missing")).do(Call(lambda: gate.wait_for(3), at="request"))
    hanging = Read("blob", 0, 600_000, memoryview(bytearray(600_000)))
    started = time.monotonic()
    with pytest.raises(BlobNotFoundError):
        Download(store, 600_000).run([hanging, Read("missing", 0, 10, memoryview(bytearray(10)))])
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("fault", [Cut(70_000), Cut(70_000, reset=False), Cut("answer"), Answer(503, "ServerBusy")])
def test_a_download_survives_faults(make_store: Callable[..., BlobStore], proxy: FaultProxy, fault: Any) -> None:
    store = make_store(block_size=200_000)
    data = some_bytes(2_000_000)
    store.put("blob", data)
    for nth in (1, 5, 6, 9):
        proxy.when("Get Blob", nth=nth).do(fault)
    memory = bytearray(len(data))
    check = Check(crc64(data), len(data), corrupt)
    Download(store, len(data)).run([Read("blob", 0, len(data), memoryview(memory), check=check)])
    assert memory == data


def test_a_service_that_dies_in_the_middle_ends_the_download(
    make_store: Callable[..., BlobStore], proxy: FaultProxy
) -> None:
    store = make_store(block_size=200_000, retry_seconds=0.5)
    data = bytes(2 * MIB)
    store.put("blob", data)
    proxy.when("Get Blob", nth=5, times=None).do(Cut("request"))
    with pytest.raises(ServiceUnavailableError):
        Download(store, len(data)).run([Read("blob", 0, len(data), memoryview(bytearray(data)))])


# ---- Workers -------------------------------------------------------------------------------------------------------


def test_tasks_run_on_so_many_threads_and_no_more() -> None:
    barrier = threading.Barrier(3, timeout=20)
    threads: set[str] = set()
    done: list[int] = []

    def task(number: int) -> None:
        threads.add(threading.current_thread().name)
        barrier.wait()  # passes only if three run at once
        done.append(number)

    with Workers(3, "some") as workers:
        for number in range(30):
            workers.submit(lambda number=number: task(number))  # type: ignore[misc]
        workers.finish()
    assert sorted(done) == list(range(30))
    assert threads == {"some-0", "some-1", "some-2"}


def test_no_more_threads_than_tasks() -> None:
    before = threading.active_count()
    lock = threading.Lock()

    def wait() -> None:
        with lock:
            pass

    with Workers(50, "some") as workers:
        with lock:
            workers.submit(wait)
            assert threading.active_count() == before + 1
        workers.finish()
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [KeyError("mine"), SystemExit(3), KeyboardInterrupt()])
def test_the_first_error_stops_the_rest_and_is_raised_ever_after(error: BaseException) -> None:
    ran: list[int] = []
    stops: list[int] = []

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught, Workers(1, "some", lambda: stops.append(1)) as workers:
        workers.submit(fail)
        for _ in range(10):
            with pytest.raises(type(error)):
                while True:
                    workers.submit(lambda: ran.append(1))
        workers.finish()
    assert caught.value is error
    assert (ran, stops) == ([], [1])


def test_an_error_of_the_caller_drops_what_has_not_begun() -> None:
    begun, ran = threading.Event(), []
    stopped = threading.Event()

    def wait() -> None:
        begun.set()
        assert stopped.wait(20)

    with pytest.raises(KeyError), Workers(1, "some", stopped.set) as workers:
        workers.submit(wait)
        workers.submit(lambda: ran.append(1))
        assert begun.wait(20)
        raise KeyError
    assert ran == []


def test_tasks_see_the_context_of_their_caller() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    variable.set("set")
    seen: list[str] = []
    with Workers(2, "some") as workers:
        workers.submit(lambda: seen.append(variable.get()))
        workers.finish()
    assert seen == ["set"]


def test_tasks_are_taken_after_the_end_of_the_main_thread() -> None:
    code = """
import runpy, sys, threading

Workers = runpy.run_path(sys.argv[1])["Workers"]  # without the rest of the package, which takes its time

def late():
    threading.main_thread().join()
    with Workers(2, "late") as workers:
        for number in range(3):
            workers.submit(lambda: sys.stdout.write("ran\\n"))
        workers.finish()

threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", code, workers_file], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.returncode) == (["ran"] * 3, 0), done.stderr
