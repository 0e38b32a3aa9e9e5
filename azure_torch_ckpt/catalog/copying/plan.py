"""What a copy has to do: the checkpoints at its source, their files, and what stands at its target already."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from azure_torch_ckpt._internal.checksums import combine
from azure_torch_ckpt.blobs.store import BlobInfo
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.catalog.copying.folders import End
from azure_torch_ckpt.dcp.layout import Stored, metadata_name
from azure_torch_ckpt.dcp.listed_checkpoint import ListedCheckpoint, group_by_checkpoint
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, check_metadata, load_metadata, stored_item
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
)
from azure_torch_ckpt.options import TransferOptions

__all__ = ["CheckpointPlan", "FilePlan", "in_parallel", "plan_copy"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One blob or file that is copied as it is.

    Attributes:
        source: its name at the source, which is its name at the target, too; its size and ETag.
        there: what the target has under this name, or None.
        items: of the checkpoint's items, those that lie in it, in the order of their offsets.
    """

    source: BlobInfo
    there: BlobInfo | None
    items: list[StoredItem]

    @property
    def crc64(self) -> int | None:
        """CRC64-NVME of the whole, if the items' own cover it without a gap."""
        crc = end = 0
        for item in self.items:
            if item.crc64 is None or item.offset != end:
                return None
            crc = combine(crc, item.crc64, item.length)
            end += item.length
        return crc if end == self.source.size and end else None


@dataclass(slots=True)
class CheckpointPlan:
    """One checkpoint.

    Attributes:
        name: its place below the source's and below the target's.
        metadata: its metadata by rank, None for that of all.
        blobs: the blobs or files of this metadata.
        files: everything else.
        standing: metadata that stands at the target, by rank.
        outdated: data that only the standing metadata names, by its name at the target.
    """

    name: str
    metadata: dict[int | None, Stored]
    blobs: dict[int | None, BlobInfo]
    files: list[FilePlan]
    standing: dict[int | None, Stored] = field(default_factory=dict)
    outdated: set[str] = field(default_factory=set)

    @property
    def is_committed(self) -> bool:
        """Whether the very same metadata stands at the target, and no other."""
        return {rank: stored.data for rank, stored in self.metadata.items()} == {
            rank: stored.data for rank, stored in self.standing.items()
        }


def plan_copy(source: End, target: End, options: TransferOptions, *, overwrite: bool) -> list[CheckpointPlan]:
    """Look at both ends, with one listing of each and a request for each metadata blob, in parallel.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint at the source.
        CheckpointExistsError: another one stands at the target, and `overwrite` is False.
        CorruptCheckpointError: data that a checkpoint names is missing or short, or its metadata is damaged.
        CheckpointError, StoreError: the metadata cannot be read.
    """
    leaves = {info.path: info for info in source.listing()}
    places = group_by_checkpoint(leaves.values())
    complete = [place for place in places if place.complete]
    for place in places:
        if not place.complete:
            _log.warning("%s is not copied: it is an incomplete save", _shown(source, place.path))
    if not complete:
        raise CheckpointNotFoundError(
            f"No complete checkpoint at or below {source.where}. "
            + (f"{len(places)} incomplete saves lie there" if places else "No save has left anything there; check it")
        )
    there = {info.path: info for info in _listing_of_target(target, overwrite)}
    standing = {place.path: place for place in group_by_checkpoint(there.values())}
    plans: dict[str, CheckpointPlan] = {}

    def look(place: ListedCheckpoint) -> None:
        plan = _plan(source, place, leaves, there)
        plans[place.path] = plan
        stands = standing.get(place.path)
        for rank in stands.metadata if stands is not None else ():
            stored = target.read_metadata(place.path, rank)
            if stored is not None:
                plan.standing[rank] = stored
        if not plan.standing or plan.is_committed:
            return
        if not overwrite:
            raise CheckpointExistsError(
                f"Another checkpoint stands at {_shown(target, place.path)} already. Nothing was copied; choose "
                "another place, or replace it with overwrite=True"
            )
        plan.outdated = _named(target, place.path, plan.standing) - {file.source.path for file in plan.files}

    in_parallel(options, [functools.partial(look, place) for place in complete])
    return [plans[place.path] for place in complete]


def _listing_of_target(target: End, overwrite: bool) -> list[BlobInfo]:
    """What is there; nothing where the credential is for writing only, for a new checkpoint needs no more."""
    try:
        return target.listing()
    except AccessDeniedError as error:
        if overwrite:
            raise AccessDeniedError(
                f"A checkpoint at {target.where} can only be replaced with a credential that may read and list what is "
                "there. Without overwrite=True, one for writing will do"
            ) from error
        target.may_look = False
        _log.info("what is at %s may not be seen: every blob is copied, and nothing replaced", target.where)
        return []


def in_parallel(
    options: TransferOptions, tasks: Iterable[Callable[[], None]], stop: Callable[[], None] | None = None
) -> None:
    """Carry out tasks with as many threads as connections. The first error ends them and is raised."""
    run_all(tasks, options.concurrency, "blob-copy", stop)


def _plan(
    source: End, place: ListedCheckpoint, leaves: dict[str, BlobInfo], there: dict[str, BlobInfo]
) -> CheckpointPlan:
    where = _shown(source, place.path)
    metadata = {}
    for rank in [None] if None in place.metadata else sorted(rank for rank in place.metadata if rank is not None):
        stored = source.read_metadata(place.path, rank)
        if stored is None or stored.etag != place.metadata[rank].etag:
            raise CheckpointReplacedError(f"{where} was replaced or removed a moment ago. Copy again")
        metadata[rank] = stored
    items: dict[str, list[StoredItem]] = {}
    for rank, stored in metadata.items():
        for name, found in _items(f"{where}/{metadata_name(rank)}", place.path, stored).items():
            items.setdefault(name, []).extend(found)
    files = []
    for name, found in items.items():
        needed = max(item.offset + item.length for item in found)
        leaf = leaves.get(name)
        if leaf is None or leaf.size < needed:
            size = "missing" if leaf is None else f"only {leaf.size} bytes long where {needed} are needed"
            raise CorruptCheckpointError(
                f"{name} of {source.where} is {size}. Nothing was copied; use another checkpoint"
            )
        files.append(FilePlan(leaf, there.get(name), sorted(found, key=lambda item: item.offset)))
    # What else lies in the checkpoint, a framework's own files perhaps, but for metadata and the data of other saves.
    known = {blob.path for blobs in place.saves.values() for blob in blobs} | items.keys()
    known |= {blob.path for blob in place.metadata.values()} | {_join(place.path, ".metadata.tmp")}
    files += [FilePlan(blob, there.get(blob.path), []) for blob in place.blobs if blob.path not in known]
    return CheckpointPlan(place.path, metadata, place.metadata, sorted(files, key=lambda file: file.source.path))


def _items(where: str, folder: str, stored: Stored) -> dict[str, list[StoredItem]]:
    """The items that a metadata blob names, by the blob that they lie in, below the end's place."""
    metadata = load_metadata(stored.data, where)
    check_metadata(metadata, where)
    found: dict[str, list[StoredItem]] = {}
    for info in metadata.storage_data.values():
        item = stored_item(info)
        found.setdefault(_join(folder, item.relative_path), []).append(item)
    return found


def _named(end: End, folder: str, standing: dict[int | None, Stored]) -> set[str]:
    """The data that is no longer needed once `standing` is replaced, as far as its metadata can be read."""
    named: set[str] = set()
    for rank, stored in standing.items():
        where = f"{_shown(end, folder)}/{metadata_name(rank)}"
        try:
            named |= _items(where, folder, stored).keys()
        except AzureCheckpointError as error:
            _log.warning("the data of the replaced checkpoint stays, for its metadata says too little: %s", error)
    return named


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _shown(end: End, folder: str) -> str:
    return _join(end.where, folder) if folder else end.where
