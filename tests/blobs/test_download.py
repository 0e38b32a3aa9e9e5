"""Downloads fetch what was asked for, with few requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.download import GAP, Check, Download, Read
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.upload import Upload
from azure_torch_ckpt.errors import (
    BlobChangedError,
    BlobNotFoundError,
    CorruptCheckpointError,
    RequestRefusedError,
    ServiceUnavailableError,
)
from azure_torch_ckpt.location import BlobLocation
from tests.blobs.stores import MIB, some_bytes
from tests.support.faults import Answer, Call, Cut, Flip, Gate, Hold
from tests.support.proxy import FaultProxy, meet

pytest_plugins = ("tests.blobs.stores",)


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
    meet(proxy, 2, "Get Blob")
    Download(store, len(data)).run([Read("blob", 50_000, len(memory), memoryview(memory))])
    assert memory == data[50_000:3_050_000]
    starts = range(50_000, 3_050_000, 300_000)
    assert ranges(proxy) == sorted(f"{start}-{start + 299_999}" for start in starts)
    assert proxy.most_in_flight <= 4


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


def test_a_byte_damaged_on_the_way_up_is_sent_again(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store()
    data = some_bytes(10_000)
    proxy.when("Put Block").do(Flip(5000, "request"))
    with Upload(store, "blob", len(data)) as upload:
        item = upload.add([memoryview(data)])
        upload.finish()
    assert [sent.status for sent in proxy.requests("Put Block")] == [400, 201]
    memory = bytearray(len(data))
    read = Read("blob", 0, len(data), memoryview(memory), check=Check(item.crc64(), len(data), corrupt))
    Download(store, len(data)).run([read])
    assert memory == data


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


@pytest.mark.usefixtures("patient")
def test_an_error_breaks_off_the_requests_that_hang(make_store: Callable[..., BlobStore], proxy: FaultProxy) -> None:
    store = make_store(block_size=200_000)
    store.put("blob", bytes(600_000))
    gate = Gate()
    proxy.when(lambda seen: seen.kind == "Get Blob" and seen.path.endswith("/blob"), times=None).do(Hold(gate, 50_000))
    proxy.when(lambda seen: seen.path.endswith("/missing")).do(Call(lambda: gate.wait_for(3), at="request"))
    hanging = Read("blob", 0, 600_000, memoryview(bytearray(600_000)))
    with pytest.raises(BlobNotFoundError):
        Download(store, 600_000).run([hanging, Read("missing", 0, 10, memoryview(bytearray(10)))])


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
