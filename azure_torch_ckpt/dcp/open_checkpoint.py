"""`OpenCheckpoint`: the checkpoint at a URL, its metadata read and checked, of all ranks in one or of each rank."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.dcp.blob_names import group_by_checkpoint, metadata_name
from azure_torch_ckpt.dcp.metadata.views import data_paths
from azure_torch_ckpt.dcp.metadata_blob import MetadataBlob, open_metadata_blob, read_metadata_blob
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobNotFoundError,
    CheckpointNotFoundError,
    RequestRefusedError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.location import BlobLocation

__all__ = [
    "OpenCheckpoint",
    "OpenMetadata",
    "is_replaced",
    "metadata_ranks",
    "not_found_error",
    "open_checkpoint",
    "open_checkpoint_in",
    "read_metadata",
]


@dataclass(frozen=True, slots=True)
class OpenMetadata:
    """One metadata blob of a checkpoint, read and checked; `rank` is None for the metadata of all ranks."""

    rank: int | None
    stored: MetadataBlob
    metadata: Metadata

    @property
    def names(self) -> set[str]:
        """The data blobs that it names, below the checkpoint's URL."""
        return data_paths(self.metadata)


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """A complete checkpoint whose metadata was read, and the store to read the rest from.

    Attributes:
        parts: its metadata: one blob, or one of each rank.
        metadata: all of it. After a save without collectives, the entries of all ranks together.
        modified: when it was completed.
    """

    location: BlobLocation
    store: BlobStore
    parts: list[OpenMetadata]
    metadata: Metadata
    modified: datetime.datetime

    @property
    def url(self) -> str:
        return str(self.location)


def open_checkpoint(url: str | os.PathLike[str] | BlobLocation, access: Access) -> OpenCheckpoint:
    """Read the metadata of the checkpoint at a URL.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: it cannot be trusted or read.
        StoreError: the service could not be asked.
    """
    location = BlobLocation.parse(url)
    return open_checkpoint_in(BlobStore(location, access), location)


def open_checkpoint_in(store: BlobStore, location: BlobLocation) -> OpenCheckpoint:
    """`open_checkpoint` with a store that exists."""
    parts = read_metadata(store, location, [None])
    if not parts:
        ranks: list[int] = []
        with contextlib.suppress(AccessDeniedError):  # `not_found_error` says what is unknown then
            ranks = metadata_ranks(store, location)
        parts = read_metadata(store, location, ranks)
    if not parts:
        raise not_found_error(store, location, metadata_name())
    modified = max(part.stored.modified for part in parts)
    return OpenCheckpoint(location, store, parts, _merged(parts), modified)


def metadata_ranks(store: BlobStore, location: BlobLocation) -> list[int]:
    """The ranks that have metadata of their own at `location`."""
    prefix = location.prefix
    try:
        listed = [entry for entry in store.list_folder(prefix + "__") if not isinstance(entry, str)]
    except RequestRefusedError:  # in an account with directories, where `location` is a blob
        return []
    return sorted(rank for one in group_by_checkpoint(listed, prefix) for rank in one.metadata if rank is not None)


def read_metadata(store: BlobStore, location: BlobLocation, ranks: Iterable[int | None]) -> list[OpenMetadata]:
    """Read the metadata blobs of `ranks` (None: of all ranks) that exist, in parallel. Raises as `open_checkpoint`."""
    parts: dict[int | None, OpenMetadata] = {}

    def read(rank: int | None) -> None:
        stored = read_metadata_blob(store, location, rank)
        if stored is not None:
            parts[rank] = OpenMetadata(rank, stored, open_metadata_blob(store, location, rank, stored))

    wanted = list(ranks)
    if len(wanted) == 1:
        read(wanted[0])
    else:
        run_all((functools.partial(read, rank) for rank in wanted), store.options.concurrency, "blob-metadata")
    return [parts[rank] for rank in sorted(parts, key=lambda rank: -1 if rank is None else rank)]


def is_replaced(store: BlobStore, location: BlobLocation, etags: Mapping[str, str]) -> bool:
    """Whether a metadata blob is gone, or has another ETag than when it was read (`etags`, by the blob's name)."""
    for name, etag in etags.items():
        try:
            if store.stat(location.join(name).path).etag != etag:
                return True
        except BlobNotFoundError:
            return True
    return False


def _merged(parts: list[OpenMetadata]) -> Metadata:
    """Merge the metadata of all ranks. Where two stored the same chunk or object, the first one counts."""
    if len(parts) == 1:
        return parts[0].metadata
    first = parts[0].metadata
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    paths: dict[str, Any] = {}
    for part in parts:
        metadata = part.metadata
        for key, entry in metadata.state_dict_metadata.items():
            known = entries.get(key)
            if known is None:
                if isinstance(entry, TensorStorageMetadata):
                    entry = TensorStorageMetadata(entry.properties, entry.size, list(entry.chunks))
                entries[key] = entry
            elif isinstance(known, TensorStorageMetadata) and isinstance(entry, TensorStorageMetadata):
                if (known.size, known.properties.dtype) != (entry.size, entry.properties.dtype):
                    raise UnsupportedCheckpointError(
                        f"The ranks saved different tensors under the name {key!r} (use_collectives=False), so there "
                        "is no one state dict. Load each rank's own with dcp.load"
                    )
                offsets = {chunk.offsets for chunk in known.chunks}
                known.chunks.extend(chunk for chunk in entry.chunks if chunk.offsets not in offsets)
        for index, info in metadata.storage_data.items():
            storage.setdefault(index, info)
        if isinstance(metadata.planner_data, dict):
            paths = {**metadata.planner_data, **paths}
    return Metadata(entries, paths, storage, first.storage_meta, first.version)


def not_found_error(store: BlobStore, location: BlobLocation, name: str) -> CheckpointNotFoundError:
    """Make the error for a URL without the metadata blob `name`, with a hint at what is there, from one listing."""
    missing = f"No complete checkpoint at {location}: {name} is not there"
    prefix = location.prefix
    try:
        listed = [blob for blob in store.list(prefix, limit=1_000) if not blob.is_folder]
    except RequestRefusedError:  # in an account with directories, where the URL is a blob's
        listed = []
    except AccessDeniedError:
        return CheckpointNotFoundError(
            f"{missing}. What lies there instead is unknown, for the credential does not allow listing; check the URL"
        )
    checkpoints = group_by_checkpoint(listed, prefix)
    here = next((one for one in checkpoints if one.path == location.path), None)
    below = [one.path[len(prefix) :] for one in checkpoints if one.complete and one is not here]
    ranks = [] if here is None else sorted(rank for rank in here.metadata if rank is not None)
    if not listed:
        hint = "Nothing lies there at all; check the URL"
    elif ranks:
        hint = (
            f"The metadata of {_some(map(str, ranks), 'rank')} lies there: they saved with use_collectives=False. Load "
            "on as many ranks, or save again with collectives"
        )
    elif here is not None:
        hint = "Data blobs lie there without it: a save that did not finish. Use an older checkpoint"
    elif below:
        hint = f"Complete checkpoints lie below it: {_some(below)}"
    else:
        # As a folder would show it.
        names = dict.fromkeys(_first_part(blob.path[len(prefix) :]) for blob in listed)
        hint = f"What lies there: {_some(names)}"
    return CheckpointNotFoundError(f"{missing}. {hint}")


def _first_part(path: str) -> str:
    first, slash, _ = path.partition("/")
    return first + slash


def _some(names: Iterable[str], noun: str = "") -> str:
    every = list(names)
    listed = f"{', '.join(every[:5])}{', ...' if len(every) > 5 else ''}"
    return f"{noun}{'' if len(every) == 1 else 's'} {listed}" if noun else listed
