"""`LocalFile`: a file on a disk that is written in ranges and appears when it is complete."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt.blobs.blob_info import BlobInfo, CopiedSettings
from azure_torch_ckpt.errors import LocalFileError
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["LocalFile", "local_file_errors"]


class LocalFile:
    """A file that is written under a temporary name, as `BlobDestination` writes a blob.

    Any thread may write ranges of it. Its folder is created with the first write.

    Raises:
        LocalFileError: from all methods, after an error of the operating system.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: AtomicFile | None = None
        self._lock = threading.Lock()

    def write(self, offset: int, part: memoryview, crc64: int = 0, cancel: Cancel | None = None) -> None:
        """Write the range that starts at `offset`."""
        with self._errors():
            descriptor = self._open().file.fileno()
            written = 0
            while written < part.nbytes:
                written += os.pwrite(descriptor, part[written:], offset + written)

    def commit(self, source: BlobInfo, settings: CopiedSettings) -> None:
        """Make the file visible as the copy of `source`, after all ranges were written."""
        with self._errors():
            descriptor = self._open().file.fileno()  # nothing was written of an empty file
            # A later copy recognizes the file by its time and size, as rsync does.
            os.utime(descriptor, (source.last_modified.timestamp(),) * 2)
        self.publish()

    def publish(self, *, only_new: bool = False) -> bool:
        """Make the file visible, once its content is on the disk.

        Args:
            only_new: do not replace a file.

        Returns:
            False if `only_new` and there is a file already.
        """
        with self._errors():
            new = self._open()
            try:
                new.publish(only_new=only_new)
            except FileExistsError:
                if not only_new:
                    raise
                return False
            return True

    def abandon(self) -> None:
        """Remove the temporary file, unless it was published."""
        with self._lock:
            new, self._new = self._new, None
            if new is not None:
                new.abandon()

    def _open(self) -> AtomicFile:
        with self._lock:
            if self._new is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._new = AtomicFile(self._path)
            return self._new

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return local_file_errors(f"could not write {self._path}")


@contextlib.contextmanager
def local_file_errors(failed: str) -> Iterator[None]:
    """Raise errors of the operating system as `LocalFileError`, with `failed` as the start of the message."""
    try:
        yield
    except (LocalFileError, ConnectionError):  # the second one is an error of the network
        raise
    except OSError as error:
        raise LocalFileError(f"{failed}: {error.strerror or error}") from error
