"""What the blobs of a checkpoint are called, below the checkpoint's URL: their names are made and parsed here.

    .metadata                        metadata of all ranks; the checkpoint is complete exactly when this blob exists
    __<rank>.metadata                metadata of one rank, of a save with use_collectives=False
    <save id>/__<rank>_0.distcp      data of one rank in one save

A save id is new for every save, so a save never touches a byte of the one before. torch's ``FileSystemWriter`` names
its blobs the same, but without a save id.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.dcp.save_group import SaveGroup, complete_ranks
from azure_torch_ckpt.location import has_empty_segment

__all__ = [
    "ListedCheckpoint",
    "data_name",
    "data_rank",
    "empty_save_folders",
    "group_by_checkpoint",
    "is_metadata_name",
    "is_save_id",
    "metadata_name",
    "metadata_rank",
    "new_save_id",
]

_DATA = re.compile(r"__(\d+)_\d+\.distcp")
_METADATA = re.compile(r"\.metadata|__(\d+)\.metadata")
_SAVE_ID = re.compile(r"[0-9a-f]{32}")


def new_save_id() -> str:
    return uuid.uuid4().hex


def is_save_id(folder: str) -> bool:
    """Whether the name of a folder is a save id."""
    return _SAVE_ID.fullmatch(folder) is not None


def metadata_name(rank: int | None = None) -> str:
    """The name of the metadata blob of all ranks, or of one."""
    return ".metadata" if rank is None else f"__{rank}.metadata"


def is_metadata_name(name: str) -> bool:
    """Whether a blob with this name, in whatever folder, is a metadata blob."""
    return _METADATA.fullmatch(name) is not None


def metadata_rank(name: str) -> int | None:
    """The rank that wrote the metadata blob `name`; None for the metadata of all ranks."""
    match = _METADATA.fullmatch(name)
    return int(match[1]) if match is not None and match[1] else None


def data_name(save_id: str, rank: int) -> str:
    """The name of the data blob of one rank in one save."""
    return f"{save_id}/__{rank}_0.distcp"


def data_rank(path: str) -> int | None:
    """The rank that wrote the data blob at `path`; None if the name is not a data blob's."""
    match = _DATA.fullmatch(path.rpartition("/")[2])
    return None if match is None else int(match[1])


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
        """Whether ``.metadata`` is there; or, of a save without collectives, the metadata of all ranks."""
        return bool(self.committed)

    @property
    def committed(self) -> dict[int | None, BlobInfo]:
        """The metadata blobs that make the checkpoint complete, by rank; empty if it is not.

        After a save without collectives, each blob says which save it is of and how many ranks saved. Blobs that do not
        (of earlier versions, of torch's own writer, or back from a disk) are complete if all ranks have one up to the
        highest one that has written a blob. A rank above it that has not begun yet is not visible then.
        """
        if None in self.metadata:
            return {None: self.metadata[None]}
        by_rank = {rank: blob for rank, blob in self.metadata.items() if rank is not None}
        ranks = complete_ranks({rank: SaveGroup.of_blob(blob.metadata) for rank, blob in by_rank.items()})
        if ranks is None:
            seen = by_rank.keys() | {data_rank(blob.path) for blobs in self.saves.values() for blob in blobs}
            every = set(range(max((rank for rank in seen if rank is not None), default=-1) + 1))
            ranks = sorted(every) if by_rank.keys() == every else []
        return {rank: by_rank[rank] for rank in ranks}


def group_by_checkpoint(blobs: Iterable[BlobInfo], prefix: str = "") -> list[ListedCheckpoint]:
    """Find the checkpoints among `blobs`, in the order of their paths.

    A checkpoint is where metadata or data blobs are named as `AzureBlobWriter` or torch's ``FileSystemWriter`` name
    them. Other blobs are left out, and so are those that no URL of a checkpoint leads to (``run//step-1``), and what
    lies above `prefix`, which begins all paths and ends in "/" unless it is empty.
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
    """The empty directories of saves: a killed one leaves such in an account with a hierarchical namespace."""
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
