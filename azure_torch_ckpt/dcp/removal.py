"""Removing a checkpoint, and what failed saves and removals left behind."""

from __future__ import annotations

import datetime
import functools
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.layout import delete_metadata, metadata_name, remove_blobs
from azure_torch_ckpt.dcp.listed_checkpoint import ListedCheckpoint
from azure_torch_ckpt.dcp.open_checkpoint import metadata_ranks, read_metadata
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["Remains", "find_remains", "place_location", "remove_checkpoint", "remove_remains"]

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


def find_remains(
    store: BlobStore, location: BlobLocation, places: Iterable[ListedCheckpoint], oldest_to_keep: datetime.datetime
) -> list[Remains]:
    """What saves that never committed, and removals that were broken off, left at `places`.

    Only data blobs that are named as `AzureBlobWriter` names them, and that the metadata beside them does not name, are
    considered. A save that still runs looks just like one that failed, so only remains that nothing was added to since
    `oldest_to_keep` count.

    The metadata of a place is fetched where more than one save, or one later than the metadata, has left data. A place
    with one save from before its metadata is taken for sound, without a request.

    Args:
        store: of the container that `location` lies in.
        places: of a listing that was made before now.

    Raises:
        CheckpointError: the metadata of a checkpoint cannot be read, so nobody can tell what it names.
        StoreError: the service could not be asked.
    """
    doubtful: list[tuple[ListedCheckpoint, list[tuple[str, list[BlobInfo]]]]] = []
    for place in places:
        old = [
            (save_id, blobs)
            for save_id, blobs in sorted(place.saves.items())
            # Data without a save id may be named by metadata anywhere above.
            if save_id and _newest(blobs) <= oldest_to_keep
        ]
        if old and not _is_plainly_sound(place):
            doubtful.append((place, old))
    named = _named_at(store, location, [place for place, _ in doubtful])
    found = []
    for place, old in doubtful:
        for save_id, blobs in old:
            stray = [blob for blob in blobs if blob.path not in named[place.path]]
            if stray:
                url = str(place_location(location, place))
                size = sum(blob.size for blob in stray)
                found.append(Remains(url, save_id, [blob.path for blob in stray], size, _newest(blobs)))
    return found


def remove_remains(store: BlobStore, found: Iterable[Remains]) -> dict[str, AzureCheckpointError]:
    """Delete what `find_remains` found. Returns what could not be deleted, by its path in the container."""
    paths, folders = [], []
    for remains in found:
        _log.info("removing %d blobs of the unfinished save %s at %s", len(remains.blobs), remains.save_id, remains.url)
        paths += remains.blobs
        folders.append(BlobLocation.parse(remains.url).path)
    return remove_blobs(store, store.location, paths, folders)


def remove_checkpoint(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> dict[str, AzureCheckpointError]:
    """Remove the checkpoint at a URL: ``.metadata`` first, so that it is gone before its data begins to go.

    What a crash in the middle leaves is for `prune`.

    Returns the data blobs that could not be deleted (leased, immutable), by their names below the URL, each with its
    error. The checkpoint is gone all the same, and `prune` finds them.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        CheckpointReplacedError: another save committed meanwhile; its checkpoint stands.
        CommitUnknownError: whether the metadata was deleted is unknown; no data was.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: its metadata cannot be read, so nobody
            can tell which blobs are its own. Nothing was removed.
        StoreError: the service could not be asked, or refused to delete the metadata. The checkpoint is whole.
    """
    location = BlobLocation.parse(url)
    store = BlobStore(location, Access(credential, options, ca_file))
    ranks, denied = [], None
    try:
        ranks = metadata_ranks(store, location)
    except AccessDeniedError as error:
        denied = error  # that of all ranks needs no listing
    found = read_metadata(store, location, [None, *ranks])
    if not found:
        raise denied or CheckpointNotFoundError(f"No complete checkpoint at {location}: {metadata_name()} is not there")
    for part in found:
        if not delete_metadata(store, location, part.rank, part.stored.etag):
            raise CheckpointReplacedError(
                f"The checkpoint at {location} was replaced while it was being removed; the new one stands. Remove it "
                "again if that is meant too"
            )
    return remove_blobs(store, location, sorted({name for part in found for name in part.names}), [""])


def place_location(location: BlobLocation, place: ListedCheckpoint) -> BlobLocation:
    """Where a place in the container of `location` is."""
    root = location.container_root()
    return root.join(place.path) if place.path else root


def _newest(blobs: Iterable[BlobInfo]) -> datetime.datetime:
    return max(blob.last_modified for blob in blobs)


def _is_plainly_sound(place: ListedCheckpoint) -> bool:
    """Whether the metadata must name the place's data: it is younger, and there is no other save that it could name."""
    metadata = place.metadata.get(None)
    if metadata is None or len(place.metadata) > 1 or len(place.saves) != 1:
        return False
    [blobs] = place.saves.values()
    return _newest(blobs) <= metadata.last_modified


def _named_at(store: BlobStore, location: BlobLocation, places: list[ListedCheckpoint]) -> dict[str, set[str]]:
    """The paths of the data blobs that the metadata at each place names, by the place's path."""
    named: dict[str, set[str]] = {}
    cancel = Cancel()

    def read(place: ListedCheckpoint) -> None:
        where = place_location(location, place)
        # Not only what the listing saw: a save may have been committed since.
        parts = read_metadata(store, where, {None, *place.metadata})
        named[place.path] = {where.join(name).path for part in parts for name in part.names}

    run_all(
        (functools.partial(read, place) for place in places), store.options.concurrency, "blob-prune", cancel.cancel
    )
    return named
