"""Removing checkpoints, and what failed saves and removals left behind."""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.layout import Stored, metadata_name, read_metadata_blob, remove_blobs
from azure_torch_ckpt.dcp.metadata import check_metadata, data_paths, load_metadata
from azure_torch_ckpt.errors import BlobChangedError, CheckpointNotFoundError, CheckpointReplacedError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.store import BlobInfo, BlobStore

__all__ = ["Remains", "prune", "remove_checkpoint"]

_log = logging.getLogger(__name__)

# <checkpoint>/<save id>/__<rank>_<n>.distcp; see layout.data_name. Nothing of another form is ever touched.
_DATA = re.compile(r"(?:(?P<checkpoint>.+)/)?(?P<save>[0-9a-f]{32})/__\d+_\d+\.distcp")


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


def prune(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    older_than: datetime.timedelta = datetime.timedelta(days=1),
    dry_run: bool = True,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> list[Remains]:
    """Find what saves that never committed left under a URL, at any depth, and delete it unless ``dry_run``.

    Only blobs that are named as `AzureBlobWriter` names them, and that the ``.metadata`` beside them does not name, are
    considered. A save that still runs looks just like one that failed, so only remains that nothing was added to for
    `older_than` count: it must be longer than any save takes from its first rank's last block to its commit.

    Args:
        url: a checkpoint, or a prefix with any number of them.
        older_than: the grace period, by the service's clock.
        dry_run: only tell what would be deleted.

    Returns:
        What was found (and, unless ``dry_run``, deleted), one entry for each save.

    Raises:
        CheckpointError: the ``.metadata`` of a checkpoint cannot be read, so nobody can tell what it names. Nothing was
            deleted.
        StoreError: the service could not be asked.
    """
    location = BlobLocation.parse(url)
    store = BlobStore(location, credential, options=options, ca_file=ca_file)
    prefix = location.path + "/" if location.path else ""
    saves: dict[tuple[str, str], list[BlobInfo]] = {}
    for blob in store.list(prefix):
        match = _DATA.fullmatch(blob.path)
        if match is not None:
            saves.setdefault((match["checkpoint"] or "", match["save"]), []).append(blob)
    oldest_to_keep = store.now() - older_than
    found = []
    named: dict[str, set[str]] = {}
    for (checkpoint, save_id), blobs in sorted(saves.items()):
        newest = max(blob.last_modified for blob in blobs)
        if newest > oldest_to_keep:
            continue
        place = location.container_root().join(*checkpoint.split("/")) if checkpoint else location.container_root()
        if checkpoint not in named:
            named[checkpoint] = {
                place.join(name).path
                for rank, stored in _metadata_at(store, place)
                for name in _data_of(place, rank, stored)
            }
        stray = [blob for blob in blobs if blob.path not in named[checkpoint]]
        if stray:
            size = sum(blob.size for blob in stray)
            found.append(Remains(str(place), save_id, [blob.path for blob in stray], size, newest))
    if not dry_run:
        for remains in found:
            _log.info("removing %d blobs of the unfinished save %s", len(remains.blobs), remains.save_id)
        remove_blobs(store, location.container_root(), [path for remains in found for path in remains.blobs])
    return found


def remove_checkpoint(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> None:
    """Remove the checkpoint at a URL: ``.metadata`` first, so that it is gone before its data begins to go.

    What a crash in the middle leaves is for `prune`.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        CheckpointReplacedError: another save committed meanwhile; its checkpoint stands.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: its metadata cannot be read, so nobody
            can tell which blobs are its own. Nothing was removed.
        StoreError: the service could not be asked.
    """
    location = BlobLocation.parse(url)
    store = BlobStore(location, credential, options=options, ca_file=ca_file)
    found = [(rank, stored, _data_of(location, rank, stored)) for rank, stored in _metadata_at(store, location)]
    if not found:
        raise CheckpointNotFoundError(f"No complete checkpoint at {location}: {metadata_name()} is not there")
    for rank, stored, _ in found:
        try:
            store.delete(location.join(metadata_name(rank)).path, if_etag=stored.etag)
        except BlobChangedError as error:
            raise CheckpointReplacedError(
                f"The checkpoint at {location} was replaced while it was being removed; the new one stands. Remove it "
                "again if that is meant too"
            ) from error
    remove_blobs(store, location, [name for _, _, names in found for name in names])


def _metadata_at(store: BlobStore, place: BlobLocation) -> Iterator[tuple[int | None, Stored]]:
    """The metadata of all ranks, and that of single ranks, as far as there is any."""
    prefix = place.path + "/" if place.path else ""
    ranks: list[int | None] = [None]
    for entry in store.list_folder(prefix + "__"):
        match = None if isinstance(entry, str) else re.fullmatch(r"__(\d+)\.metadata", entry.path[len(prefix) :])
        if match is not None:
            ranks.append(int(match[1]))
    for rank in ranks:
        stored = read_metadata_blob(store, place, rank)
        if stored is not None:
            yield rank, stored


def _data_of(place: BlobLocation, rank: int | None, stored: Stored) -> list[str]:
    where = f"{place}/{metadata_name(rank)}"
    metadata = load_metadata(stored.data, where)
    check_metadata(metadata, where)
    return sorted(data_paths(metadata))
