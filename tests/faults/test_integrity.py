"""A byte that changes on its way up, in storage or on its way down is noticed, and the error says which one."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

import azure_torch_ckpt.transport.retry
from azure_torch_ckpt import (
    AzureBlobReader,
    AzureCheckpointError,
    BlobLocation,
    CorruptCheckpointError,
    RequestRefusedError,
    TransferOptions,
)
from azure_torch_ckpt.dcp.metadata.schema import StoredItem
from tests.faults.tally import Tally
from tests.support.containers import paths_below, store_of
from tests.support.faults import Answer, Exchange, Flip
from tests.support.mixed_checkpoint import KEY, assert_right, failure, flip_in_storage, item_of, load, save, state
from tests.support.proxy import FaultProxy
from tests.support.states import assert_same, bits
from tests.support.waits import without_waiting

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a retry waits is not the subject here."""
    monkeypatch.setattr(azure_torch_ckpt.transport.retry, "_FIRST_DELAY", 0.01)


def assert_names(error: AzureCheckpointError, url: str, name: str, item: StoredItem) -> None:
    assert f"{name!r}" in str(error)
    assert str(BlobLocation.parse(url)) in str(error)
    assert f"{item.length} bytes at offset {item.offset} of blob {item.relative_path}" in str(error)
    assert item.crc64 is not None and f"{item.crc64:016x}" in str(error)


# ---- On the way up ---------------------------------------------------------------------------------------------------


def test_every_block_of_a_save_carries_its_crc64(proxy: FaultProxy, proxied_container: str, container: str) -> None:
    save(f"{proxied_container}/a")
    [data] = [blob for blob in store_of(container).list("a/") if blob.path.endswith(".distcp")]
    blocks = proxy.requests("Put Block")
    assert all("x-ms-content-crc64" in block.headers and block.status == 201 for block in blocks)
    assert len(blocks) == -(-data.size // 65536) > 3
    assert sum(block.body_length for block in blocks) == data.size
    assert_right(load(f"{container}/a"))


def test_a_byte_that_changed_on_the_way_up_is_refused_and_the_block_is_sent_again(
    proxy: FaultProxy, proxied_container: str, container: str, tally: Tally
) -> None:
    save(f"{proxied_container}/sound")
    blocks = proxy.count("Put Block")
    assert blocks > 3
    tried = 0
    for nth in range(1, blocks + 1):
        for offset in (0, 5000):
            tried += 1
            proxy.when("Put Block", nth=nth).do(Flip(offset, of="request"))
            sent = proxy.count("Put Block")
            save(f"{proxied_container}/{nth}-{offset}")
            assert sum(block.status == 400 for block in proxy.requests("Put Block")) == tried
            assert proxy.count("Put Block") == sent + blocks + 1
            assert_right(load(f"{container}/{nth}-{offset}"))
    tally.add("byte flipped on the way up (service checks CRC64)", tried, "refused by the service, healed", tried)


def test_a_body_that_always_arrives_changed_is_an_error_and_leaves_nothing(
    proxy: FaultProxy, proxied_container: str, container: str, tally: Tally
) -> None:
    proxy.when("Put Block", times=None).do(Flip(3, of="request"))
    with without_waiting():
        error = failure(RequestRefusedError, save, f"{proxied_container}/a", options=TransferOptions(retry_seconds=0.3))
    assert (error.status, error.error_code) == (400, "Crc64Mismatch")
    assert " changed " in str(error)
    assert proxy.count("Put Block") > 2 and proxy.count("Put Block List", "Put Blob") == 0
    assert paths_below(container) == []
    tally.add("byte flipped on the way up, every time", 1, "clear error, nothing visible", 1)


def test_without_checksums_nothing_is_sent_or_kept(proxy: FaultProxy, proxied_container: str, container: str) -> None:
    save(f"{proxied_container}/a", options=TransferOptions(checksums=False))
    blocks = proxy.requests("Put Block")
    assert blocks and not any("x-ms-content-crc64" in block.headers for block in blocks)
    assert item_of(f"{container}/a", "large").crc64 is None
    assert_right(load(f"{container}/a"))


@pytest.mark.parametrize(("status", "code"), [(501, "APINotImplemented"), (500, "FeatureNotSupported")])
def test_an_endpoint_that_does_not_know_the_checksum_is_told_of(
    status: int, code: str, proxy: FaultProxy, proxied_container: str, container: str
) -> None:
    """The proxy answers as an older Azurite without ``--loose`` does."""
    proxy.when(lambda seen: "x-ms-content-crc64" in seen.headers, times=None).do(Answer(status, code))
    error = failure(RequestRefusedError, save, f"{proxied_container}/a")
    assert re.search(r"Azurite 3\.37 .*checksums=False", str(error))
    assert paths_below(container) == []
    save(f"{proxied_container}/a", options=TransferOptions(checksums=False))
    assert_right(load(f"{container}/a"))


# ---- In storage ------------------------------------------------------------------------------------------------------


def destination(kind: str) -> tuple[str, dict[str, Any]]:
    """The item that is damaged, and what it is loaded into."""
    if kind == "in place":
        return "large", {"large": torch.zeros(300, 200)}
    if kind == "cast":
        return "large", {"large": torch.zeros(300, 200, dtype=torch.float64)}
    if kind == "strided":
        return "large", {"large": torch.zeros(200, 300).t()}
    return "object", {"object": None}


@pytest.mark.parametrize("kind", ["in place", "cast", "strided", "object"])
def test_a_byte_that_changed_in_storage_is_found_wherever_it_lies(container: str, kind: str, tally: Tally) -> None:
    url = f"{container}/a"
    save(url)
    name, _ = destination(kind)
    item = item_of(url, name)
    # The envelope's first byte, the payload's first, one of a later block, the payload's last, the envelope's last.
    size = 300 * 200 * 4
    start = item.payload_offset
    positions = [0, item.length // 2, item.length - 1]
    if start is not None:
        positions = [0, start, start + 2 * 65536 + 1, start + size - 1, item.length - 1]
    for position in positions:
        flip_in_storage(url, item, position)
        assert_names(failure(CorruptCheckpointError, load, url, destination(kind)[1]), url, name, item)
        loaded = load(url, {"small": torch.zeros(10, 7, dtype=torch.int32)})  # the others are as good as before
        assert_same(loaded["small"], state()["small"])
        flip_in_storage(url, item, position)  # and back
    assert_right(load(url))
    fault = f"byte flipped in storage, read {'as an object' if kind == 'object' else kind}"
    tally.add(fault, len(positions), "error names tensor, blob, offset", len(positions))


def test_the_switch_reads_damaged_data_as_it_is(container: str) -> None:
    url = f"{container}/a"
    save(url)
    item = item_of(url, "large")
    assert item.payload_offset is not None
    flip_in_storage(url, item, item.payload_offset + 100_000)
    unchecked = TransferOptions(checksums=False)
    loaded = load(url, options=unchecked)
    expected = bytearray(bits(state()["large"]))
    expected[100_000] ^= 0x01
    assert bits(loaded["large"]) == bytes(expected)


class OneRegion(dcp.DefaultLoadPlanner):
    """Hands out one tensor for a plan that was made by hand."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        assert tensor is not None


def test_a_part_of_an_item_is_read_without_its_checksum(container: str) -> None:
    """The CRC64 covers whole items, so a resharded load cannot compare it; `verify` can."""
    url = f"{container}/a"
    save(url)
    item = item_of(url, "large")
    assert item.payload_offset is not None
    flip_in_storage(url, item, item.payload_offset + 20 * 200 * 4)
    reader = AzureBlobReader(url, credential=KEY)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    target = torch.zeros(5, 200)
    index = MetadataIndex("large", torch.Size([0, 0]))
    part = ReadItem(
        LoadItemType.TENSOR, index, torch.Size([0, 0]), index, torch.Size([20, 0]), torch.Size(target.shape)
    )
    reader.read_data(LoadPlan([part]), OneRegion(target)).wait()
    expected = bytearray(bits(state()["large"][20:25]))
    expected[0] ^= 0x01
    assert bits(target) == bytes(expected)


# ---- On the way down -------------------------------------------------------------------------------------------------


def test_a_byte_that_changed_on_the_way_down_is_found_in_every_request(
    proxy: FaultProxy, proxied_container: str, tally: Tally
) -> None:
    url = f"{proxied_container}/a"
    save(url)

    def is_data(seen: Exchange) -> bool:
        return seen.kind == "Get Blob" and seen.path.endswith(".distcp")

    assert_right(load(url))
    requests = len([seen for seen in proxy.log if is_data(seen)])
    assert requests >= 3
    outcomes: Counter[str] = Counter()
    for nth in range(1, requests + 1):
        for offset in (0, 700):
            proxy.when(is_data, nth=nth).do(Flip(offset))
            error = failure(CorruptCheckpointError, load, url)
            [name] = [name for name in state() if f"{name!r}" in str(error)]
            assert_names(error, url, name, item_of(url, name))
            outcomes["error names tensor, blob, offset"] += 1
    assert_right(load(url))
    tally.add_all("byte flipped on the way down", outcomes)


def test_metadata_that_changed_on_the_way_down_is_found_wherever_the_byte_lies(
    proxy: FaultProxy, proxied_container: str, tally: Tally
) -> None:
    url = f"{proxied_container}/a"
    save(url)

    def is_metadata(seen: Exchange) -> bool:
        return seen.kind == "Get Blob" and seen.path.endswith(".metadata")

    size = store_of(url).stat("a/.metadata").size
    outcomes: Counter[str] = Counter()
    for offset in range(0, size, size // 12):
        proxy.when(is_metadata).do(Flip(offset))
        error = failure(CorruptCheckpointError, load, url)
        assert "MD5" in str(error) and ".metadata" in str(error)
        outcomes["error names the blob"] += 1
    assert_right(load(url))
    tally.add_all("byte of .metadata flipped on the way down", outcomes)


def test_metadata_that_changed_on_the_way_up_is_refused_and_sent_again(
    proxy: FaultProxy, proxied_container: str, tally: Tally
) -> None:
    url = f"{proxied_container}/a"
    offsets = (0, 1, 300, 1000)
    for version, offset in enumerate(offsets):
        proxy.when("Put Blob").do(Flip(offset, of="request"))
        save(url, version=version)
        assert [sent.status for sent in proxy.requests("Put Blob")[-2:]] == [400, 201]
        assert_right(load(url), version=version)
    proxy.when("Put Blob", times=None).do(Flip(300, of="request"))
    with without_waiting():
        error = failure(RequestRefusedError, save, url, version=7)
    assert (error.status, error.error_code) == (400, "Md5Mismatch")
    assert_right(load(url), version=len(offsets) - 1)
    tally.add("byte of .metadata flipped on the way up", 4, "refused by the service, healed", 4)
