"""Blobs and tar files whose samples are numbers, and transforms for them that DataLoader's workers can import."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.datasets import Blob
from azure_torch_ckpt.location import BlobLocation


def fill(container: str, blobs: dict[str, bytes]) -> None:
    """Write blobs to a container."""
    store = BlobStore(BlobLocation.parse(container))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.put, blobs.keys(), blobs.values()))


def numbered(count: int) -> dict[str, bytes]:
    """Return blobs whose content is their number, in the order of their names."""
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


def assert_threads_end(stream: Iterator[Any]) -> None:
    """Read a sample, close the stream, and check that its threads end."""
    next(stream)
    working = [thread for thread in threading.enumerate() if thread.name == "blob-prefetch"]
    assert working
    stream.close()  # type: ignore[attr-defined]
    for thread in working:
        thread.join(60)
    assert not any(thread.is_alive() for thread in working)


def tar_of(files: dict[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar file with these members."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode, format=form) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def shard(first: int, count: int, repeat: int = 400) -> dict[str, bytes]:
    """Return members of samples for a tar file, whose content is the sample's number, `repeat` times."""
    # A name of more than 100 characters has a header of its own.
    return {
        f"{'long/' * 25 if number % 3 == 0 else ''}{number:04}.{extension}": str(number).encode() * repeat
        for number in range(first, first + count)
        for extension in ("jpg", "cls.TXT")
    }


def key(sample: dict[str, Any]) -> int:
    """Check a sample of `shard` and return its number."""
    assert set(sample) == {"__key__", "__url__", "jpg", "cls.txt"}
    number = int(sample["__key__"].rpartition("/")[2])
    text = str(number).encode()
    assert sample["jpg"] == sample["cls.txt"] == text * (len(sample["jpg"]) // len(text)) != b""
    return number


def key_unless_three(sample: dict[str, Any]) -> int:
    if key(sample) == 3:
        raise ValueError("three")
    return key(sample)
