"""`RetryPolicy`: failed requests are tried again if that helps: soon, not for ever, with their whole body."""

from __future__ import annotations

import email.utils
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from azure.core.credentials import AzureSasCredential

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobChangedError,
    BlobNotFoundError,
    RequestRefusedError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport import retry
from azure_torch_ckpt.transport.buffers import Cancel, Gather
from tests.support.faults import Answer, Call, Cut, CutHead, Flip
from tests.support.proxy import FaultProxy
from tests.support.waits import Clock, without_waiting

MIB = 1024 * 1024


@pytest.fixture
def clock() -> Iterator[Clock]:
    with without_waiting() as made:
        yield made


@pytest.fixture
def store(proxied_container: str) -> BlobStore:
    return BlobStore(BlobLocation.parse(proxied_container))


def store_with(url: str, retry_seconds: float) -> BlobStore:
    return BlobStore(BlobLocation.parse(url), Access(options=TransferOptions(retry_seconds=retry_seconds)))


# ---- When ----------------------------------------------------------------------------------------------------------


def test_the_first_retry_comes_within_a_second(store: BlobStore, proxy: FaultProxy, clock: Clock) -> None:
    store.put("blob", b"data")
    proxy.when("Head").do(Answer(503, "ServerBusy"))
    assert store.stat("blob").size == 4
    [wait] = clock.waits
    assert 0.05 < wait < 1


def test_waits_grow_and_end(store: BlobStore, proxy: FaultProxy, clock: Clock) -> None:
    proxy.when("Head", times=None).do(Answer(503, "ServerBusy"))
    with pytest.raises(ServiceUnavailableError, match="503 ServerBusy") as caught:
        store.stat("blob")
    assert caught.value.status == 503
    assert proxy.count() == len(clock.waits) + 1
    assert clock.waits[0] < 1 and 10 <= max(clock.waits) <= 30
    assert sum(clock.waits[:4]) < 5 < sum(clock.waits[4:])
    assert 60 < sum(clock.waits) <= store.options.retry_seconds


def test_no_retries_without_time(proxied_container: str, proxy: FaultProxy, clock: Clock) -> None:
    proxy.when("Head", times=None).do(Answer(503, "ServerBusy"))
    with pytest.raises(ServiceUnavailableError):
        store_with(proxied_container, 0).stat("blob")
    assert (proxy.count(), clock.waits) == (1, [])


def test_an_answer_without_the_end_of_its_headers_is_none(store: BlobStore, proxy: FaultProxy, clock: Clock) -> None:
    """The answer to a HEAD has no body that would be too short."""
    store.put("blob", b"data")
    proxy.when("Head").do(CutHead(400))
    assert store.stat("blob").size == 4
    assert proxy.count("Head") == 2 and len(clock.waits) == 1


def test_what_is_read_from_an_answer_s_headers_is_read_after_a_broken_connection(
    store: BlobStore, proxy: FaultProxy, clock: Clock
) -> None:
    """The client's own hook for the response would be forgotten."""
    store.put("blob", b"data")
    proxy.when("Head").do(CutHead(10))
    assert store.stat("blob").size == 4
    source = store.copy_source("blob", store.stat("blob").etag)
    proxy.when("Copy Blob").do(CutHead(10))
    store.copy("whole", source)
    proxy.when(lambda seen: "x-ms-source-range" in seen.headers).do(CutHead(10))
    store.stage_block_from("parts", f"{0:048d}", source, 0, 4)
    proxy.when(lambda seen: seen.query.get("comp") == "blocklist").do(CutHead(10))
    assert len(store.uncommitted_blocks("parts")) == 1
    assert len(clock.waits) == 4


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_heeded(store: BlobStore, proxy: FaultProxy, clock: Clock, form: str) -> None:
    store.put("blob", b"data")
    after = "7" if form == "seconds" else email.utils.formatdate(clock.time() + 7, usegmt=True)
    proxy.when("Head").do(Answer(503, "ServerBusy", {"Retry-After": after}))
    assert store.stat("blob").size == 4
    assert clock.waits == [7]


def test_retry_after_is_heeded_in_real_time(store: BlobStore, proxy: FaultProxy) -> None:
    store.put("blob", b"data")
    proxy.when("Head").do(Answer(503, "ServerBusy", {"Retry-After": "1"}))
    store.stat("blob")
    first, second = proxy.requests("Head")
    assert first.answered_at is not None
    assert second.received_at - first.answered_at >= 0.99


@pytest.mark.parametrize("after", ["", "soon", "-5", "nan", "inf", "Sun, 99 Nov"])
def test_nonsense_in_retry_after_is_ignored(store: BlobStore, proxy: FaultProxy, clock: Clock, after: str) -> None:
    store.put("blob", b"data")
    proxy.when("Head").do(Answer(503, "ServerBusy", {"Retry-After": after}))
    assert store.stat("blob").size == 4
    [wait] = clock.waits
    assert wait < 1


def test_a_retry_after_beyond_the_time_for_retries_ends_them(
    proxied_container: str, proxy: FaultProxy, clock: Clock
) -> None:
    proxy.when("Head").do(Answer(503, "ServerBusy", {"Retry-After": "3600"}))
    with pytest.raises(ServiceUnavailableError):
        store_with(proxied_container, 10).stat("blob")
    assert (proxy.count(), clock.waits) == (1, [])


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_heal_is_tried_again(store: BlobStore, proxy: FaultProxy, clock: Clock, status: int) -> None:
    proxy.when("Put Blob", times=2).do(Answer(status, "Trouble"))
    store.put("blob", b"data")
    assert store.read("blob", limit=10)[0] == b"data"
    assert len(clock.waits) == 2


def test_a_body_that_arrived_damaged_is_sent_again_for_a_while(
    store: BlobStore, proxy: FaultProxy, clock: Clock
) -> None:
    proxy.when("Put Block").do(Answer(400, "Crc64Mismatch"))
    store.stage_block("blob", "0001", Gather([memoryview(b"data")]), crc64(b"data"))
    assert len(clock.waits) == 1
    with pytest.raises(RequestRefusedError, match="do not have the checksum"):
        store.stage_block("blob", "0001", Gather([memoryview(b"data")]), 1)
    assert 5 < sum(clock.waits) <= 25


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RequestRefusedError),
        (401, AccessDeniedError),
        (403, AccessDeniedError),
        (404, BlobNotFoundError),
        (409, RequestRefusedError),
        (412, BlobChangedError),
        (416, RequestRefusedError),
        (501, RequestRefusedError),
    ],
)
def test_what_does_not_heal_is_not_tried_again(
    store: BlobStore, proxy: FaultProxy, clock: Clock, status: int, error: type[StoreError]
) -> None:
    proxy.when("Put Blob").do(Answer(status, "Trouble"))
    with pytest.raises(error) as caught:
        store.put("blob", b"data")
    assert (caught.value.status, caught.value.error_code) == (status, "Trouble")
    assert (proxy.count(), clock.waits) == (1, [])


def test_a_dead_endpoint_is_given_up_in_time(proxied_container: str, proxy: FaultProxy, clock: Clock) -> None:
    proxy.refuse()
    store = store_with(proxied_container, 1)
    with pytest.raises(ServiceUnavailableError, match="no answer") as caught:
        store.put("blob", b"data")
    assert 0 < sum(clock.waits) <= 1
    assert caught.value.status is None
    assert proxy.endpoint in str(caught.value)


def test_a_dead_endpoint_is_given_up_sooner_than_a_busy_one(store: BlobStore, proxy: FaultProxy, clock: Clock) -> None:
    proxy.refuse()
    with pytest.raises(ServiceUnavailableError):
        store.put("blob", b"data")
    assert 5 < sum(clock.waits) <= 20


def test_an_endpoint_that_comes_back_is_used(store: BlobStore, proxy: FaultProxy, clock: Clock) -> None:
    proxy.refuse()
    clock.on_wait = lambda: proxy.accept() if len(clock.waits) == 3 else None
    store.put("blob", b"data")
    assert len(clock.waits) == 3 and proxy.count("Put Blob") == 1


def test_an_unknown_authority_is_not_tried_again(azurite_tls: Azurite, clock: Clock) -> None:
    store = BlobStore(BlobLocation.parse(azurite_tls.url("container")), Access(azurite_tls.account_key))
    with pytest.raises(ServiceUnavailableError, match="certificate") as caught:
        store.put("blob", b"data")
    assert clock.waits == [] and azurite_tls.endpoint in str(caught.value)


def test_a_cancelled_request_is_not_tried_again(store: BlobStore, proxy: FaultProxy) -> None:
    cancel = Cancel()
    proxy.when("Put Block").do(Call(cancel.cancel, at="request"), Answer(503, "ServerBusy"))
    with pytest.raises(ServiceUnavailableError):
        store.stage_block("blob", "0001", Gather([memoryview(b"data")]), cancel=cancel)
    assert proxy.count() == 1


# ---- With what -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("fault", [Cut("request"), Cut("answer"), Answer(500, "InternalError"), Answer(503, "Busy")])
def test_a_body_is_sent_again_from_its_start(store: BlobStore, proxy: FaultProxy, fault: Any) -> None:
    data = bytes(range(256)) * 20_000
    views = [memoryview(data)[:70_000], memoryview(data)[70_000:70_010], memoryview(data)[70_010:]]
    proxy.when("Put Block", times=2).do(fault)
    store.stage_block("blob", "0001", Gather(views))
    store.commit_blocks("blob", ["0001"])
    assert proxy.count("Put Block") == 3
    received = bytearray(len(data))
    store.read_into("blob", 0, [memoryview(received)])
    assert received == data


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("after", [0, 1, 100_000, MIB - 1])
def test_a_body_that_breaks_off_is_received_again(
    store: BlobStore, proxy: FaultProxy, clock: Clock, reset: bool, after: int
) -> None:
    data = bytes(range(256)) * 4096
    store.put("blob", data)
    # The first attempt delivers wrong bytes, so none of them may stay.
    proxy.when("Get Blob").do(Flip(0), Cut(after, reset=reset))
    received = bytearray(len(data))
    view = memoryview(received)
    store.read_into("blob", 0, [view[:10], view[10:70_000], view[70_000:]])
    assert received == data
    assert proxy.count("Get Blob") == 2 and len(clock.waits) == 1


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("reset", [True, False])
def test_small_answers_that_break_off_are_received_again(store: BlobStore, proxy: FaultProxy, reset: bool) -> None:
    store.put("blob", b"some data")
    proxy.when("Get Blob").do(Cut(4, reset=reset))
    assert store.read("blob", limit=100)[0] == b"some data"
    proxy.when("List").do(Cut(4, reset=reset))
    assert [info.path for info in store.list("")] == ["blob"]
    assert (proxy.count("Get Blob"), proxy.count("List")) == (2, 2)


@pytest.mark.usefixtures("clock")
def test_a_blob_list_whose_answer_was_lost_is_committed_again(store: BlobStore, proxy: FaultProxy) -> None:
    store.stage_block("blob", "0001", Gather([memoryview(b"data")]))
    proxy.when("Put Block List").do(Cut("answer"))
    store.commit_blocks("blob", ["0001"])
    assert store.read("blob", limit=10)[0] == b"data"


@pytest.mark.usefixtures("clock")
def test_a_deletion_whose_answer_was_lost_is_no_error(store: BlobStore, proxy: FaultProxy) -> None:
    store.put("blob", b"data")
    proxy.when("Delete").do(Cut("answer"))
    store.delete("blob")
    assert list(store.list("")) == []


@pytest.mark.usefixtures("clock")
def test_a_conditional_write_whose_answer_was_lost_says_that_the_blob_changed(
    store: BlobStore, proxy: FaultProxy
) -> None:
    """The second attempt meets the blob of the first one. The caller must check whose blob it is."""
    proxy.when("Put Blob").do(Cut("answer"))
    with pytest.raises(BlobChangedError):
        store.put("blob", b"data", if_missing=True)
    assert store.read("blob", limit=10)[0] == b"data"


@pytest.mark.usefixtures("clock")
def test_logs_name_the_reason_and_no_secret(
    proxied_container: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    sas = AzureSasCredential("sv=2024-11-04&sr=c&sp=r&sig=c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0")
    store = BlobStore(BlobLocation.parse(proxied_container), Access(sas))
    proxy.when("Head", nth=1).do(Answer(503, "ServerBusy"))
    proxy.when("Head", nth=2, times=2).do(Cut("request"))  # on a reused connection, the first one is not a failure
    with caplog.at_level(logging.DEBUG), pytest.raises(AccessDeniedError):  # the signature is invalid
        store.stat("blob")
    ours = [record.getMessage() for record in caplog.records if record.name == retry.__name__]
    assert len(ours) == 2 and "status 503" in ours[0] and "reset" in ours[1].lower()
    assert "c2VjcmV0" not in caplog.text
