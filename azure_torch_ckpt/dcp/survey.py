"""What lies below a URL, from its listing alone: checkpoints, the saves that wrote to them, and everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.store import BlobInfo
from azure_torch_ckpt.dcp.blob_names import data_rank, is_metadata_name, is_save_id, metadata_rank
from azure_torch_ckpt.location import has_empty_segment

__all__ = ["Place", "empty_save_folders", "survey"]


@dataclass(slots=True)
class Place:
    """A checkpoint's place, complete or not.

    Attributes:
        path: in the container; ``""`` is its root.
        blobs: all blobs below it that belong to no checkpoint further below.
        metadata: those of them that are metadata: of all ranks (None), or of one.
        saves: those of them that are data, by save id; the id of a save by torch's own writer is ``""``.
    """

    path: str
    blobs: list[BlobInfo] = field(default_factory=list)
    metadata: dict[int | None, BlobInfo] = field(default_factory=dict)
    saves: dict[str, list[BlobInfo]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether ``.metadata`` is there; or, of a save without collectives, the metadata of all ranks.

        Those are the ranks up to the highest one that left anything. A rank above it that has not begun yet leaves
        nothing to tell from.
        """
        if None in self.metadata:
            return True
        ranks = {rank for rank in self.metadata if rank is not None}
        seen = ranks | {data_rank(blob.path) for blobs in self.saves.values() for blob in blobs}
        return bool(ranks) and ranks == set(range(max(rank for rank in seen if rank is not None) + 1))


def survey(blobs: Iterable[BlobInfo], prefix: str = "") -> list[Place]:
    """The places of checkpoints among `blobs`, in the order of their paths.

    A place is where metadata or data blobs lie that are named as `AzureBlobWriter` or torch's ``FileSystemWriter`` name
    them. What lies elsewhere is left out, and so is what no URL of a checkpoint leads to (``run//step-1``).

    Args:
        prefix: of all the blobs' paths; ends in "/" unless it is empty. Nothing above it is a place.
    """
    every = _without_folders([blob for blob in blobs if blob.path.startswith(prefix)])
    places: dict[str, Place] = {}
    for blob in every:
        if has_empty_segment(blob.path):
            continue  # no URL of a checkpoint has such a path, and "run//.metadata" is not that of "run"
        folder, _, name = blob.path.rpartition("/")
        if is_metadata_name(name):
            places.setdefault(folder, Place(folder)).metadata[metadata_rank(name)] = blob
        elif data_rank(name) is not None:
            above, _, save_id = folder.rpartition("/")
            if not is_save_id(save_id) or len(folder) < len(prefix):
                above, save_id = folder, ""
            places.setdefault(above, Place(above)).saves.setdefault(save_id, []).append(blob)
    owners: dict[str, Place | None] = {}
    for blob in every:
        owner = _owner(blob.path.rpartition("/")[0], places, owners)
        if owner is not None:
            owner.blobs.append(blob)
    return [places[path] for path in sorted(places)]


def empty_save_folders(blobs: Iterable[BlobInfo]) -> list[BlobInfo]:
    """The directories among `blobs` of saves that have stored nothing, or nothing that is left.

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


def _owner(folder: str, places: dict[str, Place], known: dict[str, Place | None]) -> Place | None:
    """The place that `folder` belongs to: itself, or the nearest one above."""
    passed = []
    while folder not in known:
        passed.append(folder)
        if folder in places or not folder:
            known[folder] = places.get(folder)
            break
        folder = folder.rpartition("/")[0]
    for each in passed:
        known[each] = known[folder]
    return known[folder]
