"""The verbs of `BlobStore` against the emulator: results and errors."""

from __future__ import annotations

import datetime
import pickle
import uuid
from typing import Any

import pytest
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.storage.blob import BlobServiceClient, ContainerClient

from azure_torch_ckpt._internal import checksums
from azure_torch_ckpt.blobs import store as store_module
from azure_torch_ckpt.blobs.blob_info import BlobInfo, BlobSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import (
    BlobChangedError,
    BlobNotFoundError,
    ContainerNotFoundError,
    RequestRefusedError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Gather, Scatter
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from tests.blobs.stores import KEY, MIB, ODD_NAMES, read
from tests.support.containers import container_sas
from tests.support.faults import Answer, Reframe
from tests.support.proxy import FaultProxy

pytest_plugins = ("tests.blobs.stores",)


# ---- Writing -------------------------------------------------------------------------------------------------------


def test_blocks_become_a_blob_when_they_are_committed(store: BlobStore) -> None:
    first, second = b"first" * 100_000, b"second"
    store.stage_block("blob", "0002", Gather([memoryview(second)]), checksums.crc64(second))
    store.stage_block("blob", "0001", Gather([memoryview(first)]), checksums.crc64(first))
    store.stage_block("blob", "0003", Gather([memoryview(b"not named")]))
    with pytest.raises(BlobNotFoundError):
        store.stat("blob")
    store.commit_blocks("blob", ["0001", "0002"])
    assert read(store, "blob") == first + second
    store.stage_block("blob", "0001", Gather([memoryview(b"new")]))
    assert read(store, "blob") == first + second
    store.commit_blocks("blob", ["0001"])
    assert read(store, "blob") == b"new"


def test_a_block_that_was_not_staged_cannot_be_committed(store: BlobStore) -> None:
    with pytest.raises(RequestRefusedError, match="InvalidBlockList"):
        store.commit_blocks("blob", ["0001"])


def test_a_commit_can_have_a_condition(store: BlobStore) -> None:
    def commit(data: bytes, **condition: Any) -> str:
        store.stage_block("blob", "0001", Gather([memoryview(data)]))
        return store.commit_blocks("blob", ["0001"], **condition)

    first = commit(b"one", if_missing=True)
    assert store.read("blob", limit=10) == (b"one", first)
    with pytest.raises(BlobChangedError):
        commit(b"two", if_missing=True)
    second = commit(b"three", if_etag=first)
    with pytest.raises(BlobChangedError):
        commit(b"four", if_etag=first)
    assert store.read("blob", limit=10) == (b"three", second)


def test_the_blocks_of_a_blob_can_be_asked_for(store: BlobStore) -> None:
    for block_id in ("0002", "0001", "0003"):
        store.stage_block("blob", block_id, Gather([memoryview(b"data")]))
    store.commit_blocks("blob", ["0001", "0003", "0002"])
    assert store.committed_blocks("blob") == ["0001", "0003", "0002"]
    store.put("blob", b"in one piece")
    assert store.committed_blocks("blob") == []
    with pytest.raises(BlobNotFoundError):
        store.committed_blocks("missing")


def test_a_commit_can_carry_more_than_bytes(azurite: Azurite, store: BlobStore) -> None:
    settings = BlobSettings("application/x-torch", {"step": "7"}, {"run": "a/b c"})
    store.stage_block("blob", "0001", Gather([memoryview(b"data")]))
    store.commit_blocks("blob", ["0001"], settings)
    store.commit_blocks("empty", [])
    assert read(store, "empty") == b""
    container = store.location.container
    with BlobServiceClient.from_connection_string(azurite.connection_string) as service:
        blob = service.get_blob_client(container, "blob")
        properties = blob.get_blob_properties()
        assert properties.content_settings.content_type == "application/x-torch"
        assert properties.metadata == {"step": "7"} and blob.get_blob_tags() == {"run": "a/b c"}
        plain = service.get_blob_client(container, "empty").get_blob_properties()
        assert plain.content_settings.content_type == "application/octet-stream"


def test_a_block_carries_its_checksum(proxied: BlobStore, proxy: FaultProxy) -> None:
    data = b"123456789"
    proxied.stage_block("blob", "0001", Gather([memoryview(data)]), checksums.crc64(data))
    proxied.stage_block("blob", "0002", Gather([memoryview(data)]))
    with_crc, without = proxy.requests("Put Block")
    assert with_crc.headers["x-ms-content-crc64"] == checksums.header_value(checksums.crc64(data))
    assert "x-ms-content-crc64" not in without.headers
    assert with_crc.headers["content-length"] == "9"


def test_put_replaces(store: BlobStore) -> None:
    etag = store.put("blob", b"one")
    assert store.stat("blob").etag == etag
    other = store.put("blob", b"two")
    assert other != etag == etag.strip() and etag.startswith('"')
    assert store.read("blob", limit=10) == (b"two", other)


def test_put_if_missing(store: BlobStore) -> None:
    store.put("blob", b"one", if_missing=True)
    with pytest.raises(BlobChangedError) as caught:
        store.put("blob", b"two", if_missing=True)
    assert (caught.value.status, caught.value.error_code) == (409, "BlobAlreadyExists")
    assert read(store, "blob") == b"one"


def test_put_if_etag(store: BlobStore) -> None:
    old = store.put("blob", b"one")
    new = store.put("blob", b"two", if_etag=old)
    with pytest.raises(BlobChangedError) as caught:
        store.put("blob", b"three", if_etag=old)
    assert (caught.value.status, caught.value.error_code) == (412, "ConditionNotMet")
    assert store.read("blob", limit=10) == (b"two", new)
    with pytest.raises(BlobChangedError):
        store.put("another", b"three", if_etag=old)


def test_put_is_one_request_whatever_the_size(proxied: BlobStore, proxy: FaultProxy) -> None:
    data = bytes(range(256)) * 20_000  # above the 4 MiB from which the SDK likes to cut
    proxied.put("blob", data)
    assert [seen.kind for seen in proxy.log] == ["Put Blob"]
    assert read(proxied, "blob") == data


def test_delete(store: BlobStore) -> None:
    etag = store.put("blob", b"one")
    newer = store.put("blob", b"two")
    with pytest.raises(BlobChangedError):
        store.delete("blob", if_etag=etag)
    assert store.delete("blob", if_etag=newer) is True
    assert store.delete("blob") is False
    with pytest.raises(BlobNotFoundError):
        store.stat("blob")


# ---- Reading -------------------------------------------------------------------------------------------------------


def test_read(store: BlobStore) -> None:
    etag = store.put("blob", b"0123456789")
    for limit in (1, 9, 10, 11, 5 * MIB):
        assert store.read("blob", limit=limit) == (b"0123456789"[:limit], etag)
    empty = store.put("empty", b"")
    assert store.read("empty", limit=10) == (b"", empty)
    with pytest.raises(BlobNotFoundError):
        store.read("missing", limit=10)


def test_read_into(store: BlobStore) -> None:
    data = bytes(range(256)) * 30_000
    etag = store.put("blob", data)
    for offset, length in ((0, len(data)), (0, 1), (len(data) - 1, 1), (1000, 5 * MIB)):
        memory = bytearray(length)
        view = memoryview(memory)
        assert store.read_into("blob", offset, [view[: length // 3], view[length // 3 :]]) == etag
        assert memory == data[offset : offset + length]
    assert store.read_into("blob", 0, [memoryview(bytearray(1))], if_etag=etag) == etag
    with pytest.raises(BlobChangedError) as caught:
        store.read_into("blob", 0, [memoryview(bytearray(1))], if_etag='"0x0"')
    assert caught.value.status == 412


def test_read_some_tells_what_the_blob_is(store: BlobStore) -> None:
    store.put("blob", b"0123456789")
    store.put("empty", b"")
    info = store.stat("blob")
    assert store.read_some("blob", 0, 4) == (b"0123", info)
    assert store.read_some("blob", 8, 4) == (b"89", info)
    assert store.read_some("blob", 10, 4) == (b"", info)
    assert store.read_some("empty", 0, 4) == (b"", store.stat("empty"))
    assert store.read_some("blob", 0, 99, if_etag=info.etag) == (b"0123456789", info)
    for offset in (0, 10):
        with pytest.raises(BlobChangedError):
            store.read_some("blob", offset, 4, if_etag='"0x0"')
    with pytest.raises(BlobChangedError):
        store.stat("blob", if_etag='"0x0"')


def test_a_snapshot_is_read(azurite: Azurite, store: BlobStore) -> None:
    store.put("blob", b"old")
    with BlobServiceClient.from_connection_string(azurite.connection_string) as service:
        snapshot = service.get_blob_client(store.location.container, "blob").create_snapshot()["snapshot"]
    store.put("blob", b"newer")
    moment = BlobLocation.parse(f"{store.location}/blob?snapshot={snapshot}")
    assert store.read_some("blob", 0, 10, moment=moment)[0] == b"old"
    assert (store.stat("blob", moment=moment).size, store.stat("blob").size) == (3, 5)
    memory = bytearray(3)
    store.read_into("blob", 0, [memoryview(memory)], moment=moment)
    assert memory == b"old"


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (1000, 1000)])
def test_a_range_beyond_the_end_is_refused(store: BlobStore, offset: int, length: int) -> None:
    store.put("blob", b"0123456789")
    memory = bytearray(length)
    with pytest.raises(RequestRefusedError) as caught:
        store.read_into("blob", offset, [memoryview(memory)])
    assert caught.value.status == 416
    assert not any(memory)


def test_a_range_of_an_empty_blob_is_refused(store: BlobStore) -> None:
    store.put("blob", b"")
    with pytest.raises(RequestRefusedError) as caught:
        store.read_into("blob", 0, [memoryview(bytearray(1))])
    assert caught.value.status == 416


def test_the_sdk_hands_the_destination_to_the_transport(
    proxied: BlobStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary for a new azure-storage-blob: without this, loading is right and slow."""
    made: list[Scatter] = []

    class Watched(Scatter):
        def __init__(self, views: Any) -> None:
            super().__init__(views)
            made.append(self)

    monkeypatch.setattr(store_module, "Scatter", Watched)
    proxied.put("blob", b"0123456789" * MIB)
    proxied.read_into("blob", 5, [memoryview(bytearray(9 * MIB))])
    assert [dest.received for dest in made] == [True]
    assert proxy.count("Get Blob") == 1


def test_without_the_destination_the_bytes_are_right_all_the_same(
    proxied: BlobStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = GatherTransport.send
    monkeypatch.setattr(
        GatherTransport, "send", lambda self, request, *, dest=None, **rest: send(self, request, **rest)
    )
    data = bytes(range(256)) * 30_000
    etag = proxied.put("blob", data)
    memory = bytearray(6 * MIB)
    view = memoryview(memory)
    assert proxied.read_into("blob", 11, [view[:1], view[1 : 5 * MIB], view[5 * MIB :]]) == etag
    assert memory == data[11 : 11 + 6 * MIB]
    assert proxy.count("Get Blob") == 1
    with pytest.raises(RequestRefusedError) as caught:
        proxied.read_into("blob", 11, [memoryview(bytearray(len(data)))])
    assert caught.value.status == 416


def test_a_chunked_answer_is_read_into_the_views(proxied: BlobStore, proxy: FaultProxy) -> None:
    proxied.put("blob", b"0123456789")
    proxy.when("Get Blob").do(Reframe(chunked=True))
    memory = bytearray(4)
    proxied.read_into("blob", 3, [memoryview(memory)[:1], memoryview(memory)[1:]])
    assert memory == b"3456"


def test_stat(store: BlobStore) -> None:
    before = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=2)
    etag = store.put("a/blob", b"0123456789")
    info = store.stat("a/blob")
    assert (info.path, info.size, info.etag) == ("a/blob", 10, etag)
    assert before <= info.last_modified <= datetime.datetime.now(datetime.timezone.utc)


def test_list(store: BlobStore) -> None:
    for name in ("b/2", "a", "b/1", "b/c/3", "bb"):
        store.put(name, name.encode())
    assert [info.path for info in store.list("")] == ["a", "b/1", "b/2", "b/c/3", "bb"]
    assert list(store.list("b/")) == [store.stat("b/1"), store.stat("b/2"), store.stat("b/c/3")]
    assert list(store.list("nothing")) == []


def test_list_folder(store: BlobStore) -> None:
    for name in ("b/2", "a", "b/1", "b/c/3", "b/c/4", "bb"):
        store.put(name, b"")
    found = [entry.path if isinstance(entry, BlobInfo) else entry for entry in store.list_folder("")]
    assert sorted(found) == ["a", "b/", "bb"]
    found = [entry.path if isinstance(entry, BlobInfo) else entry for entry in store.list_folder("b/")]
    assert sorted(found) == ["b/1", "b/2", "b/c/"]


@pytest.mark.parametrize(
    ("name", "data", "metadata", "is_folder"),
    [
        ("marked", b"", {"hdi_isfolder": "true"}, True),
        ("capital", b"", {"Hdi_isfolder": "True"}, True),
        ("slash/", b"", None, True),
        ("slash-with-data/", b"data", None, False),
        ("marked-with-data", b"data", {"hdi_isfolder": "true"}, False),
        ("not-marked", b"", {"hdi_isfolder": "false"}, False),
        ("empty", b"", None, False),
    ],
)
def test_what_is_a_folder(
    store: BlobStore, container: str, name: str, data: bytes, metadata: dict[str, str] | None, is_folder: bool
) -> None:
    """The same by a listing, by a HEAD request and by a read."""
    with ContainerClient.from_container_url(container, Azurite.account_key) as client:
        client.upload_blob(name, data, metadata=metadata)
    found = [*store.list(""), store.stat(name), store.read_some(name, 0, 100)[1]]
    found += [entry for entry in store.list_folder(name) if isinstance(entry, BlobInfo)]
    assert {entry.is_folder for entry in found} == {is_folder}
    assert {entry.path for entry in found} == {name}


def test_the_etag_of_a_listing_serves_as_a_condition(store: BlobStore) -> None:
    store.put("blob", b"one")
    [info] = store.list("")
    assert store.read_into("blob", 0, [memoryview(bytearray(3))], if_etag=info.etag) == info.etag
    store.put("blob", b"two", if_etag=info.etag)


def test_now_is_the_services_time(store: BlobStore) -> None:
    store.put("blob", b"")
    before = datetime.datetime.now(datetime.timezone.utc)
    now = store.now()
    assert before - datetime.timedelta(seconds=1) < now <= datetime.datetime.now(datetime.timezone.utc)  # whole seconds
    assert store.stat("blob").last_modified <= store.now()


def test_create_container(azurite: Azurite) -> None:
    store = BlobStore(BlobLocation.parse(azurite.url(f"test-{uuid.uuid4().hex}")), Access(KEY))
    with pytest.raises(ContainerNotFoundError):
        store.put("blob", b"data")
    store.create_container()
    store.create_container()
    store.put("blob", b"data")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(store: BlobStore, name: str) -> None:
    etag = store.put(name, name.encode())
    store.stage_block(f"{name}-blocks", "0001", Gather([memoryview(b"data")]))
    store.commit_blocks(f"{name}-blocks", ["0001"])
    assert store.read(name, limit=100) == (name.encode(), etag)
    memory = bytearray(len(name.encode()))
    assert store.read_into(name, 0, [memoryview(memory)], if_etag=etag) == etag
    assert memory == name.encode()
    assert [info.path for info in store.list(name)] == [name, f"{name}-blocks"]
    assert store.stat(name).path == name
    assert BlobLocation.parse(str(store.location.join(name))).path == name
    assert store.delete(name)


# ---- Errors and the rest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (404, "ContainerNotFound", ContainerNotFoundError),
        (404, "ResourceNotFound", ContainerNotFoundError),
        (404, "BlobNotFound", BlobNotFoundError),
        (409, "ContainerBeingDeleted", RequestRefusedError),
        (409, "BlobAlreadyExists", BlobChangedError),
        (412, "LeaseIdMissing", RequestRefusedError),
        (413, "RequestBodyTooLarge", RequestRefusedError),
        (503, "ServerBusy", ServiceUnavailableError),
    ],
)
def test_an_answer_becomes_an_error_of_ours(
    proxied_container: str, proxy: FaultProxy, status: int, code: str, error: type[StoreError]
) -> None:
    store = BlobStore(BlobLocation.parse(proxied_container), Access(KEY, options=TransferOptions(retry_seconds=0)))
    proxy.when("Put Blob").do(Answer(status, code))
    with pytest.raises(error, match=f"could not write {proxied_container}/blob: {status} {code}") as caught:
        store.put("blob", b"data")
    assert (caught.value.status, caught.value.error_code) == (status, code)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is error and str(again) == str(caught.value) and again.status == status


def test_a_missing_container_is_told_from_a_missing_blob(azurite: Azurite, container: str) -> None:
    nowhere = BlobStore(BlobLocation.parse(azurite.url("nowhere")), Access(KEY))
    here = BlobStore(BlobLocation.parse(container), Access(KEY))
    for verb in (BlobStore.stat, lambda store, path: store.read_into(path, 0, [memoryview(bytearray(1))])):
        with pytest.raises(ContainerNotFoundError, match="'nowhere'"):
            verb(nowhere, "blob")
        with pytest.raises(BlobNotFoundError):
            verb(here, "blob")
    with pytest.raises(ContainerNotFoundError):
        list(nowhere.list(""))


@pytest.mark.parametrize("form", ["key", "named key", "sas credential", "url"])
def test_a_store_travels_to_another_process(container: str, form: str) -> None:
    credential: Any = {
        "key": KEY,
        "named key": AzureNamedKeyCredential(Azurite.account_name, KEY),
        "sas credential": AzureSasCredential(container_sas(container)),
        "url": None,
    }[form]
    location = BlobLocation.parse(f"{container}?{container_sas(container)}" if form == "url" else container)
    store = BlobStore(location, Access(credential, options=TransferOptions(concurrency=3)))
    store.put("blob", b"data")
    again = pickle.loads(pickle.dumps(store))
    assert read(again, "blob") == b"data"
    assert (again.location, again.options, repr(again)) == (store.location, store.options, repr(store))


def test_moving_within_a_container_keeps_the_connections_and_the_sas(azurite: Azurite, container: str) -> None:
    sas = container_sas(container)
    store = BlobStore(BlobLocation.parse(f"{container}?{sas}"))
    location, same = store.moved_to(BlobLocation.parse(f"{container}/run/step"))
    assert same is store and location.sas == sas and location.path == "run/step"
    elsewhere = azurite.url("elsewhere")
    location, other = store.moved_to(BlobLocation.parse(f"{elsewhere}/x"))
    assert other is not store and location.sas is None and str(other.location) == elsewhere
