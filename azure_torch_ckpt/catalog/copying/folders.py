"""The two ends of a copy: a prefix in a container, and a folder on a disk."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from azure_torch_ckpt._internal.atomic_file import AtomicFile, is_part, remove_abandoned
from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.blob_copy import MARK, BlobSink, copied_settings
from azure_torch_ckpt.blobs.settings import CopiedSettings
from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.commit import MetadataBlob, commit_metadata, delete_metadata, read_metadata_blob
from azure_torch_ckpt.dcp.removal import remove_blobs
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobChangedError,
    BlobNotFoundError,
    CheckpointError,
    CheckpointReplacedError,
    CommitConflictError,
    CorruptCheckpointError,
    LocalFileError,
    LocationError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["BlobEnd", "End", "FileSink", "FolderEnd", "Sink", "local_file_errors", "open_end"]

_log = logging.getLogger(__name__)

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a scheme of one letter is a Windows drive


class Sink(Protocol):
    """A blob or file that is being written, in parts, from any threads."""

    def write(self, offset: int, part: memoryview, crc64: int, cancel: Cancel) -> None:
        """Write the part that starts at `offset`."""

    def commit(self, source: BlobInfo, settings: CopiedSettings) -> None:
        """All parts are there: make it visible as the copy of `source`."""

    def abandon(self) -> None:
        """Leave nothing behind."""


class End(Protocol):
    """Where a copy comes from or goes to. All names are below the end's place."""

    where: str
    may_look: bool
    """Whether the credential allows looking at what is there. False is known only once it was refused."""

    def listing(self) -> list[BlobInfo]: ...

    def sweep(self) -> None:
        """Remove what copies to here left behind that were killed, as far as `listing` met it."""

    def mark_of(self, info: BlobInfo) -> str | None:
        """What the blob was marked with when it was written by a copy."""

    def read(self, info: BlobInfo, offset: int, part: memoryview, cancel: Cancel) -> None: ...

    def read_metadata(self, folder: str, rank: int | None) -> MetadataBlob | None: ...

    def sink(self, name: str) -> Sink: ...

    def settings_of(self, info: BlobInfo) -> CopiedSettings:
        """What a copy of the blob carries beside its bytes. A file carries nothing."""

    def commit_metadata(
        self, folder: str, rank: int | None, data: bytes, replaces: MetadataBlob | None, settings: CopiedSettings
    ) -> None: ...

    def remove_metadata(self, folder: str, rank: int | None, stored: MetadataBlob) -> None: ...

    def remove(self, names: Iterable[str]) -> None: ...

    def settle(self, names: Iterable[str]) -> None:
        """See that files which are visible survive a power cut."""

    def check_room(self, needed: int) -> None: ...


def open_end(
    place: str | os.PathLike[str] | BlobLocation,
    access: Access,
) -> BlobEnd | FolderEnd:
    """The end that a URL or a local path names.

    Raises:
        LocationError: it is a URL of another service, or empty.
        CredentialError: the credential cannot be used there.
    """
    if isinstance(place, BlobLocation) or _REMOTE.match(os.fspath(place)):
        location = BlobLocation.parse(place)
        if location.snapshot is not None or location.version_id is not None:
            raise LocationError(f"{location} is one blob at one moment, not a checkpoint. Leave the query away")
        return BlobEnd(location, BlobStore(location, access))
    if not os.fspath(place):
        raise LocationError("The path is empty (an unset variable?). For the current folder, pass '.'")
    return FolderEnd(Path(place))


class BlobEnd:
    """A prefix in a container."""

    def __init__(self, location: BlobLocation, store: BlobStore) -> None:
        self.location = location
        self.store = store
        self.where = str(location)
        self.may_look = True
        self._prefix = location.prefix

    def path(self, name: str) -> str:
        """The path in the container."""
        return self._prefix + name

    def listing(self) -> list[BlobInfo]:
        cut = len(self._prefix)
        return [
            dataclasses.replace(blob, path=blob.path[cut:])
            for blob in self.store.list(self._prefix)
            if not blob.is_folder
        ]

    def sweep(self) -> None:
        pass  # blocks that nobody commits vanish by themselves

    def mark_of(self, info: BlobInfo) -> str | None:
        return None if info.metadata is None else info.metadata.get(MARK)

    def read(self, info: BlobInfo, offset: int, part: memoryview, cancel: Cancel) -> None:
        try:
            self.store.read_into(self.path(info.path), offset, [part], if_etag=info.etag or None, cancel=cancel)
        except (BlobNotFoundError, BlobChangedError) as error:
            raise self.changed() from error

    def changed(self) -> CheckpointReplacedError:
        return CheckpointReplacedError(
            f"A checkpoint at or below {self.where} was replaced or removed while it was being copied. Copy again"
        )

    def read_metadata(self, folder: str, rank: int | None) -> MetadataBlob | None:
        return read_metadata_blob(self.store, self._at(folder), rank)

    def sink(self, name: str) -> BlobSink:
        return BlobSink(self.store, self.path(name))

    def settings_of(self, info: BlobInfo) -> CopiedSettings:
        try:
            return copied_settings(self.store, dataclasses.replace(info, path=self.path(info.path)), strict=False)
        except (BlobNotFoundError, BlobChangedError) as error:
            raise self.changed() from error

    def commit_metadata(
        self, folder: str, rank: int | None, data: bytes, replaces: MetadataBlob | None, settings: CopiedSettings
    ) -> None:
        try:
            commit_metadata(self.store, self._at(folder), data, replaces, rank, settings)
        except AccessDeniedError as error:
            if not settings.tags:
                raise
            # It was not carried out. Perhaps the credential may write blobs, but no tags.
            commit_metadata(self.store, self._at(folder), data, replaces, rank, dataclasses.replace(settings, tags={}))
            _log.warning("the metadata of %s is without the index tags of its source: %s", self._at(folder), error)

    def remove_metadata(self, folder: str, rank: int | None, stored: MetadataBlob) -> None:
        place = self._at(folder)
        if not delete_metadata(self.store, place, rank, stored.etag):
            raise CommitConflictError(
                f"Another save committed at {place} since this copy began; its checkpoint stands. Copy again to "
                "replace it"
            )

    def remove(self, names: Iterable[str]) -> None:
        remove_blobs(self.store, self.location, names)

    def settle(self, names: Iterable[str]) -> None:
        pass

    def check_room(self, needed: int) -> None:
        pass

    def _at(self, folder: str) -> BlobLocation:
        return self.location.join(folder) if folder else self.location


class FolderEnd:
    """A folder on a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)
        self.may_look = True
        self._parts: list[Path] = []

    def listing(self) -> list[BlobInfo]:
        """All files below the folder, without the parts of copies that are running or were killed."""
        found = []
        self._parts = []
        with local_file_errors(f"could not list {self.root}"):
            for folder, _, files in os.walk(self.root, onerror=_raise_unless_missing):
                for file in files:
                    path = Path(folder, file)
                    if is_part(file):
                        self._parts.append(path)
                        continue
                    status = path.stat()
                    name = path.relative_to(self.root).as_posix()
                    found.append(BlobInfo(name, status.st_size, str(status.st_mtime_ns), _time(status)))
        return sorted(found, key=lambda info: info.path)

    def sweep(self) -> None:
        for part in self._parts:
            remove_abandoned(part)

    def mark_of(self, info: BlobInfo) -> str | None:
        return None

    def read(self, info: BlobInfo, offset: int, part: memoryview, cancel: Cancel) -> None:
        with local_file_errors(f"could not read {self.root / info.path}"), open(self.root / info.path, "rb") as file:
            received = 0
            while received < part.nbytes:
                count = os.preadv(file.fileno(), [part[received:]], offset + received)
                if count == 0:
                    raise CorruptCheckpointError(
                        f"{self.root / info.path} is shorter than the {info.size} bytes that it had. Something changed "
                        "it while it was being copied"
                    )
                received += count

    def read_metadata(self, folder: str, rank: int | None) -> MetadataBlob | None:
        path = self.root / folder / metadata_name(rank)
        try:
            status = path.stat()
            return MetadataBlob(path.read_bytes(), str(status.st_mtime_ns), _time(status))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LocalFileError(f"could not read {path}: {error.strerror}") from error

    def sink(self, name: str) -> FileSink:
        if not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
            raise CheckpointError(f"{name!r} cannot be the name of a file below {self.root}; nothing was copied")
        return FileSink(self.root / name)

    def settings_of(self, info: BlobInfo) -> CopiedSettings:
        return CopiedSettings()

    def commit_metadata(
        self, folder: str, rank: int | None, data: bytes, replaces: MetadataBlob | None, settings: CopiedSettings
    ) -> None:
        path = self.root / folder / metadata_name(rank)
        sink = FileSink(path)
        try:
            sink.write(0, memoryview(data), 0, Cancel())
            sink.publish(only_new=replaces is None)
        except FileExistsError as error:
            raise CommitConflictError(
                f"Somebody else wrote {path} since this copy began; that checkpoint stands"
            ) from error
        finally:
            sink.abandon()
        self.settle([path.relative_to(self.root).as_posix()])

    def remove_metadata(self, folder: str, rank: int | None, stored: MetadataBlob) -> None:
        self.remove([f"{folder}/{metadata_name(rank)}" if folder else metadata_name(rank)])
        self.settle([f"{folder}/x" if folder else "x"])

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with local_file_errors(f"could not remove {self.root / name}"):
                (self.root / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    (self.root / name).parent.rmdir()

    def settle(self, names: Iterable[str]) -> None:
        for folder in {(self.root / name).parent for name in names}:
            for each in (folder, *folder.parents):
                with local_file_errors(f"could not sync {each}"):
                    descriptor = os.open(each, os.O_RDONLY | os.O_DIRECTORY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                if each == self.root:
                    break

    def check_room(self, needed: int) -> None:
        """Refuse what does not fit before anything is written.

        Raises:
            LocalFileError: the disk has no room for so many bytes more.
        """
        there = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        with local_file_errors(f"could not look at the disk of {there}"):
            status = os.statvfs(there)
        free = status.f_bavail * status.f_frsize
        if free < needed:
            raise LocalFileError(f"{needed} bytes are to be written to {self.root}, and {free} are free there")


class FileSink:
    """A file that is written under another name and renamed when it is whole and on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: AtomicFile | None = None
        self._lock = threading.Lock()

    def write(self, offset: int, part: memoryview, crc64: int, cancel: Cancel) -> None:
        with local_file_errors(f"could not write {self._path}"):
            descriptor = self._open().file.fileno()
            written = 0
            while written < part.nbytes:
                written += os.pwrite(descriptor, part[written:], offset + written)

    def commit(self, source: BlobInfo, settings: CopiedSettings) -> None:
        with local_file_errors(f"could not write {self._path}"):
            descriptor = self._open().file.fileno()  # of an empty file, nothing was written
            # By its time and its size the copy is known again, as rsync does it.
            os.utime(descriptor, (source.last_modified.timestamp(),) * 2)
        self.publish()
        self.abandon()

    def publish(self, *, only_new: bool = False) -> None:
        """Make the file visible.

        Args:
            only_new: raise FileExistsError if there is one.
        """
        with local_file_errors(f"could not write {self._path}"):
            new = self._open()
        try:
            new.publish(only_new=only_new)
        except FileExistsError:
            raise
        except OSError:
            with local_file_errors(f"could not write {self._path}"):
                raise

    def abandon(self) -> None:
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


@contextlib.contextmanager
def local_file_errors(failed: str) -> Iterator[None]:
    """Raise the errors of the operating system as `LocalFileError`."""
    try:
        yield
    except LocalFileError:
        raise
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        raise LocalFileError(f"{failed}: {error.strerror or error}") from error


def _time(status: os.stat_result) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(status.st_mtime, datetime.timezone.utc)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
