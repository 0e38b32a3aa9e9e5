"""Which blobs a checkpoint consists of, how one becomes visible, and how one is removed.

A checkpoint at a URL exists exactly when ``<url>/.metadata`` does. Data blobs are named by a save id that no other save
uses, so a save never touches a byte of the one before, and one conditional Put Blob of ``.metadata`` is the commit.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from azure_torch_ckpt._internal.checksums import md5
from azure_torch_ckpt.blobs import outcome
from azure_torch_ckpt.blobs.outcome import Outcome, Result
from azure_torch_ckpt.blobs.settings import CopiedSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import Workers
from azure_torch_ckpt.dcp.metadata.schema import data_paths, load_metadata
from azure_torch_ckpt.errors import (
    AzureCheckpointError,
    BlobChangedError,
    BlobNotFoundError,
    CommitConflictError,
    CorruptCheckpointError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = [
    "Stored",
    "commit",
    "data_name",
    "delete_metadata",
    "metadata_name",
    "new_save_id",
    "read_metadata_blob",
    "remove_blobs",
    "remove_empty_folders",
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


def commit(
    store: BlobStore,
    location: BlobLocation,
    data: bytes,
    replaces: Stored | None,
    rank: int | None,
    settings: CopiedSettings | None = None,
) -> str:
    """Make a checkpoint visible: write its metadata if what stands there is still what stood there before the save.

    Returns the metadata's ETag.

    Args:
        data: holds the save's id, so that no other save's is the same.
        replaces: what stood there when the save began; None if nothing did.
        settings: what the metadata's blob carries, of which this is a copy.

    Raises:
        CommitConflictError: another save committed meanwhile, or the checkpoint was removed: that is proven, and the
            data of this one belongs to no checkpoint.
        CommitUnknownError: whether the commit was carried out is unknown, so nothing of either may be deleted.
        StoreError: the service refused; the commit was not carried out.
    """
    path = location.join(metadata_name(rank)).path
    etag = None if replaces is None else replaces.etag
    result = outcome.put(store, path, data, settings, if_etag=etag, if_missing=replaces is None)
    if result.again:
        try:
            result = _settled_again(store, location, data, rank, result)
        except StoreError as error:
            result = Result(Outcome.UNKNOWN, error=error)
    if result.outcome is Outcome.DONE:
        return result.etag
    if result.outcome is Outcome.LOST:
        raise CommitConflictError(
            f"Another save {'removed' if result.removed else 'committed'} the checkpoint at {location} since this one "
            "began, so this one was dropped. Give each job a URL of its own, or save again to replace what stands there"
        ) from result.error
    before = "there is none" if replaces is None else "the old one is there"
    raise result.unknown(
        f"Whether this save was committed at {location} is unknown. Either its checkpoint is there, whole, or {before} "
        "as before; nothing was deleted. Load it or save again; prune removes what is left over"
    )


def _settled_again(store: BlobStore, location: BlobLocation, data: bytes, rank: int | None, result: Result) -> Result:
    """What a commit came to that was carried out perhaps twice: somebody may have removed the checkpoint in between.

    Then its data is gone, and the metadata that was written again must not stand without.

    Raises:
        StoreError: the service could not be asked.
    """
    try:
        for name in sorted(data_paths(load_metadata(data, f"{location}/{metadata_name(rank)}"))):
            store.stat(location.join(name).path)
    except BlobNotFoundError:
        delete_metadata(store, location, rank, result.etag)  # raises where that is unknown
        return Result(Outcome.LOST, removed=True)
    return result


def delete_metadata(
    store: BlobStore, location: BlobLocation, rank: int | None, etag: str, cancel: Cancel | None = None
) -> bool:
    """Take a checkpoint's metadata away. False: it was replaced since it had this ETag, and stays.

    Once it returns True, the data that the metadata named belongs to no checkpoint.

    Raises:
        CommitUnknownError: whether it was carried out is unknown, so no data may be deleted.
        StoreError: the service refused; the metadata stands.
    """
    result = outcome.delete(store, location.join(metadata_name(rank)).path, if_etag=etag, cancel=cancel)
    if result.outcome is Outcome.UNKNOWN:
        raise result.unknown(
            f"Whether the checkpoint at {location} was removed is unknown. It is whole, or only its data is left, "
            "which prune removes. Remove it again"
        )
    return result.outcome is Outcome.DONE


def remove_blobs(
    store: BlobStore, location: BlobLocation, names: Iterable[str], folders: Iterable[str] = ()
) -> dict[str, AzureCheckpointError]:
    """Delete data blobs that no metadata names any more.

    A failure is logged, and costs storage, not correctness. Once the service is down, no more is tried. Where the
    account has directories, those that the blobs were in go, too, unless something else is in them.

    Args:
        names: below `location`.
        folders: more directories that go if they are empty; ``""`` is that of `location`.

    Returns:
        The blobs that were not deleted, by name.
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
    """Delete directories that nothing is in, from the bottom up. A failure is logged.

    Only accounts with a hierarchical namespace have directories. One request finds out, and in other accounts nothing
    more is asked for by the same store.

    Args:
        folders: below `location`; ``""`` is that of `location`.
        emptied: those of them that a blob was deleted from just now.
    """

    def remove(folder: str, cancel: Cancel) -> None:
        path = (location.join(folder) if folder else location).path
        try:
            found = store.stat(path, cancel=cancel)
        except BlobNotFoundError:
            if folder in emptied and store.has_directories is None:
                store.has_directories = False  # it would have stayed
            return
        # In other accounts some tools mark folders with blobs of their own, which are not ours to remove.
        store.has_directories = found.resource_type is not None
        if found.resource_type == "directory":
            with contextlib.suppress(BlobChangedError):
                store.delete_folder(path, if_etag=found.etag, cancel=cancel)

    wanted = {folder for folder in folders if folder or location.path}
    # At first one alone: it tells whether the account has directories at all.
    ordered = sorted(wanted, key=lambda folder: (-_depth(folder), folder not in emptied))
    for group in (ordered[:1], *(list(group) for _, group in itertools.groupby(ordered[1:], _depth))):
        if store.has_directories is not False:
            _for_each(store, location, group, remove)


def _depth(folder: str) -> int:
    return folder.count("/") + 1 if folder else 0


def _for_each(
    store: BlobStore, location: BlobLocation, names: list[str], remove: Callable[[str, Cancel], None]
) -> dict[str, AzureCheckpointError]:
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

    with Workers(store.options.concurrency, "blob-remove", cancel.cancel) as workers:
        for name in names:
            workers.submit(functools.partial(attempt, name))
    return failed
