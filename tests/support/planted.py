"""Many checkpoints in little time: one is saved, and its blobs are put at as many places as a test wants."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AzureBlobWriter
from azure_torch_ckpt.dcp.blob_names import new_save_id
from tests.support.containers import KEY, contents, put, store_of


def plant(container: str, names: Iterable[str]) -> None:
    """A complete checkpoint of one small tensor at each of `names`, data first as a save does it."""
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
