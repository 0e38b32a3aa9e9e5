"""`RankMetadata`: what one rank of a load sees of a save with ``use_collectives=False``.

Mostly the ranks that load are those that saved, with the same sharding, and each needs its own metadata only. So a rank
begins with that if it can, and reads that of the other ranks once it needs something that its own does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.merging import merge_metadata
from azure_torch_ckpt.dcp.open_checkpoint import OpenMetadata, listed_checkpoint, read_metadata, read_whole_group
from azure_torch_ckpt.dcp.save_group import SaveGroup
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["RankMetadata", "read_rank_metadata"]


class RankMetadata:
    """The metadata of a rank, or of all ranks in one; `read_rank_metadata` makes it.

    Of what several ranks have stored (replicated tensors, objects), the rank's own copy counts if it has one, else that
    of the lowest rank.

    Attributes:
        metadata: for the planner. Before `merge`, iterating over its ``state_dict_metadata`` shows the rank's own
            entries; a look-up of another key calls `merge`.
        etags: of the metadata blobs that were read, by name.
        is_merged: whether it is of all ranks.
        was_extended: whether that is so because of `merge`, so that a plan from before may name other chunks.
    """

    def __init__(self, store: BlobStore, location: BlobLocation, parts: list[OpenMetadata], *, is_merged: bool) -> None:
        self._store = store
        self._location = location
        self._own = parts[0]
        self.is_merged = is_merged
        self.was_extended = False
        self.etags: dict[str, str] = {}
        self.metadata = self._merged(parts)
        if not is_merged:
            self._entries = _OwnEntries(self.metadata.state_dict_metadata, self.merge)
            self.metadata.state_dict_metadata = self._entries

    def merge(self) -> None:
        """Add what the other ranks saved to `metadata`, in place. Raises as `read_whole_group`."""
        if self.is_merged:
            return
        parts = read_whole_group(self._store, self._location, self._own)
        merged = self._merged(_with_first(self._own, parts))
        self.is_merged = self.was_extended = True
        self._entries.complete(merged.state_dict_metadata)
        self.metadata.storage_data = merged.storage_data

    def _merged(self, parts: list[OpenMetadata]) -> Metadata:
        self.etags |= {metadata_name(part.rank): part.stored.etag for part in parts}
        return merge_metadata([part.metadata for part in parts], str(self._location), own_values=True)


def read_rank_metadata(store: BlobStore, location: BlobLocation, rank: int) -> RankMetadata | None:
    """Read the metadata of a save without collectives for `rank`: its own, and that of the others where it must.

    It begins with its own alone if the job has as many ranks as saved, and rank 0's metadata is of the same save:
    otherwise an older save was replaced by fewer ranks, or only in part.

    Returns:
        None if neither this rank nor rank 0 has metadata.

    Raises:
        as `read_whole_group`.
    """
    own = next(iter(read_metadata(store, location, [rank])), None)
    if own is not None and _may_begin_alone(store, location, own):
        return RankMetadata(store, location, [own], is_merged=False)
    first = own if rank == 0 else next(iter(read_metadata(store, location, [0])), own)
    if first is None:
        return None
    parts = read_whole_group(store, location, first)
    if own is not None and any(part.rank == rank for part in parts):
        parts = _with_first(own, parts)
    return RankMetadata(store, location, parts, is_merged=True)


def _may_begin_alone(store: BlobStore, location: BlobLocation, own: OpenMetadata) -> bool:
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    group = own.group
    if group is None:
        try:
            committed = listed_checkpoint(store, location).committed
        except AccessDeniedError:  # what this rank needs may be all here
            return True
        return own.rank in committed and len(committed) == ranks
    # Part of a job's ranks cannot be merged, but each can load what it saved.
    if group.ranks not in (None, ranks):
        return False
    if own.rank == 0:
        return True
    try:
        first = SaveGroup.of_blob(store.stat(location.join(metadata_name(0)).path).metadata)
    except BlobNotFoundError:
        return False
    if first is None:  # a copy from a disk, or of an earlier version
        first = next((part.group for part in read_metadata(store, location, [0])), None)
    return first is not None and first.id == group.id


def _with_first(own: OpenMetadata, parts: list[OpenMetadata]) -> list[OpenMetadata]:
    return [own, *(part for part in parts if part.rank != own.rank)]


class _OwnEntries(dict[str, Any]):
    """The entries of one rank; a look-up of a key that it does not have finds those of the others."""

    def __init__(self, entries: dict[str, Any], merge: Callable[[], None]) -> None:
        super().__init__(entries)
        self._merge = merge
        self._others: dict[str, Any] = {}

    def complete(self, merged: dict[str, Any]) -> None:
        """Take the entries of all ranks: own tensors get the chunks that other ranks have of them."""
        self._others = dict(merged)  # of a single rank, it is this mapping
        self.update((key, merged[key]) for key in self)

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        self._merge()
        return key in self._others

    def __missing__(self, key: str) -> Any:
        self._merge()
        return self._others[key]

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # a copy reads nothing more, and has no credential
