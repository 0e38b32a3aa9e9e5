"""`list_checkpoints` and `latest`: which checkpoints lie below a URL, from its listing alone."""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.listed_checkpoint import ListedCheckpoint, group_by_checkpoint
from azure_torch_ckpt.errors import CheckpointNotFoundError, LocationError
from azure_torch_ckpt.huggingface.leftovers import mixed_folders
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["CheckpointEntry", "age_key", "entries_of", "latest", "list_checkpoints", "newest", "step_of"]

_log = logging.getLogger(__name__)

_STEP = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt)[-_=.]?(\d+)", re.IGNORECASE)
_ONE_NUMBER = re.compile(r"\D*(\d+)")


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One checkpoint, as far as a listing tells.

    Attributes:
        url: its place, without a SAS.
        name: its path below the URL that was listed; ``""`` for that URL itself.
        step: the training step that the last part of its path tells, or None.
        size: bytes of all its blobs, also of a save that is still running or failed.
        blobs: their number.
        modified: when it was completed; of an incomplete one, when its newest blob was written. With time zone.
        complete: whether its metadata is there. Whether every blob that the metadata names is there as well, `verify`
            tells.
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
        """The name of the run: `name` without its last part."""
        return self.name.rpartition("/")[0]


def list_checkpoints(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> list[CheckpointEntry]:
    """Every checkpoint at or below a URL, incomplete ones too, with one request for every 5,000 blobs.

    https://learn.microsoft.com/rest/api/storageservices/list-blobs. Nothing but the listing is read: a checkpoint
    counts as complete when its ``.metadata`` is there (of a save with ``use_collectives=False``: the metadata of each
    rank that left anything), also if somebody has deleted data that it names; `verify` would notice. While a complete
    checkpoint is being replaced it stays complete, and the blobs of the running save are counted with it.

    Models in the layout of Hugging Face are not listed. A warning in the log names folders with files of several saves
    of one, or of one save without an index: a save is running there, or has died.

    Returns:
        In the order of parent folder, step (as a number), name; those without a step come last.

    Raises:
        LocationError: the URL names a snapshot or a version.
        StoreError: the service could not be asked.
    """
    location = BlobLocation.parse(url)
    if location.snapshot is not None or location.version_id is not None:
        raise LocationError(f"{location} is one blob at one moment; nothing lies below it. Leave the query away")
    store = BlobStore(location, Access(credential, options, ca_file))
    listed = list(store.list(location.prefix))
    for folder in mixed_folders(listed):
        root = location.container_root()
        _log.warning(
            "%s holds files of more than one save of a model, or of one without an index: a save is running there, or "
            "has died. Readers that list files (vLLM, SGLang) would load them all. The next save there tidies up, and "
            "so does prune",
            root.join(folder) if folder else root,
        )
    return [entry for entry, _ in entries_of(location, listed)]


def latest(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> CheckpointEntry:
    """The newest complete checkpoint at or below a URL.

    If all complete ones have a step, it is the one with the highest step, compared as a number (and of several the one
    that was completed last); else the one that was completed last.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint; the message says what is there.
        StoreError: the service could not be asked.
    """
    entries = list_checkpoints(url, credential=credential, options=options, ca_file=ca_file)
    complete = [entry for entry in entries if entry.complete]
    if complete:
        return newest(complete)
    where = BlobLocation.parse(url)
    raise CheckpointNotFoundError(f"No complete checkpoint at or below {where}. {_instead(entries)}")


def newest(entries: Sequence[CheckpointEntry]) -> CheckpointEntry:
    """The newest of some entries, as `latest` means it."""
    return max(entries, key=age_key(entries))


def age_key(entries: Sequence[CheckpointEntry]) -> Callable[[CheckpointEntry], tuple[int, datetime.datetime, int]]:
    """What the age of these entries goes by: their steps if all have one, else when they were completed."""
    by_step = all(entry.step is not None for entry in entries)

    def key(entry: CheckpointEntry) -> tuple[int, datetime.datetime, int]:
        step = -1 if entry.step is None else entry.step
        return (step if by_step else 0), entry.modified, step  # the service's times are those of a second

    return key


def entries_of(location: BlobLocation, blobs: Iterable[BlobInfo]) -> list[tuple[CheckpointEntry, ListedCheckpoint]]:
    """The checkpoints among `blobs`, which lie below `location`, in the order of `list_checkpoints`."""
    prefix = location.prefix
    found = []
    for place in group_by_checkpoint(blobs, prefix):
        name = place.path[len(prefix) :]
        try:
            url = str(location.join(name) if name else location)
        except LocationError as error:  # a name with "//", say, which nobody could load from
            _log.debug("left out of the listing: %s", error)
            continue
        found.append((_entry(place, url, name, name or location.name), place))
    return sorted(found, key=lambda pair: _order(pair[0]))


def step_of(name: str) -> int | None:
    """The step that the last part of a checkpoint's name tells, or None.

    It is the number behind the last ``step``, ``iter``, ``iteration``, ``checkpoint`` or ``ckpt`` (``step-1000``,
    ``epoch=3-step=1000``, ``global_step1000``), else the only number of the name, if it stands at its end (``1000``,
    ``epoch=3``).
    """
    last = name.rpartition("/")[2]
    steps = _STEP.findall(last)
    if steps:
        return int(steps[-1])
    only = _ONE_NUMBER.fullmatch(last)
    return None if only is None else int(only[1])


def _entry(place: ListedCheckpoint, url: str, name: str, tells: str) -> CheckpointEntry:
    complete = place.complete
    dated: Iterable[BlobInfo] = place.blobs
    if complete:
        dated = [place.metadata[None]] if None in place.metadata else place.metadata.values()
    return CheckpointEntry(
        url=url,
        name=name,
        step=step_of(tells),
        size=sum(blob.size for blob in place.blobs),
        blobs=len(place.blobs),
        modified=max(blob.last_modified for blob in dated),
        complete=complete,
    )


def _order(entry: CheckpointEntry) -> tuple[Any, ...]:
    last = entry.name.rpartition("/")[2]
    # The URL itself has its parent folder above all others.
    return entry.name != "", _natural(entry.folder), entry.step is None, entry.step or 0, _natural(last)


def _natural(text: str) -> list[tuple[str, int]]:
    """A sort key by which run-9 comes before run-10."""
    parts = re.split(r"(\d+)", text)
    words, numbers = parts[::2], parts[1::2]
    return [(word, int(number)) for word, number in zip(words, [*numbers, "-1"], strict=True)]


def _instead(entries: Sequence[CheckpointEntry]) -> str:
    if not entries:
        return "No save has left anything there; check the URL"
    what = "an incomplete save" if len(entries) == 1 else f"{len(entries)} incomplete saves"
    names = ", ".join(entry.name or "the URL itself" for entry in entries[:3])
    more = ", ..." if len(entries) > 3 else ""
    return f"What is there: {what} ({names}{more}). They are still running or have failed; look above this URL"
