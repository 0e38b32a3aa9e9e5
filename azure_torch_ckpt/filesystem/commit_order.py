"""The order in which blobs are written and removed, so that no checkpoint is ever incomplete; and their removal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.dcp.blob_names import is_metadata_name
from azure_torch_ckpt.filesystem.paths import parents
from azure_torch_ckpt.huggingface.blob_names import INDEX_SUFFIX
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["commit_last", "delete_all", "removal_order"]

_T = TypeVar("_T")


def commit_last(files: Sequence[_T], name: Callable[[_T], str]) -> list[list[_T]]:
    """Return two groups in the order of writing: data, then commit records. The order of removal is the reverse."""
    groups: list[list[_T]] = [[], []]
    for file in files:
        groups[_is_commit_record(name(file))].append(file)
    return groups


def removal_order(blobs: Iterable[BlobInfo]) -> list[list[BlobInfo]]:
    """Return groups of blobs: the blobs of one group may be removed at a time, the groups one after the other.

    The commit records come first, so that no checkpoint remains incomplete, and then the data. The blobs that represent
    folders come last, from the bottom up: an account with a hierarchical namespace refuses to delete a directory that
    is not empty.
    """
    by_name = {blob.path: blob for blob in blobs}
    above = parents(by_name)
    folders: list[BlobInfo] = []
    others: list[BlobInfo] = []
    for blob in by_name.values():
        (folders if blob.is_folder or (not blob.size and blob.path in above) else others).append(blob)
    data, records = commit_last(others, lambda blob: blob.path)
    depths = sorted({blob.path.count("/") for blob in folders}, reverse=True)
    return [records, data, *([blob for blob in folders if blob.path.count("/") == depth] for depth in depths)]


def delete_all(store: BlobStore, blobs: Iterable[BlobInfo]) -> None:
    """Delete blobs and empty directories. One that does not exist any more is not an error."""
    cancel = Cancel()
    run_all(
        (functools.partial(_delete, store, blob, cancel) for blob in blobs),
        store.options.concurrency,
        "blob-remove",
        cancel.cancel,
    )


def _is_commit_record(name: str) -> bool:
    """Whether a checkpoint is complete exactly if this blob exists: torch's metadata, or transformers' index."""
    return is_metadata_name(name.rpartition("/")[2]) or name.endswith(INDEX_SUFFIX)


def _delete(store: BlobStore, blob: BlobInfo, cancel: Cancel) -> None:
    if blob.is_folder:
        store.delete_folder(blob.path, cancel=cancel)
    else:
        store.delete(blob.path, cancel=cancel)
