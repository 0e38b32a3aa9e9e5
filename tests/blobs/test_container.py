"""Pages of List Blobs: what the service and others may put into one, and what one costs."""

from __future__ import annotations

import datetime
import sys
from types import FrameType
from typing import Any

import pytest
from azure.core.settings import settings
from azure.core.tracing.ext.opentelemetry_span import OpenTelemetrySpan

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.container import ListPage
from azure_torch_ckpt.blobs.direct_requests import DirectRequests
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.errors import RequestRefusedError
from tests.blobs.stores import ODD_NAMES
from tests.support.faults import Answer
from tests.support.proxy import FaultProxy

pytest_plugins = ("tests.blobs.stores",)

TIME = "Wed, 09 Sep 2026 09:20:02 GMT"
WHEN = datetime.datetime(2026, 9, 9, 9, 20, 2, tzinfo=datetime.timezone.utc)


def blob(name: str, more: str = "", properties: str = "", attributes: str = "") -> str:
    return (
        f"<Blob><Name{attributes}>{name}</Name>{more}<Properties><Last-Modified>{TIME}</Last-Modified><Etag>0x1</Etag>"
        f"<Content-Length>7</Content-Length>{properties}</Properties><OrMetadata /></Blob>"
    )


def page(*entries: str, marker: str = "", before: str = "") -> bytes:
    return (
        f'\ufeff<?xml version="1.0" encoding="utf-8"?>{before}<EnumerationResults ServiceEndpoint="x">'
        f"<Prefix>p</Prefix><MaxResults>9</MaxResults><Blobs>{''.join(entries)}</Blobs><NextMarker>{marker}</NextMarker>"
        "</EnumerationResults>"
    ).encode()


def paths(body: bytes) -> list[str]:
    return [entry if isinstance(entry, str) else entry.path for entry in ListPage(body)]


def test_a_blob_with_everything() -> None:
    metadata = (
        "<Metadata><Name>bob</Name><Etag>mine</Etag><empty /><x-ms-invalid-name>a b</x-ms-invalid-name></Metadata>"
    )
    tags = "<Tags><TagSet><Tag><Key>Name</Key><Value>tag</Value></Tag></TagSet></Tags>"
    properties = f"<Creation-Time>{TIME}</Creation-Time><Content-MD5>sQqNsWTgdUEFt6mb5y4/5Q==</Content-MD5>"
    new = "<Unknown><Name>wrong</Name><Content-Length>1</Content-Length></Unknown>"
    got = ListPage(page(blob("a&amp;b ", new + metadata + tags, properties), marker="next"))
    md5 = bytes.fromhex("b10a8db164e0754105b7a99be72e3fe5")
    assert list(got) == [BlobInfo("a&b ", 7, '"0x1"', WHEN, md5, {"Name": "bob", "Etag": "mine", "empty": ""}, WHEN)]
    assert got.marker == "next"


def test_names_with_characters_that_xml_has_not_come_encoded() -> None:
    prefix = '<BlobPrefix><Name Encoded="true">p%EF%BF%BF/</Name></BlobPrefix>'
    encoded = blob("c%01%2Fd%2541", attributes=' Encoded="true"')
    assert paths(page(blob("%41"), encoded, prefix, blob("%42", attributes=' Encoded="false"'))) == [
        "%41",
        "c\x01/d%41",
        "p\uffff/",
        "%42",
    ]


def test_what_is_no_blob_of_now_is_left_out() -> None:
    gone = [
        blob("deleted", "<Deleted>true</Deleted>"),
        blob("snapshot", "<Snapshot>2026-09-09T09:20:02.0000000Z</Snapshot>"),
        blob("version", "<VersionId>2026</VersionId><IsCurrentVersion>false</IsCurrentVersion>"),
    ]
    current = blob(
        "current", "<VersionId>2026</VersionId><IsCurrentVersion>true</IsCurrentVersion><Deleted>false</Deleted>"
    )
    assert paths(page(*gone, current)) == ["current"]


def test_a_prefix_of_a_hierarchical_namespace_has_properties() -> None:
    properties = f"<Properties><Last-Modified>{TIME}</Last-Modified><Content-Length>0</Content-Length></Properties>"
    assert paths(page(f"<BlobPrefix><Name>d/</Name>{properties}</BlobPrefix>", blob("e"))) == ["d/", "e"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>log in</body></html>",
        b'{"error": 1}',
        page(blob("a"))[:-30],
        page(blob("a").replace("0x1", "\x01")),
        page(blob("a").replace("<Content-Length>7</Content-Length>", "")),
        page(blob("a").replace(">7<", ">seven<")),
        page(blob("a").replace("Sep", "Sup")),
        page("<Blob><Properties /></Blob>"),
        page(blob("&e;"), before='<!DOCTYPE x [<!ENTITY e "v">]>'),
        page(blob("&e;"), before='<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'),
        page(blob("a"), before='<!DOCTYPE x SYSTEM "http://127.0.0.1:1/x.dtd">'),
        page(
            blob("&j;"),
            before="<!DOCTYPE x ["
            + "".join(
                f'<!ENTITY {name} "{"&" + chr(ord(name) - 1) + ";" if name > "a" else "ha"}'
                f'{("&" + chr(ord(name) - 1) + ";") * 9 if name > "a" else ""}">'
                for name in "abcdefghij"
            )
            + "]>",
        ),
    ],
    ids="empty html json cut character no-size size date no-name entity file dtd laughs".split(),  # noqa: SIM905
)
def test_what_is_no_listing_is_told_apart(body: bytes, proxied: BlobStore, proxy: FaultProxy) -> None:
    with pytest.raises(ValueError):
        list(ListPage(body))
    proxy.when("List").do(Answer(200, body=body))
    with pytest.raises(RequestRefusedError, match="not a listing") as caught:
        list(proxied.list(""))
    assert "etc/passwd" not in str(caught.value)


def test_a_page_that_leads_to_itself_ends(proxied: BlobStore, proxy: FaultProxy) -> None:
    proxy.when("List", times=None).do(Answer(200, body=page(blob("a"), marker="again")))
    with pytest.raises(RequestRefusedError, match="next page is itself"):
        list(proxied.list(""))
    assert proxy.count("List") == 2


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_survive_a_listing_in_pages(
    name: str, proxied: BlobStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix and marker are part of what is signed."""
    names = [f"{name}/{number}" for number in range(3)]
    for each in names:
        proxied.put(each, b"")
    assert [info.path for info in proxied.list(f"{name}/")] == names
    list_page = DirectRequests.list_page
    monkeypatch.setattr(DirectRequests, "list_page", lambda *args, **kwargs: list_page(*args, **{**kwargs, "limit": 1}))
    assert [info.path for info in proxied.list(f"{name}/")] == names
    assert proxy.count("List") == 1 + 3


@pytest.mark.parametrize("traced", [False, True])
def test_the_pages_of_the_client_are_the_same(traced: bool, proxied: BlobStore, proxy: FaultProxy) -> None:
    """With tracing the client of azure-storage-blob sends the request, for its span. The page is parsed here, too."""
    for name in ("a", "b/1", "b/2"):
        proxied.put(name, b"data")
    settings.tracing_implementation = OpenTelemetrySpan if traced else None
    try:
        assert [info.path for info in proxied.list("b/", limit=1)] == ["b/1"]
        assert {entry if isinstance(entry, str) else entry.path for entry in proxied.list_folder("")} == {"a", "b/"}
        assert proxied.now().tzinfo is not None
    finally:
        settings.tracing_implementation = None
    by_client = ["azsdk-python-storage-blob/" in one.headers["user-agent"] for one in proxy.requests("List")]
    assert by_client == [traced] * 3


def test_the_sdk_makes_one_object_for_a_blob(proxied: BlobStore, proxy: FaultProxy) -> None:

    def calls_into_the_sdk(count: int) -> int:
        names = [f"{number:05d}" for number in range(count)]
        proxy.when("List").do(Answer(200, body=page(*map(blob, names))))
        calls = 0

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call" and "/azure/" in frame.f_code.co_filename.replace("\\", "/")

        sys.setprofile(profile)
        try:
            found = [info.path for info in proxied.list("")]
        finally:
            sys.setprofile(None)
        assert found == names
        return calls

    calls_into_the_sdk(1)  # makes the client
    # Its ContentSettings are what a copy hands on: one object.
    assert calls_into_the_sdk(1000) - calls_into_the_sdk(1) == 999
