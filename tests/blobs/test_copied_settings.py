"""A copy has the settings, metadata and tags of its source, however the bytes are copied; a move loses nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from azure.storage.blob import BlobClient, ContentSettings

from azure_torch_ckpt import AccessDeniedError, BlobLocation, TransferOptions
from azure_torch_ckpt.blobs import blob_copy as blobcopy
from azure_torch_ckpt.blobs.blob_info import METADATA_LIMIT
from azure_torch_ckpt.catalog import copy, verify
from azure_torch_ckpt.catalog.copying import file_copy as filecopy
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from tests.filesystem.emulated_filesystem import azblob, filesystem
from tests.support.faults import Answer, Exchange
from tests.support.mixed_checkpoint import KEY, SMALL, item_of, save
from tests.support.proxy import FaultProxy
from tests.support.put_block_from_url import FromUrlServer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

MIB = 1 << 20
CONTENT = ContentSettings(
    content_type="text/csv",
    content_encoding="gzip",
    content_language="de",
    content_md5=bytearray(range(16)),
    content_disposition="inline",
    cache_control="no-store",
)
METADATA = {"Owner": "me", "step": "7"}
TAGS = {"project": "a b/c", "run": "7"}


def blob(url: str, name: str = "") -> BlobClient:
    location = BlobLocation.parse(f"{url}/{name}" if name else url)
    return BlobClient(location.endpoint, location.container, location.path, credential=Azurite.account_key)


def dress(client: BlobClient, tags: dict[str, str] | None = None) -> None:
    client.set_http_headers(CONTENT)
    client.set_blob_metadata(METADATA)
    if tags:
        client.set_blob_tags(tags)


def carried(client: BlobClient) -> tuple[ContentSettings, dict[str, str], dict[str, str]]:
    properties = client.get_blob_properties()
    metadata = {name: value for name, value in properties.metadata.items() if name != blobcopy.MARK}
    return properties.content_settings, metadata, client.get_blob_tags()


@pytest.fixture(params=["whole by the service", "parts by the service", "through this machine", "empty"])
def way(request: pytest.FixtureRequest, azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A way to copy a blob of 3 MiB, and the endpoint for it."""
    if request.param == "parts by the service":
        with FromUrlServer(azurite) as server:
            monkeypatch.setattr(blobcopy, "_LARGEST_WHOLE", MIB)
            monkeypatch.setattr(blobcopy, "SERVICE_PART", MIB)
            yield request.param, server.endpoint
            assert len(server.fetched) == 3
        return
    if request.param == "through this machine":
        monkeypatch.setattr(blobcopy.ServiceFetch, "try_to", lambda *_: None)
    yield request.param, azurite.endpoint


@pytest.mark.parametrize("tags", [{}, TAGS])
@pytest.mark.parametrize("verb", ["cp", "mv"])
def test_blob(way: tuple[str, str], container: str, verb: str, tags: dict[str, str]) -> None:
    kind, endpoint = way
    data = b"" if kind == "empty" else bytes(range(256)) * (3 * MIB // 256)
    source, target = blob(container, "a"), blob(container, "b/c")
    source.upload_blob(data)
    dress(source, tags)
    root = azblob(container)
    fs = AzureBlobFileSystem(endpoint=endpoint, account_key=Azurite.account_key)
    getattr(fs, verb)(f"{root}/a", f"{root}/b/c")
    assert fs.cat(f"{root}/b/c") == data
    assert carried(target) == (CONTENT, METADATA, tags)
    assert source.exists() == (verb == "cp")


def is_about_tags(seen: Exchange) -> bool:
    return seen.query.get("comp") == "tags" or "x-ms-tags" in seen.headers


@pytest.mark.parametrize("right", ["read", "write"])
def test_tags_that_are_refused_are_left_out_by_a_copy_and_stop_a_move(
    proxy: FaultProxy, container: str, caplog: pytest.LogCaptureFixture, right: str
) -> None:
    """The emulator lets every SAS read and write tags, so the refusal is the proxy's."""
    source, target = blob(container, "a"), blob(container, "b")
    source.upload_blob(b"x" * 1000)
    dress(source, TAGS)
    proxy.when(lambda seen: is_about_tags(seen) and (seen.method == "GET") == (right == "read"), times=None).do(
        Answer(403, "AuthorizationPermissionMismatch")
    )
    fs = AzureBlobFileSystem(endpoint=proxy.endpoint, account_key=Azurite.account_key)
    root = azblob(container)
    with pytest.raises(AccessDeniedError):
        fs.mv(f"{root}/a", f"{root}/b")
    assert source.exists() and not target.exists()
    fs.cp(f"{root}/a", f"{root}/b")
    assert carried(target) == (CONTENT, METADATA, {})
    assert "without" in caplog.text and "index tags" in caplog.text


@pytest.mark.parametrize("by", ["service", "parts", "here"])
def test_checkpoint(azurite: Azurite, container: str, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """A second copy moves nothing, though the blobs have metadata of their own."""
    save(f"{container}/a", 1)
    names = [item_of(f"{container}/a", "large").relative_path, "own.pt", ".metadata"]
    blob(container, "a/own.pt").upload_blob(b"")
    for name in names:
        md5 = blob(container, f"a/{name}").get_blob_properties().content_settings.content_md5
        dress(blob(container, f"a/{name}"), TAGS)
        if name == ".metadata":  # its MD5 is compared
            blob(container, f"a/{name}").set_http_headers(ContentSettings("text/csv", content_md5=md5))
    if by == "here":
        monkeypatch.setattr(blobcopy.ServiceFetch, "try_to", lambda *_: None)
    with FromUrlServer(azurite) as server:
        endpoint = server.endpoint if by == "parts" else azurite.endpoint
        monkeypatch.setattr(filecopy, "SERVICE_PART", 64 * 1024)
        to = f"{endpoint}/{BlobLocation.parse(container).container}"
        copy(f"{to}/a", f"{to}/b", credential=KEY, options=SMALL)
        assert by != "parts" or len(server.fetched) > 2
    assert verify(f"{container}/b", credential=KEY).ok
    for name in names:
        assert carried(blob(container, f"b/{name}")) == carried(blob(container, f"a/{name}"))
        assert carried(blob(container, f"b/{name}"))[1:] == (METADATA, TAGS)
    assert copy(f"{container}/a", f"{container}/b", credential=KEY, options=SMALL).blobs == 0


def test_the_metadata_where_tags_may_not_be_written(
    proxy: FaultProxy, container: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(f"{container}/a", 1)
    blob(container, "a/.metadata").set_blob_tags(TAGS)
    proxy.when(lambda seen: "x-ms-tags" in seen.headers, times=None).do(Answer(403, "AuthorizationPermissionMismatch"))
    copy(f"{container}/a", f"{proxy.endpoint}/{BlobLocation.parse(container).container}/b", credential=KEY)
    assert verify(f"{container}/b", credential=KEY).ok
    assert carried(blob(container, "b/.metadata"))[2] == {}
    assert "is without the index tags" in caplog.text


def test_metadata_that_leaves_no_room_for_the_mark(container: str) -> None:
    save(f"{container}/a", 1)
    name = item_of(f"{container}/a", "large").relative_path
    blob(container, f"a/{name}").set_blob_metadata({"full": "x" * (METADATA_LIMIT - 4)})
    copy(f"{container}/a", f"{container}/b", credential=KEY)
    assert blob(container, f"b/{name}").get_blob_properties().metadata == {"full": "x" * (METADATA_LIMIT - 4)}
    assert verify(f"{container}/b", credential=KEY).ok


def test_an_empty_blob_does_not_turn_the_service_off(azurite: Azurite, container: str) -> None:
    """A service that refuses a range of an empty blob, as the real one does."""
    save(f"{container}/a", 1)
    blob(container, "a/0-first").upload_blob(b"")
    with FromUrlServer(azurite) as server:
        server.refuses_empty = True
        to = f"{server.endpoint}/{BlobLocation.parse(container).container}"
        copy(f"{to}/a", f"{to}/b", credential=KEY, options=TransferOptions(concurrency=1), verify=False)
        assert not [path for path in server.read if path.endswith(".distcp")]
    assert blob(container, "b/0-first").get_blob_properties().size == 0


@pytest.mark.parametrize("kind", ["append", "page"])
def test_other_kinds_of_blobs_are_copied(container: str, kind: str) -> None:
    """And become block blobs."""
    source = blob(container, "a")
    if kind == "append":
        source.create_append_blob()
        source.append_block(b"x" * 512)
    else:
        source.create_page_blob(512)
        source.upload_page(b"x" * 512, 0, 512)
    dress(source, TAGS)
    fs = filesystem(container)
    fs.mv(azblob(f"{container}/a"), azblob(f"{container}/b"))
    assert fs.cat(azblob(f"{container}/b")) == b"x" * 512
    assert carried(blob(container, "b")) == (CONTENT, METADATA, TAGS)
