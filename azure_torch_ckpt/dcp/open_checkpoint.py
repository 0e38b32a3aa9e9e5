"""The checkpoint that stands at a URL: its metadata, in one piece or of single ranks, read and checked."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.commit import MetadataBlob, read_metadata_blob
from azure_torch_ckpt.dcp.metadata.schema import check_metadata, data_paths, load_metadata
from azure_torch_ckpt.dcp.survey import survey
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    RequestRefusedError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.location import BlobLocation

__all__ = [
    "Standing",
    "StandingCheckpoint",
    "metadata_ranks",
    "nothing_at",
    "open_standing",
    "read_standing",
    "stand_at",
]


@dataclass(frozen=True, slots=True)
class Standing:
    """One metadata blob of a checkpoint.

    Attributes:
        rank: None if it is that of all ranks.
        stored: its bytes, ETag and time.
        metadata: has passed `check_metadata`.
    """

    rank: int | None
    stored: MetadataBlob
    metadata: Metadata

    @property
    def names(self) -> set[str]:
        """The data blobs that it names, below the checkpoint's URL."""
        return data_paths(self.metadata)


@dataclass(frozen=True, slots=True)
class StandingCheckpoint:
    """A complete checkpoint, and the way to it.

    Attributes:
        location: its place.
        store: its container.
        parts: its metadata: one blob, or one of each rank.
        metadata: all of it. Of ranks that saved without collectives, the entries of all of them together.
        modified: when it was completed.
    """

    location: BlobLocation
    store: BlobStore
    parts: list[Standing]
    metadata: Metadata
    modified: datetime.datetime

    @property
    def url(self) -> str:
        return str(self.location)


def open_standing(
    url: str | os.PathLike[str] | BlobLocation,
    access: Access,
) -> StandingCheckpoint:
    """Read the metadata of the checkpoint at a URL.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: it cannot be trusted or read.
        StoreError: the service could not be asked.
    """
    location = BlobLocation.parse(url)
    return stand_at(BlobStore(location, access), location)


def stand_at(store: BlobStore, location: BlobLocation) -> StandingCheckpoint:
    """`open_standing` with a store that exists."""
    parts = read_standing(store, location, [None])
    if not parts:
        ranks: list[int] = []
        with contextlib.suppress(AccessDeniedError):  # `nothing_at` says what is not known
            ranks = metadata_ranks(store, location)
        parts = read_standing(store, location, ranks)
    if not parts:
        raise nothing_at(store, location, metadata_name())
    modified = max(part.stored.modified for part in parts)
    return StandingCheckpoint(location, store, parts, _merged(parts), modified)


def metadata_ranks(store: BlobStore, location: BlobLocation) -> list[int]:
    """The ranks that have metadata of their own at `location`."""
    prefix = location.prefix
    try:
        listed = [entry for entry in store.list_folder(prefix + "__") if not isinstance(entry, str)]
    except RequestRefusedError:  # in an account with directories, where `location` is that of a blob
        return []
    return sorted(rank for place in survey(listed, prefix) for rank in place.metadata if rank is not None)


def read_standing(store: BlobStore, location: BlobLocation, ranks: Iterable[int | None]) -> list[Standing]:
    """The metadata of `ranks` (None for that of all), as far as it is there, fetched in parallel.

    Raises: as `open_standing`.
    """
    found: dict[int | None, Standing] = {}

    def read(rank: int | None) -> None:
        stored = read_metadata_blob(store, location, rank)
        if stored is not None:
            where = f"{location}/{metadata_name(rank)}"
            metadata = load_metadata(stored.data, where)
            check_metadata(metadata, where)
            found[rank] = Standing(rank, stored, metadata)

    wanted = list(ranks)
    if len(wanted) == 1:
        read(wanted[0])
    else:
        run_all((functools.partial(read, rank) for rank in wanted), store.options.concurrency, "blob-metadata")
    return [found[rank] for rank in sorted(found, key=lambda rank: -1 if rank is None else rank)]


def _merged(parts: list[Standing]) -> Metadata:
    """One metadata for the parts of all ranks: where two stored the same chunk or object, the first one counts."""
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


def nothing_at(store: BlobStore, location: BlobLocation, name: str) -> CheckpointNotFoundError:
    """The error for a place without the metadata blob `name`, with a hint at what is there instead.

    One listing, of a thousand blobs at most: a hint, not an inventory.

    Raises:
        StoreError: the service could not be asked.
    """
    missing = f"No complete checkpoint at {location}: {name} is not there"
    prefix = location.prefix
    try:
        listed = [blob for blob in store.list(prefix, limit=1_000) if not blob.is_folder]
    except RequestRefusedError:  # in an account with directories, where the URL is that of a blob
        listed = []
    except AccessDeniedError:
        return CheckpointNotFoundError(
            f"{missing}. What lies there instead is unknown, for the credential does not allow listing; check the URL"
        )
    places = survey(listed, prefix)
    here = next((place for place in places if place.path == location.path), None)
    below = [place.path[len(prefix) :] for place in places if place.complete and place is not here]
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
    found = list(names)
    listed = f"{', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
    return f"{noun}{'' if len(found) == 1 else 's'} {listed}" if noun else listed
