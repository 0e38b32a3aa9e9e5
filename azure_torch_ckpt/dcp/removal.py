"""Removal of a checkpoint: first its metadata, then its data blobs, then the directories that they were in.

And of leftovers: data blobs of saves that never committed, and of removals that were interrupted. One rule holds for
those of checkpoints and of models in the HuggingFace layout, `leftovers_in`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.blob_names import ListedCheckpoint, metadata_name
from azure_torch_ckpt.dcp.commit import delete_metadata
from azure_torch_ckpt.dcp.open_checkpoint import metadata_ranks, read_metadata
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    BlobChangedError,
    BlobNotFoundError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    ServiceUnavailableError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = [
    "Remains",
    "find_leftovers",
    "leftovers_in",
    "newest",
    "path_location",
    "remove_blobs",
    "remove_checkpoint",
    "remove_empty_folders",
    "remove_leftovers",
]

_log = logging.getLogger(__name__)


def remove_checkpoint(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> dict[str, AzureCheckpointError]:
    """Remove the checkpoint at a URL: ``.metadata`` first, so that it is gone before its data begins to go.

    If the process dies in between, `prune` removes the rest.

    Returns:
        The data blobs that could not be deleted (leased, immutable), by their names below the URL, each with its
        error. The checkpoint is gone all the same, and `prune` finds them.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        CheckpointReplacedError: another save committed meanwhile; its checkpoint was left alone.
        CommitUnknownError: whether the metadata was deleted is unknown; no data was.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: its metadata cannot be read, so it is
            unknown which blobs belong to it. Nothing was removed.
        StoreError: the service could not be asked, or refused to delete the metadata. The checkpoint is whole.
    """
    location = BlobLocation.parse(url)
    store = BlobStore(location, Access(credential, options, ca_file))
    ranks, denied = [], None
    try:
        ranks = metadata_ranks(store, location)
    except AccessDeniedError as error:
        denied = error  # the metadata of all ranks needs no listing
    parts = read_metadata(store, location, [None, *ranks])
    if not parts:
        raise denied or CheckpointNotFoundError(f"No complete checkpoint at {location}: {metadata_name()} is not there")
    for part in parts:
        if not delete_metadata(store, location, part.rank, part.stored.etag):
            raise CheckpointReplacedError(
                f"The checkpoint at {location} was replaced while it was being removed, and the new one was left "
                "alone. Remove it again if you mean that one too"
            )
    return remove_blobs(store, location, sorted({name for part in parts for name in part.names}), [""])


def remove_blobs(
    store: BlobStore, location: BlobLocation, names: Iterable[str], folders: Iterable[str] = ()
) -> dict[str, AzureCheckpointError]:
    """Delete data blobs that no metadata names any more.

    A failure of any kind is logged and not raised: it costs storage, not correctness. Once the service is down, nothing
    more is tried. Where the account has directories, those that the blobs were in are deleted too, unless something
    else is in them.

    Args:
        names: below `location`.
        folders: more directories to delete if they are empty; ``""`` is `location` itself.

    Returns:
        The blobs that were not deleted, by name, each with its error.
    """
    deleted: set[str] = set()

    def remove(name: str, cancel: Cancel) -> None:
        if store.delete(location.join(name).path, cancel=cancel):
            deleted.add(name)

    names = list(names)
    failed = _for_each(store, location, names, remove)
    if not any(isinstance(error, ServiceUnavailableError) for error in failed.values()):
        wanted = {name.rpartition("/")[0] for name in names} - {""} | set(folders)
        remove_empty_folders(store, location, wanted, {name.rpartition("/")[0] for name in deleted})
    return failed


def remove_empty_folders(store: BlobStore, location: BlobLocation, folders: Iterable[str], emptied: set[str]) -> None:
    """Delete empty directories, from the bottom up. A failure is logged.

    Only accounts with a hierarchical namespace have directories. One request finds out, and the same store asks no
    more in other accounts.

    Args:
        folders: below `location`; ``""`` is `location` itself.
        emptied: those of them that a blob was deleted from just now.
    """

    def remove(folder: str, cancel: Cancel) -> None:
        path = (location.join(folder) if folder else location).path
        try:
            info = store.stat(path, cancel=cancel)
        except BlobNotFoundError:
            if folder in emptied and store.has_directories is None:
                store.has_directories = False  # a directory would have stayed
            return
        # In other accounts some tools mark folders with blobs of their own, which are not ours to remove.
        store.has_directories = info.resource_type is not None
        if info.resource_type == "directory":
            with contextlib.suppress(BlobChangedError):
                store.delete_folder(path, if_etag=info.etag, cancel=cancel)

    wanted = {folder for folder in folders if folder or location.path}
    # The first one alone: from it the store learns whether the account has directories at all.
    ordered = sorted(wanted, key=lambda folder: (-_depth(folder), folder not in emptied))
    for group in (ordered[:1], *(list(group) for _, group in itertools.groupby(ordered[1:], _depth))):
        if store.has_directories is not False:
            _for_each(store, location, group, remove)


def _depth(folder: str) -> int:
    return folder.count("/") + 1 if folder else 0


def _for_each(
    store: BlobStore, location: BlobLocation, names: list[str], remove: Callable[[str, Cancel], None]
) -> dict[str, AzureCheckpointError]:
    """Call `remove` for each name, in parallel; return the errors by name, and raise none: the save is committed."""
    cancel = Cancel()
    failed: dict[str, AzureCheckpointError] = {}
    down: list[ServiceUnavailableError] = []
    left = set(names)

    def attempt(name: str) -> None:
        try:
            if down:
                raise down[0]
            remove(name, cancel)
        except Exception as error:
            failed[name] = _reported(error)
            if not down:
                where = location.join(name) if name else location
                _log.warning("could not remove %s, which is no longer needed: %s", where, failed[name])
            if isinstance(error, ServiceUnavailableError):
                down.append(error)
        left.discard(name)

    tasks = (functools.partial(attempt, name) for name in names)
    try:
        run_all(tasks, store.options.concurrency, "blob-remove", cancel.cancel)
    except Exception as error:  # the system has no thread left
        _log.warning("could not remove %d blobs at %s, which are no longer needed: %s", len(left), location, error)
        failed.update(dict.fromkeys(left, _reported(error)))
    return failed


def _reported(error: Exception) -> AzureCheckpointError:
    if isinstance(error, AzureCheckpointError):
        return error
    reported = CheckpointError(f"{type(error).__name__}: {error}")
    reported.__cause__ = error
    return reported


@dataclass(frozen=True, slots=True)
class Remains:
    """Data blobs of one save that no metadata names.

    Attributes:
        url: of the checkpoint that the save was for.
        save_id: of the save.
        blobs: paths in the container.
        size: bytes of all of them.
        last_modified: when the newest of them was written.
    """

    url: str
    save_id: str
    blobs: list[str]
    size: int
    last_modified: datetime.datetime


class FolderOfSaves(Protocol):
    """A folder in which saves have written data.

    Attributes:
        path: in the container; ``""`` is its root.
        saves: the data blobs of each save, by save id. Blobs without a save id have ``""``, and are never leftovers:
            metadata anywhere above may name them.
    """

    path: str
    saves: dict[str, list[BlobInfo]]


_Folder = TypeVar("_Folder", bound=FolderOfSaves)


def leftovers_in(
    store: BlobStore,
    location: BlobLocation,
    folders: Iterable[_Folder],
    oldest_to_keep: datetime.datetime,
    is_plainly_sound: Callable[[_Folder], bool],
    named_in: Callable[[_Folder], set[str]],
) -> list[Remains]:
    """Find the data blobs that the metadata in their folder does not name.

    A save that is running looks just like one that failed. So only the blobs of a save count of which the newest is not
    younger than `oldest_to_keep`.

    Args:
        store: of the container of `location`.
        folders: of a listing that was made before now.
        is_plainly_sound: whether the listing alone proves that the metadata names all data, so that no request is made.
        named_in: reads the metadata in a folder, and returns the paths in the container of the blobs that it names. It
            looks for metadata that the listing did not have, too: a save may have been committed since. Called in
            parallel.

    Raises:
        whatever `named_in` raises.
    """
    doubtful: list[tuple[_Folder, list[tuple[str, list[BlobInfo]]]]] = []
    for folder in folders:
        old = [
            (save_id, blobs)
            for save_id, blobs in sorted(folder.saves.items())
            if save_id and newest(blobs) <= oldest_to_keep
        ]
        if old and not is_plainly_sound(folder):
            doubtful.append((folder, old))
    named: dict[str, set[str]] = {}
    cancel = Cancel()

    def read(folder: _Folder) -> None:
        named[folder.path] = named_in(folder)

    tasks = (functools.partial(read, folder) for folder, _ in doubtful)
    run_all(tasks, store.options.concurrency, "blob-prune", cancel.cancel)
    leftovers = []
    for folder, old in doubtful:
        url = str(path_location(location, folder.path))
        for save_id, blobs in old:
            stray = [blob for blob in blobs if blob.path not in named[folder.path]]
            if stray:
                size = sum(blob.size for blob in stray)
                leftovers.append(Remains(url, save_id, [blob.path for blob in stray], size, newest(blobs)))
    return leftovers


def find_leftovers(
    store: BlobStore, location: BlobLocation, listed: Iterable[ListedCheckpoint], oldest_to_keep: datetime.datetime
) -> list[Remains]:
    """Find the leftovers of saves by `AzureBlobWriter`.

    Only data blobs that are named as `AzureBlobWriter` names them are considered. The metadata of a checkpoint is
    fetched if more than one save, or one later than the metadata, has left data. A checkpoint with one save from before
    its metadata is sound without a request.

    Args:
        store, location, oldest_to_keep: as for `leftovers_in`.
        listed: complete and incomplete checkpoints, of a listing that was made before now.

    Raises:
        CheckpointError: the metadata of a checkpoint cannot be read, so the data blobs that it names are unknown.
        StoreError: the service could not be asked.
    """

    def is_plainly_sound(checkpoint: ListedCheckpoint) -> bool:
        # The metadata is younger than the data, and there is no other save that it could name.
        metadata = checkpoint.metadata.get(None)
        if metadata is None or len(checkpoint.metadata) > 1 or len(checkpoint.saves) != 1:
            return False
        [blobs] = checkpoint.saves.values()
        return newest(blobs) <= metadata.last_modified

    def named_in(checkpoint: ListedCheckpoint) -> set[str]:
        where = path_location(location, checkpoint.path)
        parts = read_metadata(store, where, {None, *checkpoint.metadata})
        return {where.join(name).path for part in parts for name in part.names}

    return leftovers_in(store, location, listed, oldest_to_keep, is_plainly_sound, named_in)


def remove_leftovers(store: BlobStore, leftovers: Iterable[Remains]) -> dict[str, AzureCheckpointError]:
    """Delete leftovers. Returns the errors of those that could not be deleted, by their paths in the container."""
    paths, folders = [], []
    for left in leftovers:
        _log.info("removing %d blobs of the unfinished save %s at %s", len(left.blobs), left.save_id, left.url)
        paths += left.blobs
        folders.append(BlobLocation.parse(left.url).path)
    return remove_blobs(store, store.location, paths, folders)


def path_location(location: BlobLocation, path: str) -> BlobLocation:
    """The location of a path in the container of `location`; ``""`` is the container itself."""
    root = location.container_root()
    return root.join(path) if path else root


def newest(blobs: Iterable[BlobInfo]) -> datetime.datetime:
    """When the last of the blobs was written."""
    return max(blob.last_modified for blob in blobs)
