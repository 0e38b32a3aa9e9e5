"""`ListedCheckpoint`: a checkpoint as a listing alone shows it, complete or not, and the saves that wrote to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.dcp.blob_names import data_rank, is_metadata_name, is_save_id, metadata_rank
from azure_torch_ckpt.location import has_empty_segment

__all__ = ["ListedCheckpoint", "empty_save_folders", "group_by_checkpoint"]


@dataclass(slots=True)
class ListedCheckpoint:
    """The blobs of one checkpoint, complete or not.

    Attributes:
        path: of the checkpoint in the container; ``""`` is the root.
        blobs: all blobs below it that do not belong to a checkpoint further below.
        metadata: the metadata blobs among them, by rank; None for the metadata of all ranks.
        saves: the data blobs among them, by save id; the id of a save by torch's own writer is ``""``.
    """

    path: str
    blobs: list[BlobInfo] = field(default_factory=list)
    metadata: dict[int | None, BlobInfo] = field(default_factory=dict)
    saves: dict[str, list[BlobInfo]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether ``.metadata`` is there; or, of a save without collectives, the metadata of all ranks.

        Those are the ranks up to the highest one that has written a blob. A rank above it that has not begun yet is
        not visible.
        """
        if None in self.metadata:
            return True
        ranks = {rank for rank in self.metadata if rank is not None}
        seen = ranks | {data_rank(blob.path) for blobs in self.saves.values() for blob in blobs}
        return bool(ranks) and ranks == set(range(max(rank for rank in seen if rank is not None) + 1))


def group_by_checkpoint(blobs: Iterable[BlobInfo], prefix: str = "") -> list[ListedCheckpoint]:
    """Find the checkpoints among `blobs`, in the order of their paths.

    A checkpoint is where metadata or data blobs are named as `AzureBlobWriter` or torch's ``FileSystemWriter`` name
    them. Other blobs are left out, and so are those that no URL of a checkpoint leads to (``run//step-1``).

    Args:
        prefix: of all the blobs' paths; ends in "/" unless it is empty. Nothing above it is a checkpoint.
    """
    every = _without_folders([blob for blob in blobs if blob.path.startswith(prefix)])
    found: dict[str, ListedCheckpoint] = {}
    for blob in every:
        if has_empty_segment(blob.path):
            continue  # no URL of a checkpoint has such a path, and "run//.metadata" does not belong to "run"
        folder, _, name = blob.path.rpartition("/")
        if is_metadata_name(name):
            found.setdefault(folder, ListedCheckpoint(folder)).metadata[metadata_rank(name)] = blob
        elif data_rank(name) is not None:
            above, _, save_id = folder.rpartition("/")
            if not is_save_id(save_id) or len(folder) < len(prefix):
                above, save_id = folder, ""
            found.setdefault(above, ListedCheckpoint(above)).saves.setdefault(save_id, []).append(blob)
    owners: dict[str, ListedCheckpoint | None] = {}
    for blob in every:
        owner = _owner(blob.path.rpartition("/")[0], found, owners)
        if owner is not None:
            owner.blobs.append(blob)
    return [found[path] for path in sorted(found)]


def empty_save_folders(blobs: Iterable[BlobInfo]) -> list[BlobInfo]:
    """Find the empty directories of saves among `blobs`.

    A save that was killed leaves one in an account with a hierarchical namespace.
    """
    every = list(blobs)
    occupied = {blob.path.rpartition("/")[0] for blob in every}
    return [
        blob
        for blob in every
        if blob.is_folder and blob.path not in occupied and is_save_id(blob.path.rpartition("/")[2])
    ]


def _without_folders(blobs: list[BlobInfo]) -> list[BlobInfo]:
    """Leave out the blobs that stand for folders, and empty ones that other blobs lie below."""
    folders: set[str] = set()
    for blob in blobs:
        folder = blob.path.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return [blob for blob in blobs if blob.size or not (blob.is_folder or blob.path in folders)]


def _owner(
    folder: str, found: dict[str, ListedCheckpoint], known: dict[str, ListedCheckpoint | None]
) -> ListedCheckpoint | None:
    """The checkpoint that `folder` belongs to: at the folder itself, or the nearest one above."""
    passed = []
    while folder not in known:
        passed.append(folder)
        if folder in found or not folder:
            known[folder] = found.get(folder)
            break
        folder = folder.rpartition("/")[0]
    for each in passed:
        known[each] = known[folder]
    return known[folder]
