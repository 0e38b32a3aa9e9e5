"""What lies in a container: names, bytes and ETags of its blobs, and how a test puts others there."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

from azure.storage.blob import generate_container_sas

from azure_torch_ckpt import AzureBlobReader, BlobLocation, CheckpointNotFoundError
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite

KEY = Azurite.account_key

_LIMIT = 1 << 30


def store_of(url: str) -> BlobStore:
    """The container of a URL, with the emulator's key."""
    return BlobStore(BlobLocation.parse(url), Access(KEY))


def container_sas(url: str, permission: str) -> str:
    """A SAS for the container of a URL, valid for an hour, with the service's letters for `permission` (``"rl"``)."""
    place = BlobLocation.parse(url)
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
    return generate_container_sas(place.account, place.container, account_key=KEY, permission=permission, expiry=end)


def paths_below(url: str, suffix: str = "") -> list[str]:
    """Paths in the container of the blobs below `url` that end so, in order."""
    return [blob.path for blob in store_of(url).list(BlobLocation.parse(url).prefix) if blob.path.endswith(suffix)]


def blob_names(url: str) -> set[str]:
    """Names, relative to `url`, of all blobs below it."""
    prefix = BlobLocation.parse(url).prefix
    return {path.removeprefix(prefix) for path in paths_below(url)}


def data_blobs(url: str) -> set[str]:
    """Names, relative to `url`, of the data blobs below it."""
    return {name for name in blob_names(url) if name.endswith(".distcp")}


def live_blobs(url: str) -> set[str]:
    """Names, relative to `url`, of the blobs of the checkpoint there; empty where there is no checkpoint."""
    try:
        metadata = AzureBlobReader(url, credential=KEY).read_metadata()
    except CheckpointNotFoundError:
        return set()
    return {".metadata", *(info.relative_path for info in metadata.storage_data.values())}


def content(url: str, path: str) -> bytes:
    """The bytes of a blob, by its path in the container of `url`."""
    return store_of(url).read(path, limit=_LIMIT)[0]


def put(url: str, path: str, data: bytes = b"x") -> None:
    """Write a blob, by its path in the container of `url`."""
    store_of(url).put(path, data)


def contents(url: str) -> dict[str, bytes]:
    """The bytes of all blobs below `url`, by their names relative to it."""
    location = BlobLocation.parse(url)
    return {name: content(url, location.join(name).path) for name in sorted(blob_names(url))}


def put_all(url: str, blobs: Mapping[str, bytes]) -> None:
    """Write the blobs that `contents` returned for another URL."""
    location = BlobLocation.parse(url)
    for name, data in blobs.items():
        put(url, location.join(name).path, data)


def snapshot(url: str) -> dict[str, tuple[str, bytes]]:
    """ETag and bytes of every blob in the container of `url`, by path: equal only if nothing was written between."""
    store = store_of(url)
    return {blob.path: (blob.etag, store.read(blob.path, limit=_LIMIT)[0]) for blob in store.list("")}
