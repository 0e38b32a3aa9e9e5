"""Which blobs a checkpoint consists of, how one becomes visible, and how one is removed.

A checkpoint at a URL exists exactly when ``<url>/.metadata`` does. Data blobs are named by a save id that no other save
uses, so a save never touches a byte of the one before, and one conditional Put Blob of ``.metadata`` is the commit.
"""

from __future__ import annotations

import datetime
import functools
import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from azure_torch_ckpt.bodies import Cancel
from azure_torch_ckpt.checksums import md5
from azure_torch_ckpt.errors import (
    AzureCheckpointError,
    BlobChangedError,
    BlobNotFoundError,
    CommitConflictError,
    CorruptCheckpointError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.store import BlobStore
from azure_torch_ckpt.workers import Workers

__all__ = [
    "Stored",
    "commit",
    "data_name",
    "metadata_name",
    "new_save_id",
    "read_metadata_blob",
    "remove_blobs",
]

_log = logging.getLogger(__name__)

# 50,000 tensors in 1,000 shards make some 20 MB; what is larger than this is no metadata.
_METADATA_LIMIT = 4 << 30


@dataclass(frozen=True, slots=True)
class Stored:
    """The content of a ``.metadata`` blob, the ETag that it had, and when it was written."""

    data: bytes
    etag: str
    modified: datetime.datetime


def metadata_name(rank: int | None = None) -> str:
    """Name of the metadata blob below the checkpoint's URL; with a rank, of a save without collectives."""
    return ".metadata" if rank is None else f"__{rank}.metadata"


def new_save_id() -> str:
    return uuid.uuid4().hex


def data_name(save_id: str, rank: int) -> str:
    """Name of the blob that holds the items of one rank in one save, below the checkpoint's URL."""
    return f"{save_id}/__{rank}_0.distcp"


def read_metadata_blob(store: BlobStore, location: BlobLocation, rank: int | None = None) -> Stored | None:
    """The metadata that stands at `location`, or None.

    Raises:
        CorruptCheckpointError: its bytes do not have the MD5 that was stored with them.
    """
    try:
        data, info = store.read_some(location.join(metadata_name(rank)).path, 0, _METADATA_LIMIT)
    except BlobNotFoundError:
        return None
    if info.md5 is not None and info.md5 != md5(data):
        raise CorruptCheckpointError(
            f"{location}/{metadata_name(rank)} was damaged in storage or on the way: its bytes do not have the MD5 "
            "that was stored with them. Try again to rule out the way, or use another checkpoint"
        )
    return Stored(data, info.etag, info.last_modified)


def commit(store: BlobStore, location: BlobLocation, data: bytes, replaces: Stored | None, rank: int | None) -> str:
    """Make a checkpoint visible: write its metadata if what stands there is still what stood there before the save.

    Returns the metadata's ETag.

    Args:
        replaces: what stood there when the save began; None if nothing did.

    Raises:
        CommitConflictError: another save committed meanwhile; its checkpoint stands.
        StoreError: the service could not be asked. Whether the commit was carried out is then unknown; the checkpoint
            at the URL is whole either way.
    """
    path = location.join(metadata_name(rank)).path
    try:
        if replaces is None:
            return store.put(path, data, if_missing=True)
        return store.put(path, data, if_etag=replaces.etag)
    except BlobChangedError as error:
        # The first attempt may have been carried out and only its answer lost; then the second finds its own work.
        now = read_metadata_blob(store, location, rank)
        if now is not None and now.data == data:
            return now.etag
        raise CommitConflictError(
            f"Another save {'removed' if now is None else 'committed'} the checkpoint at {location} since this one "
            "began, so this one was dropped. Give each job a URL of its own, or save again to replace what stands there"
        ) from error


def remove_blobs(store: BlobStore, location: BlobLocation, names: Iterable[str]) -> None:
    """Delete data blobs that no metadata names any more. A failure is logged: it costs storage, not correctness."""
    cancel = Cancel()

    def remove(name: str) -> None:
        try:
            store.delete(location.join(name).path, cancel=cancel)
        except AzureCheckpointError as error:
            _log.warning("could not remove %s, which is no longer needed: %s", location.join(name), error)

    with Workers(store.options.concurrency, "blob-remove", cancel.cancel) as workers:
        for name in names:
            workers.submit(functools.partial(remove, name))
