"""`list_checkpoints` and `latest`: the checkpoints below a URL, found from a listing of the blobs."""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.blob_names import ListedCheckpoint, group_by_checkpoint
from azure_torch_ckpt.errors import CheckpointNotFoundError, LocationError
from azure_torch_ckpt.huggingface.leftovers import folders_of_mixed_saves
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["CheckpointEntry", "age_key", "entries_of", "latest", "list_checkpoints", "newest", "step_of"]

_log = logging.getLogger(__name__)

_STEP = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt)[-_=.]?(\d+)", re.IGNORECASE)
_ONE_NUMBER = re.compile(r"\D*(\d+)")


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One checkpoint, as a listing describes it.

    Attributes:
        url: URL without a SAS.
        name: path relative to the URL that was listed; ``""`` for that URL itself.
        step: training step in the last part of the path, or None.
        size: bytes of all blobs, including those of a save that is running or has failed.
        blobs: number of blobs.
        modified: time of completion, or for an incomplete checkpoint the time of its newest blob. With time zone.
        complete: whether the metadata exists. `verify` checks the blobs that the metadata names.
    """

    url: str
    name: str
    step: int | None
    size: int
    blobs: int
    modified: datetime.datetime
    complete: bool

    @property
    def folder(self) -> str:
        """Name of the run: `name` without its last part."""
        return self.name.rpartition("/")[0]


def list_checkpoints(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> list[CheckpointEntry]:
    """List the checkpoints at or below a URL, including incomplete ones.

    The cost is one request for every 5,000 blobs (https://learn.microsoft.com/rest/api/storageservices/list-blobs). A
    checkpoint is complete if its ``.metadata`` exists; after a save with ``use_collectives=False``, if the metadata of
    all ranks exists and is of one save. If only the ranks of a ``process_group=`` made such a save, their number is
    unknown, and it is not complete. Nothing else is checked: `verify` finds missing data. While a complete checkpoint
    is being replaced it stays complete, unless the new save is one with ``use_collectives=False``. Its size includes
    the blobs of the running save.

    Models in the HuggingFace layout are not listed. A warning in the log names folders with model files of several
    saves, or of one save without an index: a save is running there, or was killed.

    Returns:
        Checkpoints in the order of parent folder, step (as a number) and name; those without a step come last.

    Raises:
        LocationError: the URL names a snapshot or a version.
        StoreError: a request failed.
    """
    location = BlobLocation.parse(url)
    if location.snapshot is not None or location.version_id is not None:
        raise LocationError(f"{location} is one blob at one moment, not a folder. Omit the query of the URL")
    store = BlobStore(location, Access(credential, options, ca_file))
    blobs = list(store.list(location.prefix))
    for folder in folders_of_mixed_saves(blobs):
        root = location.container_root()
        _log.warning(
            "%s has files of several saves of a model, or of one without an index: a save is running there, or was "
            "killed. Readers that list files (vLLM, SGLang) would load them all. The next save there removes the "
            "leftovers, and so does prune",
            root.join(folder) if folder else root,
        )
    return [entry for entry, _ in entries_of(location, blobs)]


def latest(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> CheckpointEntry:
    """Find the newest complete checkpoint at or below a URL.

    If all complete checkpoints have a step, the newest is the one with the highest step, compared as a number; of
    several with that step, the one that was completed last. Otherwise the newest is the one that was completed last.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint; the message lists the incomplete ones.
        StoreError: a request failed.
    """
    entries = list_checkpoints(url, credential=credential, options=options, ca_file=ca_file)
    complete = [entry for entry in entries if entry.complete]
    if complete:
        return newest(complete)
    location = BlobLocation.parse(url)
    raise CheckpointNotFoundError(f"No complete checkpoint at or below {location}. {_describe_incomplete(entries)}")


def newest(entries: Sequence[CheckpointEntry]) -> CheckpointEntry:
    """Return the newest entry, compared as by `latest`."""
    return max(entries, key=age_key(entries))


def age_key(entries: Sequence[CheckpointEntry]) -> Callable[[CheckpointEntry], tuple[int, datetime.datetime, int]]:
    """Return a sort key for the age of these entries: their steps if all have one, else their times of completion."""
    by_step = all(entry.step is not None for entry in entries)

    def key(entry: CheckpointEntry) -> tuple[int, datetime.datetime, int]:
        step = -1 if entry.step is None else entry.step
        return (step if by_step else 0), entry.modified, step  # the service's times have a resolution of a second

    return key


def entries_of(location: BlobLocation, blobs: Iterable[BlobInfo]) -> list[tuple[CheckpointEntry, ListedCheckpoint]]:
    """Return the checkpoints among `blobs`, which are below `location`, in the order of `list_checkpoints`."""
    prefix = location.prefix
    entries = []
    for checkpoint in group_by_checkpoint(blobs, prefix):
        name = checkpoint.path[len(prefix) :]
        try:
            url = str(location.join(name) if name else location)
        except LocationError as error:  # no URL leads to a name with "//"
            _log.debug("left out of the listing: %s", error)
            continue
        entries.append((_entry(checkpoint, url, name, step_of(name or location.name)), checkpoint))
    return sorted(entries, key=lambda pair: _order(pair[0]))


def step_of(name: str) -> int | None:
    """Return the training step in the last part of a checkpoint's name, or None.

    The step is the number after the last ``step``, ``iter``, ``iteration``, ``checkpoint`` or ``ckpt`` (``step-1000``,
    ``epoch=3-step=1000``, ``global_step1000``), or else the only number, if the name ends with it (``1000``,
    ``epoch=3``).
    """
    last = name.rpartition("/")[2]
    steps = _STEP.findall(last)
    if steps:
        return int(steps[-1])
    only = _ONE_NUMBER.fullmatch(last)
    return None if only is None else int(only[1])


def _entry(checkpoint: ListedCheckpoint, url: str, name: str, step: int | None) -> CheckpointEntry:
    committed = checkpoint.committed
    dated: Iterable[BlobInfo] = committed.values() or checkpoint.blobs
    return CheckpointEntry(
        url=url,
        name=name,
        step=step,
        size=sum(blob.size for blob in checkpoint.blobs),
        blobs=len(checkpoint.blobs),
        modified=max(blob.last_modified for blob in dated),
        complete=bool(committed),
    )


def _order(entry: CheckpointEntry) -> tuple[Any, ...]:
    last = entry.name.rpartition("/")[2]
    # A checkpoint at the URL itself comes first.
    return entry.name != "", _natural(entry.folder), entry.step is None, entry.step or 0, _natural(last)


def _natural(text: str) -> list[tuple[str, int]]:
    """Return a sort key that puts run-9 before run-10."""
    parts = re.split(r"(\d+)", text)
    words, numbers = parts[::2], parts[1::2]
    return [(word, int(number)) for word, number in zip(words, [*numbers, "-1"], strict=True)]


def _describe_incomplete(entries: Sequence[CheckpointEntry]) -> str:
    if not entries:
        return "No save has left anything there; check the URL"
    saves = "1 incomplete save" if len(entries) == 1 else f"{len(entries)} incomplete saves"
    names = ", ".join(entry.name or "the URL itself" for entry in entries[:3])
    more = ", ..." if len(entries) > 3 else ""
    return f"There is only {saves} ({names}{more}), which may be running or have failed. Try the folder above"
