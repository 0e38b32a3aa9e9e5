"""`Tree`: source or destination of a copy, as blobs below a URL or files below a folder, each a `LocalFile`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from azure_torch_ckpt._internal.atomic_file import AtomicFile, is_part, remove_abandoned
from azure_torch_ckpt.blobs.blob_copy import MARK, BlobDestination, copied_settings
from azure_torch_ckpt.blobs.blob_info import BlobInfo, CopiedSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.commit import commit_metadata, delete_metadata
from azure_torch_ckpt.dcp.metadata_blob import MetadataBlob, read_metadata_blob
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

__all__ = ["BlobTree", "FolderTree", "LocalFile", "Tree", "join_name", "local_file_errors", "open_tree"]

_log = logging.getLogger(__name__)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a scheme of one letter is a Windows drive


class Tree(ABC):
    """The source or the destination of a copy, for `open_tree`.

    Its string form is a URL without a SAS, or a local path. All names and folders are relative to its root, with "/"
    between their parts. `readable` is False once the service refused to let the credential list or read here.
    """

    readable = True

    @abstractmethod
    def infos(self) -> list[BlobInfo]:
        """List all blobs or files."""

    def remove_abandoned(self) -> None:  # noqa: B027  (blobs need nothing of the kind)
        """Remove the temporary files that killed copies left in a folder, as far as `infos` found them."""

    def copy_mark(self, info: BlobInfo) -> str | None:
        """Return the mark that a copy left on a blob; None for a file, and for a blob that is not a copy."""
        return None

    @abstractmethod
    def read_into(self, info: BlobInfo, offset: int, target: memoryview, cancel: Cancel) -> None:
        """Fill `target` with the bytes of a blob or file from `offset` on.

        Raises:
            CheckpointReplacedError: the blob is not the one that `info` describes any more.
            CorruptCheckpointError: the file is shorter than `info` says.
        """

    @abstractmethod
    def read_metadata(self, folder: str, rank: int | None) -> MetadataBlob | None:
        """Read the metadata of the checkpoint in `folder`, all of it; None if it does not exist."""

    @abstractmethod
    def create(self, name: str) -> BlobDestination | LocalFile:
        """Begin to write a blob or file."""

    def settings(self, info: BlobInfo) -> CopiedSettings:
        """Return what a copy of the blob carries besides its bytes. A file carries nothing."""
        return CopiedSettings()

    @abstractmethod
    def commit_metadata(
        self, folder: str, rank: int | None, data: bytes, replaces: MetadataBlob | None, settings: CopiedSettings
    ) -> None:
        """Write the metadata of the checkpoint in `folder`, in place of `replaces`; None: there must be none.

        Raises:
            CommitConflictError: another save wrote metadata meanwhile.
        """

    @abstractmethod
    def remove_metadata(self, folder: str, rank: int | None, stored: MetadataBlob) -> None:
        """Remove the metadata of the checkpoint in `folder`, or raise `CommitConflictError` if it is not `stored`."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove blobs or files, and the folders that become empty."""

    def sync(self, names: Iterable[str]) -> None:  # noqa: B027  (blobs need nothing of the kind)
        """Make visible files survive a power cut."""

    def check_free_space(self, needed: int) -> None:  # noqa: B027  (blobs need nothing of the kind)
        """Raise `LocalFileError` if a disk has less than `needed` bytes of free space."""


def open_tree(place: str | os.PathLike[str] | BlobLocation, access: Access) -> BlobTree | FolderTree:
    """Open the tree at a URL or a local path, without a request.

    `LocationError`: `place` is a URL of another service, or empty.
    """
    if isinstance(place, BlobLocation) or _URL.match(os.fspath(place)):
        location = BlobLocation.parse(place)
        if location.snapshot is not None or location.version_id is not None:
            raise LocationError(f"{location} is one blob at one moment, not a checkpoint. Omit the query of the URL")
        return BlobTree(location, BlobStore(location, access))
    if not os.fspath(place):
        raise LocationError("The path is empty (an unset variable?). For the current folder, pass '.'")
    return FolderTree(Path(place))


def join_name(folder: str, name: str) -> str:
    """Return the name of a file in a folder of a tree; ``""`` is the root."""
    return f"{folder}/{name}" if folder else name


class BlobTree(Tree):
    """The blobs below a URL."""

    def __init__(self, location: BlobLocation, store: BlobStore) -> None:
        self.location = location
        self.store = store

    def __str__(self) -> str:
        return str(self.location)

    def path(self, name: str) -> str:
        """Return the path of a blob in the container."""
        return self.location.prefix + name

    def infos(self) -> list[BlobInfo]:
        prefix = self.location.prefix
        return [
            dataclasses.replace(blob, path=blob.path.removeprefix(prefix))
            for blob in self.store.list(prefix)
            if not blob.is_folder
        ]

    def copy_mark(self, info: BlobInfo) -> str | None:
        return None if info.metadata is None else info.metadata.get(MARK)

    def read_into(self, info: BlobInfo, offset: int, target: memoryview, cancel: Cancel) -> None:
        try:
            self.store.read_into(self.path(info.path), offset, [target], if_etag=info.etag or None, cancel=cancel)
        except (BlobNotFoundError, BlobChangedError) as error:
            raise self.replaced_error() from error

    def replaced_error(self) -> CheckpointReplacedError:
        """Return the error for a blob that changed or disappeared during the copy."""
        return CheckpointReplacedError(
            f"A checkpoint at or below {self} was replaced or removed while it was being copied. Copy again"
        )

    def read_metadata(self, folder: str, rank: int | None) -> MetadataBlob | None:
        return read_metadata_blob(self.store, self._checkpoint(folder), rank, whole=True)

    def create(self, name: str) -> BlobDestination:
        return BlobDestination(self.store, self.path(name))

    def settings(self, info: BlobInfo) -> CopiedSettings:
        try:
            return copied_settings(self.store, dataclasses.replace(info, path=self.path(info.path)), strict=False)
        except (BlobNotFoundError, BlobChangedError) as error:
            raise self.replaced_error() from error

    def commit_metadata(
        self, folder: str, rank: int | None, data: bytes, replaces: MetadataBlob | None, settings: CopiedSettings
    ) -> None:
        location = self._checkpoint(folder)
        try:
            commit_metadata(self.store, location, data, replaces, rank, settings)
        except AccessDeniedError as error:
            if not settings.tags:
                raise
            # The service wrote nothing. Perhaps the credential may write blobs, but no tags.
            commit_metadata(self.store, location, data, replaces, rank, dataclasses.replace(settings, tags={}))
            _log.warning("the metadata of %s is without the index tags of its source: %s", location, error)

    def remove_metadata(self, folder: str, rank: int | None, stored: MetadataBlob) -> None:
        location = self._checkpoint(folder)
        if not delete_metadata(self.store, location, rank, stored.etag):
            raise CommitConflictError(
                f"Another save committed at {location} since this copy began, and its checkpoint stays. Copy again to "
                "replace it"
            )

    def remove(self, names: Iterable[str]) -> None:
        remove_blobs(self.store, self.location, names)

    def _checkpoint(self, folder: str) -> BlobLocation:
        return self.location.join(folder) if folder else self.location


class FolderTree(Tree):
    """The files below a folder on a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._temporary: list[Path] = []

    def __str__(self) -> str:
        return str(self.root)

    def infos(self) -> list[BlobInfo]:
        """List all files, without the temporary ones of copies that are running or were killed."""
        infos = []
        self._temporary = []
        with local_file_errors(f"could not list {self.root}"):
            for folder, _, files in os.walk(self.root, onerror=_raise_unless_missing):
                for file in files:
                    path = Path(folder, file)
                    if is_part(file):
                        self._temporary.append(path)
                        continue
                    status = path.stat()
                    name = path.relative_to(self.root).as_posix()
                    infos.append(BlobInfo(name, status.st_size, str(status.st_mtime_ns), _modified(status)))
        return sorted(infos, key=lambda info: info.path)

    def remove_abandoned(self) -> None:
        for path in self._temporary:
            remove_abandoned(path)

    def read_into(self, info: BlobInfo, offset: int, target: memoryview, cancel: Cancel) -> None:
        path = self.root / info.path
        with local_file_errors(f"could not read {path}"), open(path, "rb") as file:
            received = 0
            while received < target.nbytes:
                count = os.preadv(file.fileno(), [target[received:]], offset + received)
                if count == 0:
                    raise CorruptCheckpointError(
                        f"{path} is shorter than the {info.size} bytes that it had. Something changed it while it was "
                        "being copied"
                    )
                received += count

    def read_metadata(self, folder: str, rank: int | None) -> MetadataBlob | None:
        path = self.root / folder / metadata_name(rank)
        with local_file_errors(f"could not read {path}"):
            try:
                status = path.stat()
                data = path.read_bytes()
                return MetadataBlob(data, str(status.st_mtime_ns), _modified(status), len(data))
            except FileNotFoundError:
                return None

    def create(self, name: str) -> LocalFile:
        if not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
            raise CheckpointError(f"{name!r} cannot be the name of a file below {self.root}; nothing was copied")
        return LocalFile(self.root / name)

    def commit_metadata(
        self, folder: str, rank: int | None, data: bytes, replaces: MetadataBlob | None, settings: CopiedSettings
    ) -> None:
        name = join_name(folder, metadata_name(rank))
        file = LocalFile(self.root / name)
        try:
            file.write(0, memoryview(data))
            if not file.publish(only_new=replaces is None):
                raise CommitConflictError(
                    f"Another process wrote {self.root / name} since this copy began, and its checkpoint stays. Choose "
                    "another destination, or copy again with overwrite=True"
                )
        finally:
            file.abandon()
        self.sync([name])

    def remove_metadata(self, folder: str, rank: int | None, stored: MetadataBlob) -> None:
        name = join_name(folder, metadata_name(rank))
        self.remove([name])
        self.sync([name])

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with local_file_errors(f"could not remove {self.root / name}"):
                (self.root / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    (self.root / name).parent.rmdir()

    def sync(self, names: Iterable[str]) -> None:
        for parent in {(self.root / name).parent for name in names}:
            for folder in (parent, *parent.parents):
                with local_file_errors(f"could not sync {folder}"):
                    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                if folder == self.root:
                    break

    def check_free_space(self, needed: int) -> None:
        existing = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        with local_file_errors(f"could not get the free space of {existing}"):
            status = os.statvfs(existing)
        free = status.f_bavail * status.f_frsize
        if free < needed:
            raise LocalFileError(f"{self.root} needs {needed} bytes of free space, and the disk has {free}")


def _modified(status: os.stat_result) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(status.st_mtime, datetime.timezone.utc)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


class LocalFile:
    """A file that is written under a temporary name, as `BlobDestination` writes a blob.

    Any thread may write ranges of it. Its folder is created with the first write. All methods raise `LocalFileError`
    for an error of the operating system.
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
        """Make the file visible, once its content is on the disk; with `only_new`, return False if there is one."""
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
