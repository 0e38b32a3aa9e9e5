"""torch.distributed.checkpoint over azstoragetorch's ``BlobIO``, which `tests.benchmarks.processes` installs."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

from azstoragetorch.io import BlobIO
from azure.storage.blob import BlobClient
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase

from tests.benchmarks.spec import Address


def use_connections(connections: int) -> None:
    """Make a BlobIO use that many: it has no option, but takes four more than the machine has processors."""

    def cpu_count() -> int:
        return connections - 4

    for name in ("cpu_count", "process_cpu_count"):  # the second from Python 3.13 on
        setattr(os, name, cpu_count)


class _BlobIO(BlobIO):  # type: ignore[misc]  # nothing is known of it where it is not installed
    """With what torch's reader asks of a stream and BlobIO does not have."""

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class BlobIOFileSystem(FileSystemBase):
    """The file system of torch's own writer and reader, with a BlobIO for every file. Paths are those of blobs."""

    def __init__(self, address: Address) -> None:
        self._address = address

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        credential: Any = None if self._address.key is None else False
        with _BlobIO(self._url(path), mode, credential=credential) as stream:
            yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        with self.create_stream(path, "rb") as old, self.create_stream(new_path, "wb") as new:
            new.write(old.read())
        self.rm_file(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None: ...

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return self._blob(path).exists()

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._blob(path).delete_blob()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _url(self, path: str | os.PathLike[str]) -> str:
        query = f"?{self._address.sas}" if self._address.sas else ""
        return f"{self._address.container_url}/{os.fspath(path)}{query}"

    def _blob(self, path: str | os.PathLike[str]) -> BlobClient:
        return BlobClient.from_blob_url(self._url(path))


class BlobIOWriter(FileSystemWriter):
    def __init__(self, path: str, address: Address) -> None:
        super().__init__(path, sync_files=False)  # it would ask for a file descriptor
        self.fs = BlobIOFileSystem(address)  # type: ignore[assignment]  # torch's annotation is too narrow
        self.path = path


class BlobIOReader(FileSystemReader):
    def __init__(self, path: str, address: Address) -> None:
        super().__init__(path)
        self.fs = BlobIOFileSystem(address)  # type: ignore[assignment]  # torch's annotation is too narrow
        self.path = path
