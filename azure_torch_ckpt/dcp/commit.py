"""The commit: one conditional Put Blob makes a save visible, and one conditional Delete Blob hides it again.

A checkpoint exists exactly when its ``.metadata`` does, and a model in the HuggingFace layout when its index does. The
condition is that the blob at the URL is still the one that was there when the save began. `blobs.outcome` finds the
outcome of a request whose answer is lost.
"""

from __future__ import annotations

from collections.abc import Callable

from azure_torch_ckpt.blobs import outcome
from azure_torch_ckpt.blobs.blob_info import CopiedSettings
from azure_torch_ckpt.blobs.outcome import Outcome, Result
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.metadata.front import open_metadata
from azure_torch_ckpt.dcp.metadata.views import data_paths
from azure_torch_ckpt.dcp.metadata_blob import MetadataBlob
from azure_torch_ckpt.errors import BlobNotFoundError, CommitConflictError, StoreError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["commit", "commit_metadata", "delete_metadata"]


def commit_metadata(
    store: BlobStore,
    location: BlobLocation,
    data: bytes,
    replaces: MetadataBlob | None,
    rank: int | None,
    settings: CopiedSettings | None = None,
) -> str:
    """Make a checkpoint visible: `commit` its metadata.

    Args:
        data: the metadata. It holds the save's id, so the metadata of any other save differs.
        replaces: the metadata at `location` when the save began; None if there was none.
        settings: what the blob carries: that of the one it is a copy of, or what a listing shows of a save.
    """

    def has_data() -> bool:
        try:
            for name in sorted(data_paths(open_metadata(data, f"{location}/{metadata_name(rank)}"))):
                store.stat(location.join(name).path)
        except BlobNotFoundError:
            return False
        return True

    return commit(
        store,
        location,
        metadata_name(rank),
        data,
        what="checkpoint",
        if_etag=None if replaces is None else replaces.etag,
        has_data=has_data,
        settings=settings,
    )


def commit(
    store: BlobStore,
    location: BlobLocation,
    name: str,
    data: bytes,
    *,
    what: str,
    if_etag: str | None,
    has_data: Callable[[], bool],
    always_ask: bool = False,
    settings: CopiedSettings | None = None,
) -> str:
    """Write the blob that makes a save visible, if the blob of this name is still the one before the save.

    The first save at a URL can be committed twice, by a request whose answer was lost and by the retry. If another
    process removed the checkpoint in between, its data is gone, and the blob must not stay without it.

    Args:
        name: of the blob, below `location`.
        data: its content. It holds the save's id, so the content of any other save differs.
        what: the noun for what is saved, for messages.
        if_etag: the ETag of the blob when the save began; None if there was none.
        has_data: finds out whether the save's data is there. It may raise `StoreError`.
        always_ask: call `has_data` after every first save, not only after one that may have been committed twice.
        settings: what the blob carries besides.

    Returns:
        The ETag of the blob.

    Raises:
        CommitConflictError: another save was committed meanwhile, or what was at the URL was removed. That is proven,
            and the data of this save belongs to no checkpoint.
        CommitUnknownError: whether the commit was carried out is unknown, so no data of either save may be deleted.
        StoreError: the service refused; the commit was not carried out.
    """
    path = location.join(name).path
    result = outcome.put(store, path, data, settings, if_etag=if_etag, if_missing=if_etag is None)
    if result.outcome is Outcome.DONE and if_etag is None and (result.again or always_ask):
        result = _with_data(store, path, result, has_data)
    if result.outcome is Outcome.DONE:
        return result.etag
    if result.outcome is Outcome.LOST:
        raise CommitConflictError(
            f"Another save {'removed' if result.removed else 'committed'} the {what} at {location} since this one "
            "began, so this one was dropped. Give each job a URL of its own, or save again to replace that one"
        ) from result.error
    raise result.unknown(
        f"Whether this save was committed at {location} is unknown. Its {what} is there, or what was there before, "
        "whole either way; nothing was deleted. Load it or save again; prune removes leftovers"
    )


def _with_data(store: BlobStore, path: str, result: Result, has_data: Callable[[], bool]) -> Result:
    """The result of a commit whose data may have been removed; without the data, the blob is deleted again."""
    try:
        if has_data():
            return result
        removed = outcome.delete(store, path, if_etag=result.etag)
    except StoreError as error:
        return Result(Outcome.UNKNOWN, error=error)
    return removed if removed.outcome is Outcome.UNKNOWN else Result(Outcome.LOST, removed=True)


def delete_metadata(
    store: BlobStore, location: BlobLocation, rank: int | None, etag: str, cancel: Cancel | None = None
) -> bool:
    """Hide a checkpoint: delete its metadata, if it still has this ETag.

    Returns:
        True: the data that the metadata named belongs to no checkpoint. False: the metadata was replaced, and stays.

    Raises:
        CommitUnknownError: whether it was carried out is unknown, so no data may be deleted.
        StoreError: the service refused; the metadata is still there.
    """
    result = outcome.delete(store, location.join(metadata_name(rank)).path, if_etag=etag, cancel=cancel)
    if result.outcome is Outcome.UNKNOWN:
        raise result.unknown(
            f"Whether the checkpoint at {location} was removed is unknown. It is whole, or only its data is left, "
            "which prune removes. Remove it again"
        )
    return result.outcome is Outcome.DONE
