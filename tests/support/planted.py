"""Many checkpoints in little time: one is saved, and its blobs are put at as many places as a test wants."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AzureBlobWriter, BlobLocation
from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.blob_names import new_save_id
from tests.support.mixed_checkpoint import KEY, blobs_below


def put(container: str, path: str, data: bytes = b"x") -> None:
    store = BlobStore(BlobLocation.parse(container), Access(KEY))
    store.put(path, data)


def content(container: str, path: str) -> bytes:
    store = BlobStore(BlobLocation.parse(container), Access(KEY))
    return store.read(path, limit=1 << 30)[0]


def plant(container: str, names: Iterable[str]) -> None:
    """A complete checkpoint of one small tensor at each of `names`, data first as a save does it."""
    dcp.save({"x": torch.arange(3)}, storage_writer=AzureBlobWriter(f"{container}/seed", credential=KEY))
    paths = [path.removeprefix("seed/") for path in blobs_below(f"{container}/seed")]
    blobs = {path: content(container, f"seed/{path}") for path in sorted(paths, key=lambda path: path == ".metadata")}
    store = BlobStore(BlobLocation.parse(container), Access(KEY))

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
