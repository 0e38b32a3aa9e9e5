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

__all__ = ["data_name", "data_rank", "is_metadata_name", "is_save_id", "metadata_name", "metadata_rank", "new_save_id"]

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
