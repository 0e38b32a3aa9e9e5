"""What lies in a container: names, bytes and ETags of its blobs, and how a test puts others there."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, BlobLocation, CheckpointNotFoundError
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.dcp.blob_names import new_save_id
from azure_torch_ckpt.emulator import Azurite

KEY = Azurite.account_key

_LIMIT = 1 << 30


def store_of(url: str) -> BlobStore:
    """The container of a URL, with the emulator's key."""
    return BlobStore(BlobLocation.parse(url), Access(KEY))


def container_sas(url: str, permission: str = "racwdl", hours: float = 1) -> str:
    """A SAS for the container of a URL, with the service's letters for `permission`; expired if `hours` is negative."""
    place = BlobLocation.parse(url)
    return generate_container_sas(
        place.account,
        place.container,
        account_key=KEY,
        permission=ContainerSasPermissions.from_string(permission),
        expiry=datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=hours),
    )


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


def download(url: str, folder: Path) -> Path:
    """Copy a checkpoint or model to the disk as its blobs lie in the container."""
    for name, data in contents(url).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def upload(folder: Path, url: str) -> None:
    """Copy what lies in a folder to a URL."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    put_all(url, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})


def snapshot(url: str) -> dict[str, tuple[str, bytes]]:
    """ETag and bytes of every blob in the container of `url`, by path: equal only if nothing was written between."""
    store = store_of(url)
    return {blob.path: (blob.etag, store.read(blob.path, limit=_LIMIT)[0]) for blob in store.list("")}


def plant(container: str, names: Iterable[str]) -> None:
    """Many complete checkpoints of one small tensor in little time: one is saved, and its blobs are put at `names`."""
    dcp.save({"x": torch.arange(3)}, storage_writer=AzureBlobWriter(f"{container}/seed", credential=KEY))
    blobs = dict(sorted(contents(f"{container}/seed").items(), key=lambda blob: blob[0] == ".metadata"))
    store = store_of(container)

    def at(name: str) -> None:
        for path, data in blobs.items():
            store.put(f"{name}/{path}", data)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(at, names))
    for path in blobs:
        store.delete(f"seed/{path}")


def plant_leftovers(container: str, checkpoint: str, ranks: int = 2) -> list[str]:
    """Put data blobs of 10 bytes as a save that was killed before its commit; return their paths."""
    save_id = new_save_id()
    paths = [f"{checkpoint}/{save_id}/__{rank}_0.distcp".lstrip("/") for rank in range(ranks)]
    for path in paths:
        put(container, path, b"1234567890")
    return paths
