"""`BlobCache`: a bounded cache of blobs on a local disk, which all processes of a machine share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from azure_torch_ckpt._internal.atomic_file import AtomicFile, remove_abandoned
from azure_torch_ckpt._internal.checksums import crc64

__all__ = ["BlobCache"]

_HIDDEN = "."  # the names of incomplete files begin with it
_LARGEST_PART = 16
_HEAD = 8
# Eviction frees a tenth more than the new blob needs, so that not every new blob causes one.
_SLACK_PART = 10


@dataclass(frozen=True)
class BlobCache:
    """Keeps blobs as files in a folder, at most `max_bytes` of them. The least recently used are removed first.

    A file is named after the URL (without SAS) and the ETag, so another version of a blob is another file. It contains
    a CRC64 of its content, and a damaged file is fetched again. Any number of processes may use a folder at the same
    time: a file appears when it is complete, and the bytes are counted under a lock. Use a local disk, not NFS.

    Args:
        directory: created if it is missing. Do not keep other files in it.
        max_bytes: a blob of more than a sixteenth of it is not kept.
    """

    directory: str | os.PathLike[str]
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {self.max_bytes}")

    def takes(self, size: int) -> bool:
        """Whether the cache keeps blobs of `size` bytes."""
        return size + _HEAD <= self.max_bytes // _LARGEST_PART

    def get(self, url: str, etag: str) -> bytes | None:
        """Return the content, or None if it is not in the cache."""
        path = self._path(url, etag)
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD)
                data = file.read()
            os.utime(path)
        except OSError:  # missing, or evicted at this moment
            return None
        if head == _head(data):
            return data
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, url: str, etag: str, data: bytes) -> None:
        """Keep a blob's content, unless it is too large. Errors of the disk are ignored."""
        if not self.takes(len(data)):
            return
        path = self._path(url, etag)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with AtomicFile(path) as new:
                new.file.write(_head(data))
                new.file.write(data)
                new.file.flush()
                with self._counted(len(data) + _HEAD, path):
                    new.publish(sync=False)  # its checksum reveals a damaged file

    def _path(self, url: str, etag: str) -> Path:
        name = hashlib.sha256(f"{url}\n{etag}".encode()).hexdigest()
        return Path(self.directory, name[:2], name[2:])

    @contextlib.contextmanager
    def _counted(self, size: int, path: Path) -> Iterator[None]:
        """Make room for `size` bytes at `path`, and hold the lock inside the block."""
        with open(Path(self.directory, "total"), "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            if path.exists():  # another process was faster
                yield
                return
            total = int(text) if text.isdigit() else self.max_bytes  # evict to count if the number is lost
            if total + size > self.max_bytes:
                total = self._evict(self.max_bytes - size - self.max_bytes // _SLACK_PART)
            file.truncate(0)
            file.write(str(total + size).encode())
            file.flush()
            yield

    def _evict(self, target: int) -> int:
        """Delete the least recently used files until at most `target` bytes are left; return how many are left."""
        files: list[tuple[float, int, str]] = []
        for folder in os.scandir(self.directory):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    if not entry.name.startswith(_HIDDEN):
                        files.append((status.st_mtime, status.st_size, entry.path))
                    else:
                        remove_abandoned(entry.path)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= target:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
        return total


def _head(data: bytes) -> bytes:
    return crc64(memoryview(data)).to_bytes(_HEAD, "little")
