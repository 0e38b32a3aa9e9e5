"""Answers of the real service to each request, and the results and errors of the store.

``service_facts.json`` has the answers, each with its source: recordings, documentation, issues. The proxy gives each to
the operation that it was given to; an operation that nothing here uses (Put Page, say) has the one that is nearest.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from azure_torch_ckpt._internal.checksums import header_value
from azure_torch_ckpt.blobs.blob_copy import BlobDestination, ServiceFetch, copy_blob
from azure_torch_ckpt.blobs.blob_info import BlobInfo, CopiedSettings
from azure_torch_ckpt.blobs.service_copy import CopySource
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobChangedError,
    BlobNotFoundError,
    ContainerNotFoundError,
    RequestRefusedError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel, Gather
from tests.blobs.stores import KEY, texts_of
from tests.support.containers import container_sas
from tests.support.faults import Answer, Exchange
from tests.support.proxy import FaultProxy
from tests.support.waits import Clock, without_waiting

FACTS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("service_facts.json").read_text(encoding="utf-8"))[
    "facts"
]
ETAG = '"0x8DD0123456789AB"'
TIME = "Wed, 09 Sep 2026 09:20:02 GMT"
CRC = 0x0123456789ABCDEF
MD5 = bytes(range(16))
BLOCK = "b" * 48
PLACEHOLDERS = {
    "<hex>": "0x8DD0123456789AB",
    "{0x<HEX>}": "0x8DD0123456789AB",
    "<rfc1123>": TIME,
    "{rfc1123}": TIME,
    "<timestamp>": "2026-09-09T09:20:02.1234567Z",
    "{timestamp}": "2026-09-09T09:20:02.1234567Z",
    "<guid>": "5f0b8f3e-001e-0054-2d21-0d3f10000000",
    "<base64-crc64>": header_value(CRC),
    "<base64-md5>": base64.b64encode(MD5).decode(),
    "{base64-md5}": base64.b64encode(MD5).decode(),
    "<tenant>": "72f988bf-86f1-41af-91ab-2d7cd011db47",
    "<endpoint>": "https://account.blob.core.windows.net/",
    "<container>": "container",
    "{n}": "1024",
    "{opaque}": "2!72!opaque",
    "{text}": "What it says differs.",
    "{...}": "",
}

Act = Callable[[BlobStore, str], Any]


@dataclass(frozen=True)
class Refused:
    """An error of this class whose message says what to do; `retried` is for how many seconds it was tried again."""

    error: type[StoreError]
    says: str
    retried: tuple[float, float] = (0, 0)


def source_of(url: str) -> CopySource:
    where = BlobLocation.parse(url)
    return BlobStore(where).copy_source(where.path, ETAG)


def moment_of(store: BlobStore) -> BlobLocation:
    return BlobLocation.parse(f"{store.location}/blob?snapshot=2026-09-09T09:20:02.1234567Z")


# Each is given a store, and the URL of a source of copies.
ACTS: dict[str, Act] = {
    "put_block": lambda store, _: store.stage_block("blob", BLOCK, Gather([memoryview(b"data")]), CRC),
    "put_block_from_url": lambda store, url: store.stage_block_from("blob", BLOCK, source_of(url), 0, 4),
    "put_block_list": lambda store, _: store.commit_blocks("blob", []),
    "put_block_list_if_match": lambda store, _: store.commit_blocks("blob", [], if_etag='"0x1"'),
    "put_block_list_if_none_match": lambda store, _: store.commit_blocks("blob", [], if_missing=True),
    "get_block_list": lambda store, _: store.uncommitted_blocks("blob"),
    "put_blob": lambda store, _: store.put("blob", b"data"),
    "put_blob_if_match": lambda store, _: store.put("blob", b"data", if_etag='"0x1"'),
    "put_blob_if_none_match": lambda store, _: store.put("blob", b"data", if_missing=True),
    "get_blob": lambda store, _: store.read_some("blob", 100, 200),
    "get_blob_to_its_end": lambda store, _: store.read_some("blob", 0, 1 << 20),
    "get_blob_if_match": lambda store, _: store.read_into("blob", 0, [memoryview(bytearray(10))], if_etag='"0x1"'),
    "get_properties": lambda store, _: store.stat("blob"),
    "get_properties_if_match": lambda store, _: store.stat("blob", if_etag='"0x1"'),
    "get_properties_of_a_snapshot": lambda store, _: store.stat("blob", moment=moment_of(store)),
    "list_blobs": lambda store, _: list(store.list("")),
    "list_with_delimiter": lambda store, _: [
        entry if isinstance(entry, str) else entry.path for entry in store.list_folder("")
    ],
    "delete_blob": lambda store, _: store.delete("blob"),
    "delete_blob_if_match": lambda store, _: store.delete("blob", if_etag='"0x1"'),
    "delete_directory": lambda store, _: store.delete_folder("blob"),
    "copy_from_url": lambda store, url: store.copy("blob", source_of(url)),
    "create_container": lambda store, _: store.create_container(),
}


def listed(count: int, **expected: Any) -> Callable[[list[BlobInfo]], bool]:
    def holds(found: list[BlobInfo]) -> bool:
        first = found[0] if found else None
        told = {name: getattr(first, name) for name in expected}
        return len(found) == count and told == expected

    return holds


def described(size: int, data: int, **expected: Any) -> Callable[[tuple[bytes, BlobInfo]], bool]:
    def holds(got: tuple[bytes, BlobInfo]) -> bool:
        info = got[1]
        told = {name: getattr(info, name) for name in expected}
        return (len(got[0]), info.size, info.etag, told) == (data, size, ETAG, expected)

    return holds


IS_A_DIRECTORY = lambda info: info.is_folder and info.size == 0 and info.etag == ETAG  # noqa: E731
# A source that the service cannot read is not tried again: the bytes can go through this machine.
NO_SOURCE = Refused(RequestRefusedError, "copy the data through this machine")
DAMAGED = Refused(RequestRefusedError, "do not have the checksum", (5, 25))
CHANGED = Refused(BlobChangedError, "412 ConditionNotMet")
ACCESS = Refused(AccessDeniedError, "Check that the credential")
ANONYMOUS = Refused(AccessDeniedError, "Pass a credential=")
NO_BLOB = Refused(BlobNotFoundError, "404 BlobNotFound")
CPK = Refused(RequestRefusedError, "encrypted with a key that each request must send.*Store it again")
IMMUTABLE = Refused(RequestRefusedError, "immutability policy.*Write to another name")
OTHER_PATH = Refused(RequestRefusedError, "made over the account's dfs endpoint.*Delete it first")

EXPECTED: dict[str, list[tuple[str, Any]]] = {
    "put-block-crc64": [("put_block", None)],
    "put-block-md5": [("put_block", None)],
    "put-block-crc64-mismatch": [("put_block", DAMAGED)],
    "put-block-md5-mismatch": [("put_block", DAMAGED)],
    "put-block-no-hash": [("put_block", None)],
    "put-block-from-url": [("put_block_from_url", CRC)],
    "put-block-from-url-crc64-mismatch": [("put_block_from_url", DAMAGED)],
    "put-block-from-url-md5": [("put_block_from_url", None)],
    "put-block-list": [("put_block_list", ETAG)],
    "put-block-list-unknown-block": [("put_block_list", Refused(RequestRefusedError, "Write it again"))],
    "put-block-list-if-match": [("put_block_list_if_match", CHANGED)],
    "put-block-list-if-none-match-etag": [("put_block_list_if_none_match", CHANGED)],
    "get-block-list-uncommitted": [("get_block_list", ["bmFtZS0x"])],
    "put-blob": [("put_blob", ETAG)],
    "put-blob-md5-mismatch": [("put_blob", DAMAGED)],
    "put-blob-crc64-mismatch": [("put_blob", DAMAGED)],
    "put-blob-if-match": [("put_blob_if_match", CHANGED)],
    "put-blob-if-none-match-etag": [("put_blob_if_none_match", CHANGED)],
    "put-blob-if-none-match-star": [("put_blob_if_none_match", Refused(BlobChangedError, "409 BlobAlreadyExists"))],
    "put-blob-no-container": [("put_blob", Refused(ContainerNotFoundError, "Create the container"))],
    "put-blob-anonymous": [("put_blob", ANONYMOUS)],
    "get-blob-range": [("get_blob", described(1024, 200, md5=MD5, metadata={"run": "7"}))],
    "get-blob-range-no-md5": [("get_blob_to_its_end", described(26, 26, md5=None, metadata=None, kind="AppendBlob"))],
    "get-blob-whole": [("get_blob_to_its_end", described(300, 300, md5=MD5))],
    "get-blob-if-match": [("get_blob_if_match", CHANGED)],
    "get-blob-range-of-empty": [("get_blob_to_its_end", lambda got: got[0] == b"" and got[1].size == 0)],
    "get-blob-missing": [("get_blob", NO_BLOB)],
    "get-blob-cpk": [("get_blob", CPK)],
    "get-blob-anonymous-old": [
        ("get_blob", Refused(ContainerNotFoundError, "a private container gives the same answer"))
    ],
    "head-missing": [("get_properties", NO_BLOB)],
    "head-no-container": [("get_properties", Refused(ContainerNotFoundError, "Create the container"))],
    "head-if-match": [("get_properties_if_match", CHANGED)],
    "head-bad-snapshot": [("get_properties_of_a_snapshot", Refused(RequestRefusedError, "Check the URL"))],
    "head-cpk": [("get_properties", CPK)],
    "head-hns-directory": [("get_properties", IS_A_DIRECTORY)],
    "head-hns-directory-new": [("get_properties", IS_A_DIRECTORY)],
    "list-delimiter": [("list_with_delimiter", ["name-1", "name-2", "name-3"])],
    "list-page": [("list_blobs", listed(1, path="name-1", etag=ETAG, size=1024, md5=None, kind="AppendBlob"))],
    "list-metadata": [("list_blobs", listed(1, md5=MD5, metadata={"number": "1", "name": "bob"}))],
    "list-hns": [("list_blobs", listed(0))],  # what is deleted is not there
    "delete": [("delete_blob", True)],
    "delete-missing": [("delete_blob", False)],
    "delete-if-match": [("delete_blob_if_match", CHANGED)],
    "delete-leased": [("delete_blob", Refused(RequestRefusedError, "A lease protects.*break it"))],
    "delete-snapshots-present": [("delete_blob", Refused(RequestRefusedError, "Delete those first"))],
    "delete-snapshots-include": [("delete_blob", True)],
    "delete-anonymous": [("delete_blob", ANONYMOUS)],
    "copy-from-url": [("copy_from_url", CRC)],
    "copy-from-url-md5": [("copy_from_url", None)],
    "copy-from-url-source-if-match": [("copy_from_url", Refused(BlobChangedError, "412 CannotVerifyCopySource"))],
    "put-block-from-url-source-if-match": [
        ("put_block_from_url", Refused(BlobChangedError, "412 CannotVerifyCopySource"))
    ],
    "container-exists": [("create_container", None)],
    "container-bad-name": [("create_container", Refused(RequestRefusedError, "Correct the container's name"))],
    "bearer-malformed": [("list_blobs", ACCESS)],
    "no-permission": [("get_blob", ACCESS)],
    "internal-error": [
        (act, Refused(ServiceUnavailableError, "busy or down", (60, 120))) for act in ("put_block", "put_blob")
    ],
    "copy-source-no-auth": [("copy_from_url", NO_SOURCE)],
    "copy-source-unreachable": [("copy_from_url", NO_SOURCE), ("put_block_from_url", NO_SOURCE)],
    "copy-source-firewall": [("copy_from_url", NO_SOURCE), ("put_block_from_url", NO_SOURCE)],
    "copy-of-empty": [("copy_from_url", NO_SOURCE)],
    "put-block-other-id-length": [("put_block", Refused(RequestRefusedError, "another name"))],
    "put-block-on-dfs-file": [("put_block", OTHER_PATH), ("put_block_list", OTHER_PATH)],
    "delete-hns-directory-with-snapshots-header": [
        ("delete_blob", Refused(RequestRefusedError, "directory of a hierarchical namespace"))
    ],
    "delete-hns-directory-not-empty": [
        ("delete_directory", False),
        ("delete_blob", Refused(RequestRefusedError, "Delete its content first")),
    ],
    "blob-immutable": [("put_blob", IMMUTABLE), ("delete_blob", IMMUTABLE)],
    "blob-archived": [("get_blob", Refused(RequestRefusedError, "Move it to an online tier"))],
    "blob-rehydrating": [("get_blob", Refused(RequestRefusedError, "Try again later"))],
    "public-access-off": [
        (act, ANONYMOUS)
        for act in ("put_block", "put_block_list", "put_blob", "get_blob", "get_properties", "list_blobs")
    ],
    "container-being-deleted": [("create_container", Refused(RequestRefusedError, "Create it after that"))],
}
WITHOUT_CREDENTIAL = {"put-blob-anonymous", "delete-anonymous", "get-blob-anonymous-old", "public-access-off"}
CASES = [
    pytest.param(fact, ACTS[act], outcome, id=f"{fact['id']}-{act}")
    for fact in FACTS
    for act, outcome in EXPECTED[fact["id"]]
]


def filled_in(text: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    numbers = iter(range(1, 100))
    names = "bmFtZS0x" if "<BlockList>" in text else None  # the ids of blocks are base64
    return re.sub(r"\{name\}", lambda _: names or f"name-{next(numbers)}", text)


def answer_of(fact: dict[str, Any]) -> Answer:
    headers = {name: filled_in(value) for name, value in fact["headers"].items()}
    if headers.pop("x-ms-meta-<name>", None):
        headers["x-ms-meta-run"] = "7"
    if headers.get("Content-Length") == "<n>":
        del headers["Content-Length"]  # the proxy knows it
    body = filled_in(fact["body_xml_skeleton"] or "").encode()
    if fact["operation"] == "Get Blob" and fact["status"] < 300:
        first, last = re.search(r"(\d+)-(\d+)/", headers.get("Content-Range", "0-299/")).groups()  # type: ignore[union-attr]
        body = bytes(int(last) - int(first) + 1)
    return Answer(fact["status"], headers=headers, body=body)


@pytest.fixture
def clock() -> Iterator[Clock]:
    with without_waiting() as made:
        yield made


def test_every_fact_is_tried() -> None:
    assert len(FACTS) == 69 and all(fact["source"] for fact in FACTS)
    assert {fact["id"] for fact in FACTS} == EXPECTED.keys()


@pytest.mark.parametrize(("fact", "act", "outcome"), CASES)
def test_what_the_service_answers(
    fact: dict[str, Any],
    act: Act,
    outcome: Any,
    container: str,
    proxied_container: str,
    proxy: FaultProxy,
    clock: Clock,
) -> None:
    BlobStore(BlobLocation.parse(container), Access(KEY)).put("blob", b"")
    sas, source_sas = container_sas(container), container_sas(container, "r", hours=2)
    location = BlobLocation.parse(
        proxied_container if fact["id"] in WITHOUT_CREDENTIAL else f"{proxied_container}?{sas}"
    )
    store = BlobStore(location, Access(False))
    exchanges: list[Exchange] = []

    def is_the_fact(exchange: Exchange) -> bool:
        # The pages after the recorded one, and what follows an empty range, are the emulator's.
        follows = "marker" in exchange.query or any(exchange.kind != seen.kind for seen in exchanges)
        if not follows:
            exchanges.append(exchange)
        return not follows

    proxy.when(is_the_fact, times=None).do(answer_of(fact))
    proxy.when(lambda exchange: "marker" in exchange.query, times=None).do(Answer(200, body=LAST_PAGE))
    if not isinstance(outcome, Refused):
        got = act(store, f"{container}/source?{source_sas}")
        assert outcome(got) if callable(outcome) else got == outcome
        assert clock.waits == [] and len(exchanges) == 1
        return
    with pytest.raises(outcome.error) as caught:
        act(store, f"{container}/source?{source_sas}")
    error = caught.value
    assert type(error) is outcome.error
    assert (error.status, error.error_code) == (fact["status"], fact["error_code"] or code_in(fact))
    assert re.search(outcome.says, str(error)), str(error)
    assert str(location.without_sas()) in str(error) and str(fact["status"]) in str(error)
    for secret in (sas, source_sas):
        signature = secret.partition("sig=")[2].partition("&")[0]
        assert len(signature) > 20 and signature not in texts_of(error)
    least, most = outcome.retried
    assert least <= sum(clock.waits) <= most
    # A 401 is asked about once more, by the client of azure-storage-blob, which answers challenges.
    asked_twice = fact["status"] == 401 and exchanges[0].kind in ("Put Block", "Get Blob", "List")
    assert len(exchanges) == 1 + len(clock.waits) + asked_twice


@pytest.mark.parametrize(
    ("fact", "whole"),
    [
        pytest.param(fact, whole, id=f"{fact['id']}-{'whole' if whole else 'part'}")
        for fact in FACTS
        if fact["id"].startswith("copy-source-")
        for whole in (True, False)
    ],
)
def test_what_the_service_cannot_read_is_copied_through_here_at_once(
    fact: dict[str, Any], whole: bool, container: str, proxied_container: str, proxy: FaultProxy, clock: Clock
) -> None:
    """A part stands for a blob of more than 256 MiB."""
    source = BlobStore(BlobLocation.parse(container), Access(KEY))
    target = BlobStore(BlobLocation.parse(proxied_container), Access(KEY))
    source.put("source", b"0123456789")
    proxy.when(lambda seen: "x-ms-copy-source" in seen.headers, times=None).do(answer_of(fact))
    if whole:
        copy_blob(source, source.location.join("source"), target, target.location.join("copy"))
        assert target.read("copy", limit=100)[0] == b"0123456789"
        assert proxy.count("Copy Blob") == 1
    else:
        fetch, destination, info = ServiceFetch(source), BlobDestination(target, "copy"), source.stat("source")
        assert fetch.try_to(destination, info, 0, 5, None, Cancel()) is None
        assert not fetch.possible and proxy.count("Put Block") == 1
    assert clock.waits == []


def test_a_busy_source_is_waited_for_but_not_for_long(
    container: str, proxied_container: str, proxy: FaultProxy, clock: Clock
) -> None:
    """The status of CannotVerifyCopySource is that of the source's answer to the service."""
    source = BlobStore(BlobLocation.parse(container), Access(KEY))
    target = BlobStore(BlobLocation.parse(proxied_container), Access(KEY))
    source.put("source", b"0123456789")
    proxy.when("Copy Blob", times=None).do(Answer(503, "CannotVerifyCopySource"))
    copy_blob(source, source.location.join("source"), target, target.location.join("copy"))
    assert target.read("copy", limit=100)[0] == b"0123456789"
    assert 5 < sum(clock.waits) <= 25


@pytest.mark.parametrize(("status", "code"), [(404, "BlobNotFound"), (409, "BlobArchived"), (412, "LeaseIdMissing")])
def test_what_ails_one_blob_does_not_end_the_services_copies(
    status: int, code: str, container: str, proxied_container: str, proxy: FaultProxy
) -> None:
    source = BlobStore(BlobLocation.parse(container), Access(KEY))
    target = BlobStore(BlobLocation.parse(proxied_container), Access(KEY))
    source.put("source", b"0123456789")
    proxy.when("Copy Blob").do(Answer(status, code))
    fetch, info = ServiceFetch(source), source.stat("source")
    assert fetch.try_to(BlobDestination(target, "copy"), info, 0, 10, CopiedSettings(), Cancel()) is None
    assert fetch.possible
    assert fetch.try_to(BlobDestination(target, "copy"), info, 0, 10, CopiedSettings(), Cancel()) is not None
    assert target.read("copy", limit=100)[0] == b"0123456789"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"<?xml version='1.0'?><Error><Code>BlobArchived</Code><Message>x</Message></Error>", "BlobArchived"),
        (b'{"error": {"code": "BlobArchived", "message": "x"}}', "BlobArchived"),
        (b"<Error><Code>Blob<b/>Archived</Code></Error>", None),
        (b"<!DOCTYPE html><title>409</title>", None),
        (b"\xff\xfe\x00", None),
        (b"", None),
    ],
)
@pytest.mark.parametrize("act", ["get_blob", "get_properties", "put_block", "list_blobs"])
def test_the_error_code_is_read_from_the_body_where_no_header_has_it(
    body: bytes, code: str | None, act: str, proxied_container: str, proxy: FaultProxy
) -> None:
    proxy.when(lambda _: True, times=None).do(Answer(409, body=body))
    with pytest.raises(RequestRefusedError) as caught:
        ACTS[act](BlobStore(BlobLocation.parse(proxied_container), Access(KEY)), "")
    assert caught.value.error_code == (None if act == "get_properties" else code)  # HEAD has no body


LAST_PAGE = b"<EnumerationResults><Blobs /><NextMarker /></EnumerationResults>"


def code_in(fact: dict[str, Any]) -> str | None:
    """Where the header lacks it, and the fact says so with None."""
    found = re.search("<Code>(.*?)</Code>", fact["body_xml_skeleton"] or "")
    return None if found is None else found[1]
