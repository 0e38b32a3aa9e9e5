"""`AtomicFile`: a local file that is written under another name and renamed when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from pathlib import Path
from typing import BinaryIO

__all__ = ["AtomicFile", "is_part", "remove_abandoned"]

_PART = re.compile(r"\..+\.[0-9a-f]{16}\.part", re.DOTALL)
_NAME = 40  # characters of the final name that a part has: a name has at most 255 bytes, and a character up to 4


class AtomicFile:
    """A file that appears at `path` when `publish` is called, replacing an existing one.

        with AtomicFile(path) as new:
            new.file.write(data)
            new.publish()

    Leaving the block without `publish` removes the file. Its mode follows the umask (or the folder's default ACL), as
    for any file that a program makes; the files of `tempfile` are for their owner alone.

    Attributes:
        path: where the file appears.
        file: open for reading and writing until `publish` or `abandon`.

    Raises:
        OSError: the folder is missing, or a file cannot be made in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        descriptor = -1
        while descriptor < 0:
            self._part = self.path.with_name(f".{self.path.name[:_NAME]}.{secrets.token_hex(8)}.part")
            descriptor = _locked(self._part)
        self.file: BinaryIO = os.fdopen(descriptor, "w+b")

    def publish(self, *, sync: bool = True, only_new: bool = False) -> None:
        """Make the file visible, and close it.

        Args:
            sync: wait until the content is on the disk, so that a machine that dies leaves the old file or the new one.
            only_new: raise if there is a file already, instead of replacing it.

        Raises:
            FileExistsError: `only_new`, and there is a file.
            OSError: the disk is full, or fails.
        """
        self.file.flush()
        if sync:
            os.fsync(self.file.fileno())
        if only_new:
            try:
                os.link(self._part, self.path)
            except FileExistsError:
                raise
            except OSError as error:  # a file system without hard links
                if os.path.lexists(self.path):
                    raise FileExistsError(str(self.path)) from error
                os.rename(self._part, self.path)
        else:
            os.replace(self._part, self.path)
        self.abandon()

    def abandon(self) -> None:
        """Remove the file unless it was published, and close it. Calling it again does nothing."""
        if not self.file.closed:
            # While the lock is held: later, another process may have removed the part.
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # bytes that the disk did not take
                self.file.close()

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def _locked(part: Path) -> int:
    """Make a file and lock it, so that other processes know that it is not abandoned.

    Returns:
        its descriptor; -1 if another process removed it as abandoned in the moment before it was locked.
    """
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed = os.fstat(descriptor).st_nlink == 0
    except BlockingIOError:
        removed = True
    except OSError:  # some network file systems have no locks
        removed = False
    if not removed:
        return descriptor
    os.close(descriptor)
    return -1


def is_part(name: str) -> bool:
    """Whether a file of this name is an `AtomicFile` that was not published."""
    return _PART.fullmatch(name) is not None


def remove_abandoned(part: str | os.PathLike[str]) -> None:
    """Remove a file for which `is_part` is true, unless a process still writes it."""
    with contextlib.suppress(OSError), open(part, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a process writes it
        os.unlink(part)
