"""What the tests of the datasets have in common: blobs, and functions that DataLoader's workers can import."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from azure_torch_ckpt.datasets import Blob
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.store import BlobStore


def fill(container: str, blobs: dict[str, bytes]) -> None:
    store = BlobStore(BlobLocation.parse(container))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.put, blobs.keys(), blobs.values()))
    store.close()


def numbered(count: int) -> dict[str, bytes]:
    """Blobs whose content is their number, in the order of their names."""
    return {f"data/{number:03}.txt": str(number).encode() for number in range(count)}


def number_of(blob: Blob) -> int:
    with blob.reader() as file:
        return int(file.read())


def number_unless_seven(blob: Blob) -> int:
    if PurePosixPath(blob.blob_name).stem == "007":
        raise ValueError("seven")
    return number_of(blob)


def collate(samples: Iterable[int]) -> list[int]:
    return list(samples)


def join(batches: Iterable[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]
