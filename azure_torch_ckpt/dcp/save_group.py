"""`SaveGroup`: which save with ``use_collectives=False`` a rank's metadata belongs to, and how many ranks saved.

Without collectives nobody sees all ranks of a save. So each rank's metadata says which save it is of, in its
``StorageMeta`` and, for listings, in the metadata of its blob. The ranks agree on the save's id through the store of
the process group, where none waits for another. The id is a nonce that the first rank to come left there, and the
number of the save among those that the job has begun at the URL. torch ends such a save with a barrier, so no rank
begins the next one before all have begun this one, and a rank that would count less than another has missed a save: an
error ended it before its writer was asked. Then it takes the other's number.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt._internal.torch_private import get_default_store
from azure_torch_ckpt.errors import CheckpointError, CommitConflictError

__all__ = ["SaveGroup", "begin_group", "complete_ranks", "raise_if_overtaken"]

_ID = "save_group"
_RANKS = "ranks"
_STORE_PREFIX = "azure_torch_ckpt"
_COUNT = re.compile(r"[0-9]{1,9}")

# By process, nonce and URL: the number of the last save. Not in the writer, since a job may make one for each save.
_begun: dict[tuple[int, str, str], int] = {}


@dataclass(frozen=True, slots=True)
class SaveGroup:
    """A save with ``use_collectives=False``.

    Attributes:
        id: equal on all ranks of the save, and different from that of every other save.
        ranks: how many ranks saved. None: part of a job's ranks did (``process_group=``, ``no_dist=True``), and torch
            does not tell a writer how many.
    """

    id: str
    ranks: int | None

    @classmethod
    def of(cls, metadata: Metadata) -> SaveGroup | None:
        """The save that metadata belongs to; None if it has no group: of another writer, or of an earlier version."""
        meta = metadata.storage_meta
        name, ranks = getattr(meta, _ID, None), getattr(meta, _RANKS, None)
        if type(name) is not str:
            return None
        return cls(name, ranks if type(ranks) is int and ranks > 0 else None)

    @classmethod
    def of_blob(cls, marks: Mapping[str, str] | None) -> SaveGroup | None:
        """The same, from what was stored with the blob of the metadata (`BlobInfo.metadata`)."""
        if not marks or _ID not in marks:
            return None
        ranks = marks.get(_RANKS, "")
        return cls(marks[_ID], int(ranks) or None if _COUNT.fullmatch(ranks) else None)

    def marks(self) -> dict[str, str]:
        """What is stored with the blob of the metadata."""
        return {_ID: self.id} | ({} if self.ranks is None else {_RANKS: str(self.ranks)})


def begin_group(url: str, rank: int | None) -> SaveGroup | None:
    """Take part in a save without collectives to `url`. Every rank calls this once for each of its saves.

    Args:
        rank: what torch calls this rank in the group that saves.

    Returns:
        None if nothing connects the ranks: no process group and more than one rank, or a process group without a store.

    Raises:
        CheckpointError: the store of the process group could not be asked.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None if rank else SaveGroup(uuid.uuid4().hex, 1)
    store = get_default_store()
    if store is None:  # MPI has none
        return None
    try:
        nonce = store.compare_set(f"{_STORE_PREFIX}/nonce", "", uuid.uuid4().hex).decode()
        here = os.getpid(), nonce, url
        number = _latest_number(store, url, _begun.get(here, 0) + 1)
    except Exception as error:  # each store has errors of its own
        raise CheckpointError(
            f"The ranks could not agree on an id for this save to {url}, because the store of the process group did "
            f"not answer ({error}). Save with collectives, or start the job again"
        ) from error
    _begun[here] = number
    # Within another group than that of all ranks, a rank mostly has another number. Its size is not visible here.
    return SaveGroup(f"{nonce}-{number}", dist.get_world_size() if rank == dist.get_rank() else None)


def raise_if_overtaken(url: str, group: SaveGroup) -> None:
    """Raise `CommitConflictError` if another rank has begun a later save to `url`.

    Then the metadata of this rank would be taken for that of a save which it had no part in.
    """
    number = group.id.rpartition("-")[2]
    store = get_default_store() if dist.is_available() and dist.is_initialized() else None
    if store is None or not _COUNT.fullmatch(number):
        return
    try:
        latest = _latest_number(store, url, int(number))
    except Exception:  # as the save will end: in torch's barrier
        return
    if latest > int(number):
        raise CommitConflictError(
            f"Another rank has begun the next save with use_collectives=False to {url} before this one was done, so "
            "this one was dropped on this rank. Wait for a save before the next one to the same URL, or give each a "
            "URL of its own; after an error on one rank only, save again"
        )


def _latest_number(store: Any, url: str, number: int) -> int:
    """Announce the number of a save to `url`; return the highest one that a rank has announced."""
    key = f"{_STORE_PREFIX}/{hashlib.sha256(url.encode()).hexdigest()[:32]}"
    latest = int(store.compare_set(key, "", str(number)))
    while latest < number:
        latest = int(store.compare_set(key, str(latest), str(number)))
    return latest


def complete_ranks(groups: Mapping[int, SaveGroup | None]) -> list[int] | None:
    """Find the ranks that make up a complete save, from the groups of all rank's metadata at a URL.

    Rank 0 takes part in every save, so its group is the one that counts. Ranks above those of its save may have
    metadata of an older save by more ranks, which readers ignore.

    Returns:
        Empty if the save is not complete: metadata is missing or of another save, or the number of ranks is unknown.
        None if no metadata has a group.
    """
    if not any(groups.values()):
        return None
    first = groups.get(0)
    if first is None or first.ranks is None or first.ranks > len(groups):
        return []
    ranks = list(range(first.ranks))
    return ranks if all(groups.get(rank) == first for rank in ranks) else []
