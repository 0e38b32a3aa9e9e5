"""`OpenCheckpoint`: the checkpoint at a URL, its metadata read and checked, of all ranks in one or of each rank."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.dcp.blob_names import ListedCheckpoint, group_by_checkpoint, metadata_name
from azure_torch_ckpt.dcp.merging import merge_metadata
from azure_torch_ckpt.dcp.metadata.views import data_paths
from azure_torch_ckpt.dcp.metadata_blob import MetadataBlob, open_metadata_blob, read_metadata_blob, replaced_error
from azure_torch_ckpt.dcp.save_group import SaveGroup
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobNotFoundError,
    CheckpointNotFoundError,
    RequestRefusedError,
)
from azure_torch_ckpt.location import BlobLocation

__all__ = [
    "OpenCheckpoint",
    "OpenMetadata",
    "is_replaced",
    "listed_checkpoint",
    "metadata_ranks",
    "not_found_error",
    "open_checkpoint",
    "open_checkpoint_in",
    "read_metadata",
    "read_whole_group",
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

    @property
    def group(self) -> SaveGroup | None:
        """The save without collectives that it is a part of; None if it does not say."""
        return SaveGroup.of(self.metadata)


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
        parts = [
            part for first in read_metadata(store, location, [0]) for part in read_whole_group(store, location, first)
        ]
    if not parts:
        raise not_found_error(store, location, metadata_name())
    modified = max(part.stored.modified for part in parts)
    metadata = merge_metadata([part.metadata for part in parts], str(location))
    return OpenCheckpoint(location, store, parts, metadata, modified)


def metadata_ranks(store: BlobStore, location: BlobLocation) -> list[int]:
    """The ranks that have metadata of their own at `location`."""
    prefix = location.prefix
    try:
        listed = [entry for entry in store.list_folder(prefix + "__") if not isinstance(entry, str)]
    except RequestRefusedError:  # in an account with directories, where `location` is a blob
        return []
    return sorted(rank for one in group_by_checkpoint(listed, prefix) for rank in one.metadata if rank is not None)


def listed_checkpoint(store: BlobStore, location: BlobLocation) -> ListedCheckpoint:
    """The blobs of the checkpoint at `location`, complete or not, from a listing of all that lies there."""
    prefix = location.prefix
    try:
        listed = group_by_checkpoint(store.list(prefix), prefix)
    except RequestRefusedError:  # in an account with directories, where `location` is a blob
        listed = []
    return next((one for one in listed if one.path == location.path), ListedCheckpoint(location.path))


def read_metadata(store: BlobStore, location: BlobLocation, ranks: Iterable[int | None]) -> list[OpenMetadata]:
    """Read the metadata blobs of `ranks` (None: of all ranks) that exist, in parallel. Raises as `open_checkpoint`."""
    parts: dict[int | None, OpenMetadata] = {}

    def read(rank: int | None) -> None:
        part = _read_one(store, location, rank)
        if part is not None:
            parts[rank] = part

    wanted = list(ranks)
    if len(wanted) == 1:
        read(wanted[0])
    else:
        run_all((functools.partial(read, rank) for rank in wanted), store.options.concurrency, "blob-metadata")
    return [parts[rank] for rank in sorted(parts, key=lambda rank: -1 if rank is None else rank)]


def _read_one(store: BlobStore, location: BlobLocation, rank: int | None) -> OpenMetadata | None:
    stored = read_metadata_blob(store, location, rank)
    return None if stored is None else OpenMetadata(rank, stored, open_metadata_blob(store, location, rank, stored))


def read_whole_group(store: BlobStore, location: BlobLocation, known: OpenMetadata) -> list[OpenMetadata]:
    """Read the metadata of all ranks of the save without collectives that `known` is of, in the order of the ranks.

    It needs a listing only where the metadata does not say how many ranks saved: of an earlier version of this package,
    or of torch's own writer.

    Raises:
        CheckpointNotFoundError: the save is not complete, or another one has replaced a part of it, or how many ranks
            saved is unknown.
        as `open_checkpoint`.
    """
    group = known.group
    wanted: Iterable[int | None]
    if group is None:
        wanted = listed_checkpoint(store, location).committed
        if None in wanted:
            raise replaced_error(location)
        if not wanted:
            raise _incomplete_error(
                location, "ranks saved it with use_collectives=False, and the metadata of some of them is missing"
            )
    elif group.ranks is None:
        raise _unknown_ranks_error(location)
    else:
        wanted = range(group.ranks)
    parts: dict[int | None, OpenMetadata] = {}

    def read(rank: int | None) -> None:
        part = known if rank == known.rank else _read_one(store, location, rank)
        name = metadata_name(rank)
        if part is None:
            of_ranks = "" if group is None else f"{group.ranks} "
            raise _incomplete_error(
                location,
                f"{of_ranks}ranks saved it with use_collectives=False, and {name} is missing. The save did not finish, "
                "or only the ranks of a process_group= saved, and only they can load it, each what it saved. Use an "
                "older checkpoint, or load it there and save it with collectives",
            )
        if group is not None and part.group == SaveGroup(group.id, None):
            raise _unknown_ranks_error(location)
        if part.group != group:
            raise _incomplete_error(
                location,
                f"{name} and {metadata_name(known.rank)} are of two different saves with use_collectives=False. The "
                "later one did not finish, or is running. Use an older checkpoint, or save again",
            )
        parts[rank] = part

    # The first error ends it: a damaged number of ranks costs no more than a few requests.
    run_all((functools.partial(read, rank) for rank in wanted), store.options.concurrency, "blob-metadata")
    return [part for _, part in sorted(parts.items(), key=lambda one: one[0] or 0)]


def _unknown_ranks_error(location: BlobLocation) -> CheckpointNotFoundError:
    return _incomplete_error(
        location,
        "part of a job's ranks saved it with use_collectives=False (process_group=, no_dist=True), and how many they "
        "were is not known. So only these ranks can load it, each what it saved. Load it there, and save it with "
        "collectives",
    )


def _incomplete_error(location: BlobLocation, reason: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"No complete checkpoint at {location}: {reason}")


def is_replaced(store: BlobStore, location: BlobLocation, etags: Mapping[str, str]) -> bool:
    """Whether a metadata blob is gone, or has another ETag than when it was read (`etags`, by the blob's name)."""
    for name, etag in etags.items():
        try:
            if store.stat(location.join(name).path).etag != etag:
                return True
        except BlobNotFoundError:
            return True
    return False


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
            f"The metadata of {_some(map(str, ranks), 'rank')} lies there: they saved with use_collectives=False. "
            "dcp.load and azure_torch_ckpt.catalog read that if the metadata of all ranks is there"
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
