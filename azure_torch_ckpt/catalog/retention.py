"""`prune`: removes the checkpoints that no rule keeps, and what failed saves left behind."""

from __future__ import annotations

import datetime
import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.catalog.listing import CheckpointEntry, age_key, entries_of
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.layout import delete_metadata, metadata_name, remove_blobs, remove_empty_folders
from azure_torch_ckpt.dcp.listed_checkpoint import ListedCheckpoint, empty_save_folders
from azure_torch_ckpt.dcp.open_checkpoint import read_metadata
from azure_torch_ckpt.dcp.removal import Remains, find_remains, place_location, remove_remains
from azure_torch_ckpt.errors import AzureCheckpointError, RequestRefusedError, ServiceUnavailableError
from azure_torch_ckpt.huggingface.leftovers import find_model_remains, has_saved_files
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["PruneReport", "Undeleted", "prune"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Undeleted:
    """Blobs that could not be deleted: they are leased or immutable, or the credential does not allow it.

    Attributes:
        url: of the checkpoint that they belong to, or belonged to.
        blobs: paths in the container.
        size: bytes of all of them.
        error: that the first of them met.
    """

    url: str
    blobs: list[str]
    size: int
    error: AzureCheckpointError


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What `prune` did, or would do.

    Attributes:
        removed: complete checkpoints, in the order of `list_checkpoints`.
        kept: all other complete checkpoints, and the incomplete ones of which something stays.
        remains: data blobs of failed saves, removed as well.
        undeleted: what was to be removed and cannot be deleted. A checkpoint whose metadata or data is leased is whole
            and in `kept`. Data that turned out to be undeletable is found among the `remains` by the next `prune`.
        freed: bytes of all that was removed.
    """

    removed: list[CheckpointEntry]
    kept: list[CheckpointEntry]
    remains: list[Remains]
    undeleted: list[Undeleted] = field(default_factory=list)
    freed: int = 0


@dataclass(frozen=True, slots=True)
class _Rules:
    keep_last: int | None
    keep_every: int | None
    oldest_to_keep: datetime.datetime | None

    def unwanted(self, run: Sequence[CheckpointEntry]) -> list[CheckpointEntry]:
        """Those of the complete checkpoints of one run that every rule gives up. Never the newest."""
        if self.keep_last is None and self.keep_every is None and self.oldest_to_keep is None:
            return []
        ordered = sorted(run, key=age_key(run))
        old = ordered[: max(len(ordered) - (self.keep_last or 1), 0)]
        # Where some have no step ("best"), the newest by its time need not be the one that training goes on from.
        furthest = max((entry.step for entry in run if entry.step is not None), default=None)
        return [entry for entry in old if self._gives_up(entry) and (entry.step is None or entry.step != furthest)]

    def _gives_up(self, entry: CheckpointEntry) -> bool:
        if self.keep_every is not None and (entry.step is None or entry.step % self.keep_every == 0):
            return False
        return self.oldest_to_keep is None or entry.modified < self.oldest_to_keep


def prune(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    keep_last: int | None = None,
    keep_every: int | None = None,
    older_than: datetime.timedelta | None = None,
    grace: datetime.timedelta = datetime.timedelta(days=1),
    dry_run: bool = True,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> PruneReport:
    """Remove checkpoints at or below a URL that are no longer wanted, and what failed saves left there.

    The checkpoints of one parent folder are a run, and each run is looked at by itself. A complete checkpoint is
    removed only if every rule that was given says so. Without `keep_last`, `keep_every` and `older_than` no complete
    checkpoint is removed. These stay in any case: the newest complete checkpoint of each run (as `latest` compares
    them) and, where only some of a run have a step, the one with the highest; a checkpoint at whose place a save may be
    running, because data younger than `grace` lies there that is newer than its metadata; and a checkpoint that was
    replaced since it was listed.

    The remains of saves that never committed are removed if nothing was added to them for `grace`. A running save looks
    just like one that failed, so `grace` must be longer than any save takes from its first rank's last block to its
    commit. Only blobs named as `AzureBlobWriter` and `AzureBlobHuggingFaceWriter` name them count as remains: what a
    failed save by torch's own writer left is listed as incomplete, and stays. Models of the HuggingFace layout are no
    checkpoints of a run, and no rule removes them.

    Of each checkpoint ``.metadata`` goes first, with a condition on its ETag. A crash in the middle leaves remains,
    which the next call finds. What cannot be deleted (leased, immutable) stops nothing else: it is in the report's
    `undeleted`, and a checkpoint of which anything is leased stays whole. It costs a listing (5,000 blobs a request), a
    request for the time, one for the metadata (or the index) of each checkpoint that is removed or in doubt, and one
    for each blob that is deleted, all but the listing in parallel.

    Args:
        keep_last: so many of a run's newest complete checkpoints stay; at least 1.
        keep_every: those whose step is a multiple of it stay, and those without a step.
        older_than: those that were completed less than this ago, by the service's clock, stay.
        grace: for incomplete saves, by the service's clock.
        dry_run: only tell what would be removed.

    Raises:
        ValueError: a rule makes no sense.
        CheckpointError: some metadata cannot be read, so nobody can tell what it names. Nothing was removed.
        StoreError: the service could not be asked; from then on nothing was removed.
    """
    _check_rules(keep_last, keep_every, older_than, grace)
    location = BlobLocation.parse(url)
    store = BlobStore(location, Access(credential, options, ca_file))
    prefix = location.prefix
    listed = list(store.list(prefix))
    if any("/" in blob.path[len(prefix) :] for blob in listed) and not any(blob.is_folder for blob in listed):
        store.has_directories = False  # they would be listed
    found = entries_of(location, listed)
    empty = empty_save_folders(listed)
    if not (found or empty or has_saved_files(listed)):
        return PruneReport([], [], [])
    now = store.now(prefix)
    rules = _Rules(keep_last, keep_every, None if older_than is None else now - older_than)
    runs: dict[tuple[bool, str], list[CheckpointEntry]] = {}
    for entry, _ in found:
        if entry.complete:  # a checkpoint at the URL itself is of the run above it
            runs.setdefault((entry.name == "", entry.folder), []).append(entry)
    unwanted = {entry.url for run in runs.values() for entry in rules.unwanted(run)}
    doomed = [
        (entry, place) for entry, place in found if entry.url in unwanted and not _may_be_in_use(place, now - grace)
    ]
    # Without its metadata, a checkpoint whose data somebody holds would be lost and its data stay.
    held = [one for entry, place in doomed for one in _held(store, entry.url, place)]
    held_urls = {one.url for one in held}
    doomed = [(entry, place) for entry, place in doomed if entry.url not in held_urls]
    # In a dry run as well: what cannot be read is better found out then.
    remains = find_remains(store, location, (place for _, place in found), now - grace)
    remains += find_model_remains(store, location, listed, now - grace)
    removed = {entry.url for entry, _ in doomed}
    kept: list[Undeleted] = []  # metadata, and with it the checkpoint
    data: list[Undeleted] = []
    if not dry_run:
        sizes = {blob.path: blob.size for blob in listed}
        removed, kept, data = _remove(store, location, doomed, sizes)
        errors = remove_remains(store, remains)
        for one in remains:
            data += _undeleted(one.url, one.blobs, errors, sizes)
        folders = {folder.path for folder in empty if folder.last_modified <= now - grace}
        folders |= {folder.rpartition("/")[0] for folder in folders}  # of a checkpoint that there never was, perhaps
        remove_empty_folders(store, store.location, folders, set())
    freed = sum(entry.size for entry, _ in found if entry.url in removed) + sum(one.size for one in remains)
    gone = {path for one in remains for path in one.blobs}
    return PruneReport(
        removed=[entry for entry, _ in found if entry.url in removed],
        kept=[
            entry
            for entry, place in found
            if entry.url not in removed and (entry.complete or any(blob.path not in gone for blob in place.blobs))
        ],
        remains=remains,
        undeleted=held + kept + data,
        freed=freed - sum(one.size for one in data),
    )


def _check_rules(
    keep_last: int | None, keep_every: int | None, older_than: datetime.timedelta | None, grace: datetime.timedelta
) -> None:
    for name, number in (("keep_last", keep_last), ("keep_every", keep_every)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    for name, time in (("older_than", older_than), ("grace", grace)):
        if time is not None and time < datetime.timedelta(0):
            raise ValueError(f"{name} must not be negative, not {time}")


def _held(store: BlobStore, url: str, place: ListedCheckpoint) -> list[Undeleted]:
    """The data of a checkpoint that is leased, as one entry if there is any."""
    blobs = [blob for blobs in place.saves.values() for blob in blobs if blob.leased]
    if not blobs:
        return []
    error = RequestRefusedError(
        f"{store.location}/{blobs[0].path} is leased, so the checkpoint stays whole. Wait until the lease ends, or "
        "break it (az storage blob lease break)"
    )
    return [Undeleted(url, [blob.path for blob in blobs], sum(blob.size for blob in blobs), error)]


def _may_be_in_use(place: ListedCheckpoint, oldest_to_keep: datetime.datetime) -> bool:
    """Whether data lies there that a running save may have written: young, and younger than the metadata."""
    committed = max(blob.last_modified for blob in place.metadata.values())
    return any(
        blob.last_modified > committed and blob.last_modified > oldest_to_keep
        for blobs in place.saves.values()
        for blob in blobs
    )


def _remove(
    store: BlobStore,
    location: BlobLocation,
    doomed: list[tuple[CheckpointEntry, ListedCheckpoint]],
    sizes: Mapping[str, int],
) -> tuple[set[str], list[Undeleted], list[Undeleted]]:
    """Remove checkpoints; return the URLs of those that were, and metadata and data that could not be deleted.

    One that was replaced since the listing stays. All metadata is read before the first blob is deleted.
    """
    cancel = Cancel()
    names: dict[str, list[str]] = {}  # paths of data blobs by the checkpoint's URL
    etags: dict[str, tuple[BlobLocation, list[tuple[int | None, str]]]] = {}

    def look(entry: CheckpointEntry, place: ListedCheckpoint) -> None:
        where = place_location(location, place)
        parts = read_metadata(store, where, place.metadata)
        listed = {rank: blob.etag for rank, blob in place.metadata.items()}
        if {part.rank: part.stored.etag for part in parts} != listed:
            _log.info("%s stays: it was replaced or removed a moment ago", entry.url)
            return
        names[entry.url] = sorted({where.join(name).path for part in parts for name in part.names})
        etags[entry.url] = where, [(part.rank, part.stored.etag) for part in parts]

    removed: set[str] = set()
    failed: dict[str, Undeleted] = {}
    down: list[ServiceUnavailableError] = []

    def hide(url: str) -> None:
        if down:
            return
        where, parts = etags[url]
        for rank, etag in parts:
            try:
                if not delete_metadata(store, where, rank, etag, cancel):
                    _log.info("%s stays: it was replaced a moment ago", url)
                    return
            except AzureCheckpointError as error:
                path = where.join(metadata_name(rank)).path
                _log.warning("%s stays, for its metadata could not be deleted: %s", url, error)
                failed[url] = Undeleted(url, [path], sizes.get(path, 0), error)
                if isinstance(error, ServiceUnavailableError):
                    down.append(error)
                return
        removed.add(url)

    _in_parallel(store, cancel, [functools.partial(look, entry, place) for entry, place in doomed])
    _in_parallel(store, cancel, [functools.partial(hide, url) for url in names])
    order = sorted(removed)
    errors = remove_blobs(
        store,
        location.container_root(),
        [path for url in order for path in names[url]],
        [place.path for entry, place in doomed if entry.url in removed],
    )
    if down:
        raise down[0]
    stays = [one for url in order for one in _undeleted(url, names[url], errors, sizes)]
    return removed, [failed[url] for url in sorted(failed)], stays


def _undeleted(
    url: str, paths: Iterable[str], errors: Mapping[str, AzureCheckpointError], sizes: Mapping[str, int]
) -> list[Undeleted]:
    """Those of a checkpoint's blobs that could not be deleted, as one entry if there are any."""
    blobs = [path for path in paths if path in errors]
    return [Undeleted(url, blobs, sum(sizes.get(path, 0) for path in blobs), errors[blobs[0]])] if blobs else []


def _in_parallel(store: BlobStore, cancel: Cancel, tasks: list[functools.partial[None]]) -> None:
    run_all(tasks, store.options.concurrency, "blob-prune", cancel.cancel)
