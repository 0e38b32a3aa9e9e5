"""`Staging`: an upload succeeds although others have staged blocks for the blob under ids of another length."""

from __future__ import annotations

import base64
import functools
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable

import pytest
from azure.core.credentials import AzureSasCredential
from azure.storage.blob import BlobBlock, BlobClient, ContainerClient

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.blob_copy import BlobDestination
from azure_torch_ckpt.blobs.blob_info import BlobSettings, CopiedSettings
from azure_torch_ckpt.blobs.block_writer import BlockWriter
from azure_torch_ckpt.blobs.staging import BLOCK_ID_LENGTH, Staging, block_id
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.upload import Upload
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.errors import RequestRefusedError
from azure_torch_ckpt.huggingface.block_stager import rank_block_id
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Cancel, Gather
from tests.blobs.stores import KEY, read
from tests.support.containers import container_sas
from tests.support.faults import Call
from tests.support.proxy import FaultProxy

DATA = bytes(range(256)) * 20
FOREIGN = [b"0001", b"BlockId00001", b"\xff\xfe\x00\x01\x02", b"x" * 22, b"x" * 46, b"x" * 64]


@pytest.fixture
def store(proxied_container: str) -> BlobStore:
    return BlobStore(BlobLocation.parse(proxied_container), Access(KEY, options=TransferOptions(block_size=1000)))


@pytest.fixture
def blob(container: str) -> BlobClient:
    return ContainerClient.from_container_url(container, KEY).get_blob_client("blob")


def stage_foreign(blob: BlobClient, *ids: bytes) -> None:
    """Without the SDK, which accepts only text."""
    container = blob.url.rpartition("/")[0]
    for each in ids:
        query = urllib.parse.urlencode({"comp": "block", "blockid": base64.b64encode(each).decode()})
        request = urllib.request.Request(f"{blob.url}?{query}&{container_sas(container)}", b"foreign", method="PUT")
        with urllib.request.urlopen(request) as response:
            assert response.status == 201


def write_with_blob_io(store: BlobStore) -> None:
    with BlobIO(f"{store.location}/blob", "wb", credential=KEY) as file:
        file.write(DATA[:1000])
        file.flush()
        file.write(DATA[1000:])


def write_with_upload(store: BlobStore) -> None:
    with Upload(store, "blob", 8) as upload:
        upload.add([memoryview(DATA)])
        upload.finish()


def write_with_destination(store: BlobStore) -> None:
    """As copies do that the service does not make at once."""
    store.put("source", DATA)
    destination = BlobDestination(store, "blob")
    for offset in (2000, 0):
        part = memoryview(DATA)[offset : offset + (2000 if offset == 0 else len(DATA))]
        destination.write(offset, part, crc64(part), Cancel())
    destination.commit(store.stat("source"), CopiedSettings())


@pytest.mark.parametrize("write", [write_with_blob_io, write_with_upload, write_with_destination])
@pytest.mark.parametrize("foreign", FOREIGN, ids=repr)
@pytest.mark.parametrize("there", [False, True])
def test_a_write_takes_the_length_of_foreign_ids(
    store: BlobStore, blob: BlobClient, write: Callable[[BlobStore], None], foreign: bytes, there: bool
) -> None:
    if there:
        blob.upload_blob(b"old", metadata={"kept": "until then"})
    stage_foreign(blob, foreign)
    before = [found.name for found in ContainerClient.from_container_url(str(store.location), KEY).list_blobs()]
    assert before == (["blob"] if there else [])
    write(store)
    assert read(store, "blob") == DATA
    committed, uncommitted = blob.get_block_list("all")
    assert uncommitted == [] and base64.b64encode(foreign).decode() not in [found.id for found in committed]


def test_nothing_is_visible_before_the_commit(store: BlobStore, blob: BlobClient) -> None:
    stage_foreign(blob, b"0001")
    writer = BlockWriter(store, "blob", BlobSettings(), if_missing=True)
    writer.write(memoryview(DATA))
    writer.flush()
    assert list(store.list("")) == []
    writer.abort()
    assert list(store.list("")) == []
    assert len(store.uncommitted_blocks("blob")) == 7


def test_blocks_of_others_are_not_overwritten(store: BlobStore, blob: BlobClient) -> None:
    """An upload of theirs may still be alive, and would commit what it did not write."""
    names = [f"{number:05d}".encode() for number in range(50)]
    stage_foreign(blob, *names)
    with Upload(store, "blob", 8) as upload:
        upload.add([memoryview(DATA)])
        ids = upload.stage()
        taken = [name.decode() for name in names]
        assert len(ids) == 6 and len({*ids, *taken}) == 56
        blob.commit_block_list([BlobBlock(taken[0])])
    assert read(store, "blob") == b"foreign"


def test_both_uploads_of_a_name_have_ids_of_their_own(store: BlobStore, blob: BlobClient) -> None:
    stage_foreign(blob, b"0001")
    first, second = Staging(store, "blob"), Staging(store, "blob")
    for staging in (first, second):
        staging.stage(0, Gather([memoryview(DATA)]), None, Cancel())
    [one], [other] = first.ids([0]), second.ids([0])
    assert one != other and len(one) == len(other) == 4


def test_threads_that_meet_foreign_blocks_agree_on_the_ids(store: BlobStore, blob: BlobClient) -> None:
    staging = Staging(store, "blob")
    stage_foreign(blob, b"0001")
    threads = [
        threading.Thread(
            target=staging.stage, args=(number, Gather([memoryview(DATA)[number : number + 1]]), None, Cancel())
        )
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = staging.ids(range(8))
    assert {len(name) for name in ids} == {4}
    store.commit_blocks("blob", ids)
    assert read(store, "blob") == DATA[:8]


def test_foreign_blocks_that_go_meanwhile_need_no_other_length(
    store: BlobStore, blob: BlobClient, proxy: FaultProxy
) -> None:
    stage_foreign(blob, b"0001")
    proxy.when("Put Block").do(Call(lambda: blob.commit_block_list([]), at="answer"))
    staging = Staging(store, "blob")
    staging.stage(0, Gather([memoryview(DATA)]), None, Cancel())
    assert [len(name) for name in staging.ids([0])] == [BLOCK_ID_LENGTH]


@pytest.mark.parametrize("foreign", [b"1", b"123"])
def test_ids_too_short_to_tell_uploads_apart_are_refused(store: BlobStore, blob: BlobClient, foreign: bytes) -> None:
    stage_foreign(blob, foreign)
    with pytest.raises(RequestRefusedError, match=r"400 InvalidBlobOrBlock.*another name"):
        Staging(store, "blob").stage(0, Gather([memoryview(DATA)]), None, Cancel())


def test_a_credential_that_may_not_look_is_told_what_is_in_the_way(container: str, blob: BlobClient) -> None:
    stage_foreign(blob, b"0001")
    writing = BlobStore(BlobLocation.parse(container), Access(AzureSasCredential(container_sas(container, "wc"))))
    with pytest.raises(RequestRefusedError, match=r"400 InvalidBlobOrBlock.*another name"):
        Staging(writing, "blob").stage(0, Gather([memoryview(DATA)]), None, Cancel())


def test_every_id_of_this_package_has_one_length(store: BlobStore, proxy: FaultProxy) -> None:
    """So that the blocks of a killed upload do not obstruct another one, whatever wrote both."""
    cancel = Cancel()
    writes = [
        functools.partial(write_with_upload, store),
        functools.partial(write_with_blob_io, store),
        functools.partial(BlobDestination(store, "blob").write, 1 << 46, memoryview(b"x"), crc64(b"x"), cancel),
    ]
    for write in writes:
        write()
    lengths = {len(base64.b64decode(seen.query["blockid"])) for seen in proxy.requests("Put Block")}
    lengths |= {len(rank_block_id("0" * 16, rank, 999_999)) for rank in (0, 999_999)}
    assert lengths == {BLOCK_ID_LENGTH, len(block_id("0" * 32, 10**15 - 1))}
