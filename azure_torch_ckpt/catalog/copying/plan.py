"""`plan_copy`: which checkpoints and files to copy, and what the destination has already."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field

from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt._internal.checksums import combine
from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.catalog.copying.trees import Tree, join_name
from azure_torch_ckpt.dcp.blob_names import ListedCheckpoint, group_by_checkpoint, metadata_name
from azure_torch_ckpt.dcp.metadata.front import open_metadata
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, stored_item
from azure_torch_ckpt.dcp.metadata_blob import MetadataBlob
from azure_torch_ckpt.dcp.save_group import SaveGroup, complete_ranks
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
)
from azure_torch_ckpt.options import TransferOptions

__all__ = ["CheckpointPlan", "FilePlan", "plan_copy"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One blob or file to copy.

    Attributes:
        existing: blob or file of this name at the destination, or None.
        items: the checkpoint's items in this blob or file, in the order of their offsets.
    """

    source: BlobInfo
    existing: BlobInfo | None
    items: list[StoredItem]

    @property
    def crc64(self) -> int | None:
        """CRC64-NVME of the whole, if the checksums of the items cover it without a gap; else None."""
        crc = end = 0
        for item in self.items:
            if item.crc64 is None or item.offset != end:
                return None
            crc = combine(crc, item.crc64, item.length)
            end += item.length
        return crc if end == self.source.size and end else None


@dataclass(slots=True)
class CheckpointPlan:
    """One checkpoint to copy, with its metadata by rank; None is the rank of metadata for all ranks.

    Attributes:
        name: its folder, relative to the source and to the destination.
        files: all other blobs or files.
        marks: what the blobs of the metadata must carry, by rank: a source on a disk has lost it.
        replaced: metadata at the destination that this copy replaces, by rank.
        outdated: names of data that only the replaced metadata refers to.
    """

    name: str
    metadata: dict[int | None, MetadataBlob]
    metadata_infos: dict[int | None, BlobInfo]
    files: list[FilePlan]
    marks: dict[int | None, dict[str, str]]
    replaced: dict[int | None, MetadataBlob] = field(default_factory=dict)
    outdated: set[str] = field(default_factory=set)

    @property
    def is_committed(self) -> bool:
        """Whether the destination has exactly this metadata already."""
        return {rank: stored.data for rank, stored in self.metadata.items()} == {
            rank: stored.data for rank, stored in self.replaced.items()
        }


def plan_copy(source: Tree, destination: Tree, options: TransferOptions, *, overwrite: bool) -> list[CheckpointPlan]:
    """Compare source and destination, with one listing of each and a request for each metadata blob, in parallel.

    Raises:
        CheckpointNotFoundError: the source has no complete checkpoint.
        CheckpointExistsError: the destination has another checkpoint, and `overwrite` is False.
        CorruptCheckpointError: data that a checkpoint names is missing or short, or its metadata is damaged.
        CheckpointError, StoreError: the metadata cannot be read.
    """
    source_infos = {info.path: info for info in source.infos()}
    listed = group_by_checkpoint(source_infos.values())
    complete = [checkpoint for checkpoint in listed if checkpoint.complete]
    existing = {info.path: info for info in _destination_infos(destination, overwrite)}
    existing_checkpoints = {checkpoint.path: checkpoint for checkpoint in group_by_checkpoint(existing.values())}
    plans: dict[str, CheckpointPlan] = {}

    def plan_one(checkpoint: ListedCheckpoint) -> None:
        plan = _plan(source, checkpoint, source_infos, existing)
        if plan is None:
            return
        plans[checkpoint.path] = plan
        replaced = existing_checkpoints.get(checkpoint.path)
        for rank in replaced.metadata if replaced is not None else ():
            stored = destination.read_metadata(checkpoint.path, rank)
            if stored is not None:
                plan.replaced[rank] = stored
        if not plan.replaced or plan.is_committed:
            return
        if not overwrite:
            raise CheckpointExistsError(
                f"Another checkpoint exists at {_label(destination, checkpoint.path)}. Nothing was copied; choose "
                "another destination, or replace it with overwrite=True"
            )
        plan.outdated = _data_names(destination, checkpoint.path, plan.replaced) - {
            file.source.path for file in plan.files
        }

    run_all((functools.partial(plan_one, checkpoint) for checkpoint in complete), options.concurrency, "blob-copy")
    for checkpoint in listed:
        if checkpoint.path not in plans:
            _log.warning("%s is not copied: it is an incomplete save", _label(source, checkpoint.path))
    if not plans:
        raise CheckpointNotFoundError(
            f"No complete checkpoint at or below {source}. "
            + (f"It has {len(listed)} incomplete saves" if listed else "No save has left anything there; check it")
        )
    return [plans[checkpoint.path] for checkpoint in complete if checkpoint.path in plans]


def _destination_infos(destination: Tree, overwrite: bool) -> list[BlobInfo]:
    """List the destination; return nothing for a write-only credential, which is enough for a new checkpoint."""
    try:
        return destination.infos()
    except AccessDeniedError as error:
        if overwrite:
            raise AccessDeniedError(
                f"To replace a checkpoint at {destination}, the credential must allow reading and listing. Without "
                "overwrite=True, write permission is enough"
            ) from error
        destination.readable = False
        _log.info("%s cannot be listed: the copy includes every blob, and replaces none", destination)
        return []


def _plan(
    source: Tree, checkpoint: ListedCheckpoint, source_infos: dict[str, BlobInfo], existing: dict[str, BlobInfo]
) -> CheckpointPlan | None:
    """Plan the copy of a checkpoint; None if its metadata says that it is not complete, which a disk does not show."""
    label = _label(source, checkpoint.path)
    metadata: dict[int | None, MetadataBlob] = {}
    groups: dict[int, SaveGroup | None] = {}
    items_of: dict[int | None, dict[str, list[StoredItem]]] = {}
    for rank, listed in checkpoint.committed.items():
        stored = source.read_metadata(checkpoint.path, rank)
        if stored is None or stored.etag != listed.etag:
            raise CheckpointReplacedError(f"{label} was replaced or removed while it was being copied. Copy again")
        metadata[rank] = stored
        loaded = open_metadata(stored.data, f"{label}/{metadata_name(rank)}")
        items_of[rank] = _items_by_name(loaded, checkpoint.path)
        if rank is not None:
            groups[rank] = SaveGroup.of(loaded)
    ranks = complete_ranks(groups)
    if ranks is not None:
        metadata = {rank: metadata[rank] for rank in ranks}
    if not metadata:
        return None
    items: dict[str, list[StoredItem]] = {}
    for rank in metadata:
        for name, of_rank in items_of[rank].items():
            items.setdefault(name, []).extend(of_rank)
    files = []
    for name, in_file in items.items():
        needed = max(item.offset + item.length for item in in_file)
        info = source_infos.get(name)
        if info is None or info.size < needed:
            size = "missing" if info is None else f"only {info.size} bytes long where {needed} are needed"
            raise CorruptCheckpointError(f"{name} of {source} is {size}. Nothing was copied; use another checkpoint")
        files.append(FilePlan(info, existing.get(name), sorted(in_file, key=lambda item: item.offset)))
    # Other files of the checkpoint, such as a framework's own, but neither metadata nor the data of other saves.
    known = {blob.path for blobs in checkpoint.saves.values() for blob in blobs} | items.keys()
    known |= {blob.path for blob in checkpoint.metadata.values()} | {join_name(checkpoint.path, ".metadata.tmp")}
    files += [FilePlan(blob, existing.get(blob.path), []) for blob in checkpoint.blobs if blob.path not in known]
    marks: dict[int | None, dict[str, str]] = {rank: group.marks() for rank, group in groups.items() if group}
    return CheckpointPlan(
        checkpoint.path, metadata, checkpoint.metadata, sorted(files, key=lambda file: file.source.path), marks
    )


def _items_by_name(metadata: Metadata, folder: str) -> dict[str, list[StoredItem]]:
    """Return the items that metadata describes, by the name in the tree of the blob or file that holds them."""
    items: dict[str, list[StoredItem]] = {}
    for info in metadata.storage_data.values():
        item = stored_item(info)
        items.setdefault(join_name(folder, item.relative_path), []).append(item)
    return items


def _data_names(tree: Tree, folder: str, metadata: dict[int | None, MetadataBlob]) -> set[str]:
    """Return the names of the data that `metadata` refers to, as far as it can be read."""
    names: set[str] = set()
    for rank, stored in metadata.items():
        label = f"{_label(tree, folder)}/{metadata_name(rank)}"
        try:
            names |= _items_by_name(open_metadata(stored.data, label), folder).keys()
        except AzureCheckpointError as error:
            _log.warning("the data of the replaced checkpoint stays, because its metadata cannot be read: %s", error)
    return names


def _label(tree: Tree, folder: str) -> str:
    return join_name(str(tree), folder) if folder else str(tree)
