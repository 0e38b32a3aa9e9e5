"""Which checkpoints lie in a folder: what the names and the removals of a callback depend on."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.errors import BlobNotFoundError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["is_empty", "modified_at", "newest_of"]


def modified_at(store: BlobStore, location: BlobLocation) -> datetime.datetime | None:
    """When the checkpoint at `location` was completed; None if there is none.

    A blob of that very name counts as well: it is what Lightning's own plugin writes.

    Raises:
        StoreError: the service could not be asked.
    """
    try:
        return store.stat(location.join(metadata_name()).path).last_modified
    except BlobNotFoundError:
        pass
    try:
        blob = store.stat(location.path)
    except BlobNotFoundError:
        return None
    # In an account with a hierarchical namespace a folder is an empty blob
    # (https://learn.microsoft.com/azure/storage/blobs/data-lake-storage-namespace).
    return blob.last_modified if blob.size else None


def is_empty(store: BlobStore, folder: BlobLocation) -> bool:
    """Whether no blob lies below `folder`; empty folders do not count.

    Raises:
        StoreError: the service could not be asked.
    """
    return all(blob.is_folder for blob in store.list(_prefix(folder)))


def newest_of(
    store: BlobStore, folder: BlobLocation, is_one: Callable[[str], bool]
) -> tuple[BlobLocation, datetime.datetime] | None:
    """The checkpoint right below `folder` that was completed last, among those whose names are what is asked for.

    Of several within the same second, which is as exact as the service's times are, it is the one with the longest
    name, and then the last in the alphabet: ``last-v10``, ``last-v2``, ``last-v1``, ``last``.

    Raises:
        StoreError: the service could not be asked.
    """
    entries = [entry if isinstance(entry, str) else entry.path for entry in store.list_folder(_prefix(folder))]
    found = {name for entry in entries if is_one(name := entry.rstrip("/").rpartition("/")[2])}
    times = {name: modified_at(store, folder.join(name)) for name in found}
    complete = [(modified, len(name), name) for name, modified in times.items() if modified is not None]
    if not complete:
        return None
    modified, _, name = max(complete)
    return folder.join(name), modified


def _prefix(folder: BlobLocation) -> str:
    return folder.prefix
