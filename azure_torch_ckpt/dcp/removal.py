"""Removing a checkpoint: first its metadata, then its data blobs, then the directories that they were in."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.commit import delete_metadata
from azure_torch_ckpt.dcp.open_checkpoint import metadata_ranks, read_metadata
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    BlobChangedError,
    BlobNotFoundError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    ServiceUnavailableError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["remove_blobs", "remove_checkpoint", "remove_empty_folders"]

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

    A failure is logged: it costs storage, not correctness. Once the service is down, nothing more is tried. Where the
    account has directories, those that the blobs were in are deleted too, unless something else is in them.

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
    """Call `remove` for each name, in parallel; return the errors by name."""
    cancel = Cancel()
    failed: dict[str, AzureCheckpointError] = {}
    down: list[ServiceUnavailableError] = []

    def attempt(name: str) -> None:
        if down:
            failed[name] = down[0]
            return
        try:
            remove(name, cancel)
        except AzureCheckpointError as error:
            failed[name] = error
            if isinstance(error, ServiceUnavailableError):
                down.append(error)
            where = location.join(name) if name else location
            _log.warning("could not remove %s, which is no longer needed: %s", where, error)

    tasks = (functools.partial(attempt, name) for name in names)
    run_all(tasks, store.options.concurrency, "blob-remove", cancel.cancel)
    return failed
