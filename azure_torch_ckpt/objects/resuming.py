"""Finds the checkpoint in a folder to resume from, and tells Lightning's Trainer about it."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, Final

import fsspec
from fsspec.spec import AbstractFileSystem

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.errors import BlobNotFoundError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["ResumeCandidate", "completion_time", "is_empty", "newest_checkpoint", "torch_file_time"]

_PROTOCOL: Final = "azblob-resume-candidate"


def completion_time(store: BlobStore, location: BlobLocation) -> datetime.datetime | None:
    """When the checkpoint at `location`, or the `.ckpt` blob of ``torch.save``, was completed; None without either."""
    try:
        return store.stat(location.join(metadata_name()).path).last_modified
    except BlobNotFoundError:
        return torch_file_time(store, location)


def torch_file_time(store: BlobStore, location: BlobLocation) -> datetime.datetime | None:
    """When the blob at `location` was written, which Lightning's own plugin does; None if there is no such blob.

    An empty blob does not count: in an account with a hierarchical namespace it is a folder
    (https://learn.microsoft.com/azure/storage/blobs/data-lake-storage-namespace).
    """
    if not location.path:
        return None
    try:
        blob = store.stat(location.path)
    except BlobNotFoundError:
        return None
    return blob.last_modified if blob.size else None


def is_empty(store: BlobStore, folder: BlobLocation) -> bool:
    """Whether no blob lies below `folder`; empty folders do not count."""
    return all(blob.is_folder for blob in store.list(folder.prefix))


def newest_checkpoint(
    store: BlobStore, folder: BlobLocation, accepts: Callable[[str], bool]
) -> tuple[BlobLocation, datetime.datetime] | None:
    """The checkpoint directly below `folder` that was completed last, of those whose name `accepts` takes, and when.

    The service's times have a resolution of a second. Of several checkpoints within one second, the newest is the one
    with the longest name, and then the last in the alphabet: ``last-v10``, ``last-v2``, ``last-v1``, ``last``.
    """
    entries = [entry if isinstance(entry, str) else entry.path for entry in store.list_folder(folder.prefix)]
    names = {name for entry in entries if accepts(name := entry.rstrip("/").rpartition("/")[2])}
    times = {name: completion_time(store, folder.join(name)) for name in names}
    complete = [(time, len(name), name) for name, time in times.items() if time is not None]
    if not complete:
        return None
    time, _, name = max(complete)
    return folder.join(name), time


class ResumeCandidate(str):
    """The URL of a checkpoint that exists, which answers fsspec's questions about it.

    Lightning's Trainer, asked to resume from ``"last"``, takes the candidates that a callback returns, makes an fsspec
    filesystem of ``str(candidate)``, and calls its ``exists(candidate)`` and ``modified(candidate)``. For ``https://``
    that would be fsspec's HTTP filesystem, which has no credential, reports every refusal as "does not exist", and
    knows no times. So until the Trainer has asked for the time, ``str()`` of this object leads to a filesystem that
    answers from the object's attributes. After that, and in everything but ``str()``, the object is its URL.

    Args:
        url: without a SAS, because Lightning prints it.
        modified: when the checkpoint was completed, with time zone.
    """

    modified: datetime.datetime
    _asked: bool

    def __new__(cls, url: str, modified: datetime.datetime) -> ResumeCandidate:
        candidate = super().__new__(cls, url)
        candidate.modified = modified
        candidate._asked = False
        return candidate

    def __str__(self) -> str:
        return self[:] if self._asked else f"{_PROTOCOL}://"

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self[:],)


class _CandidateFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is not annotated
    """The filesystem that a `ResumeCandidate` leads to."""

    protocol = _PROTOCOL

    def exists(self, path: str, **_: Any) -> bool:
        return isinstance(path, ResumeCandidate)

    def modified(self, path: ResumeCandidate) -> datetime.datetime:
        path._asked = True
        return path.modified


fsspec.register_implementation(_PROTOCOL, _CandidateFileSystem, clobber=True)
