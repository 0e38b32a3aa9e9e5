"""Leftovers: data blobs of saves that never committed, and of removals that were interrupted.

One rule holds for checkpoints and for models in the HuggingFace layout, `leftovers_in`.
"""

from __future__ import annotations

import datetime
import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.dcp.listed_checkpoint import ListedCheckpoint
from azure_torch_ckpt.dcp.open_checkpoint import read_metadata
from azure_torch_ckpt.dcp.removal import remove_blobs
from azure_torch_ckpt.errors import AzureCheckpointError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["Remains", "find_leftovers", "leftovers_in", "newest", "path_location", "remove_leftovers"]

_log = logging.getLogger(__name__)


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
