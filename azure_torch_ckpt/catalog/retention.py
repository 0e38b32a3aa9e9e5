"""`prune`: removes the checkpoints that no retention rule keeps, and the leftovers of failed saves."""

from __future__ import annotations

import datetime
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.catalog.listing import CheckpointEntry, age_key, entries_of
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.blob_names import ListedCheckpoint, empty_save_folders, metadata_name
from azure_torch_ckpt.dcp.commit import delete_metadata
from azure_torch_ckpt.dcp.open_checkpoint import read_metadata
from azure_torch_ckpt.dcp.removal import (
    Remains,
    find_leftovers,
    path_location,
    remove_blobs,
    remove_empty_folders,
    remove_leftovers,
)
from azure_torch_ckpt.errors import AzureCheckpointError, RequestRefusedError, ServiceUnavailableError
from azure_torch_ckpt.huggingface.leftovers import find_model_leftovers, has_saved_files
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["PruneReport", "Undeleted", "prune"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Undeleted:
    """Blobs that could not be deleted: they are leased or immutable, or the credential does not allow it.

    Attributes:
        url: the checkpoint that the blobs belong to, or belonged to.
        blobs: paths in the container.
        size: bytes of all the blobs.
        error: the error for the first blob.
    """

    url: str
    blobs: list[str]
    size: int
    error: AzureCheckpointError


@dataclass(frozen=True, slots=True)
class PruneReport:
    """The result of `prune`; of a dry run, what it would remove.

    Attributes:
        removed: complete checkpoints that were removed, in the order of `list_checkpoints`.
        kept: all other complete checkpoints, and the incomplete ones of which something stays.
        remains: leftovers of failed saves, which were removed as well.
        undeleted: blobs that should have been removed and could not be deleted. A checkpoint whose metadata or data is
            leased stays whole and is in `kept`. Other data that could not be deleted is in the `remains` of the next
            `prune`.
        freed: bytes of everything that was removed.
    """

    removed: list[CheckpointEntry]
    kept: list[CheckpointEntry]
    remains: list[Remains]
    undeleted: list[Undeleted] = field(default_factory=list)
    freed: int = 0


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
    """Remove old checkpoints at or below a URL, and the leftovers of failed saves.

    The checkpoints of one parent folder are a run, and the rules apply to each run. `prune` removes a complete
    checkpoint only if none of the given rules keeps it. Without `keep_last`, `keep_every` and `older_than` it removes
    no complete checkpoint. In any case these stay:

    - the newest complete checkpoint of each run, compared as by `latest`, and, if only some of a run have a step, the
      one with the highest step;
    - a checkpoint that a running save may be replacing: it has data that is younger than `grace` and newer than its
      metadata;
    - a checkpoint that was replaced since it was listed.

    Leftovers are removed if nothing was added to them for `grace`. A running save looks like one that failed, so
    `grace` must be longer than the time between any rank's last block and the commit of the save. Only blobs with names
    as `AzureBlobWriter` and `AzureBlobHuggingFaceWriter` give them are leftovers: those of torch's own writer are
    listed as an incomplete checkpoint, and stay. The rules do not apply to models in the HuggingFace layout.

    ``.metadata`` is deleted first, with a condition on its ETag. After a crash in the middle, the next call finds the
    rest as leftovers. A blob that cannot be deleted (leased, immutable) stops nothing else: it is in
    `PruneReport.undeleted`, and a checkpoint with leased data stays whole.

    The cost is a listing (5,000 blobs a request), a request for the time, a request for the metadata or the index of
    each checkpoint that is removed or in doubt, and a request for each blob that is deleted. All but the listing run in
    parallel.

    Args:
        url: the folder of the checkpoints, or one checkpoint.
        keep_last: keep this number of a run's newest complete checkpoints; at least 1.
        keep_every: keep checkpoints whose step is a multiple of this, and those without a step.
        older_than: keep checkpoints that were completed less than this ago, by the service's clock.
        grace: age of leftovers that are removed, by the service's clock.
        dry_run: report what would be removed, and remove nothing.

    Raises:
        ValueError: a rule is out of range.
        CheckpointError: some metadata cannot be read, so it is unknown which data it names. Nothing was removed.
        StoreError: a request failed; from then on nothing was removed.
    """
    _check_rules(keep_last, keep_every, older_than, grace)
    location = BlobLocation.parse(url)
    store = BlobStore(location, Access(credential, options, ca_file))
    prefix = location.prefix
    blobs = list(store.list(prefix))
    if any("/" in blob.path[len(prefix) :] for blob in blobs) and not any(blob.is_folder for blob in blobs):
        store.has_directories = False  # the listing would include them
    listed = entries_of(location, blobs)
    empty_folders = empty_save_folders(blobs)
    if not (listed or empty_folders or has_saved_files(blobs)):
        return PruneReport([], [], [])
    now = store.now(prefix)
    oldest = None if older_than is None else now - older_than
    runs: dict[tuple[bool, str], list[CheckpointEntry]] = {}
    for entry, _ in listed:
        if entry.complete:  # a checkpoint at the URL itself is of the run above it
            runs.setdefault((entry.name == "", entry.folder), []).append(entry)
    removable = {entry.url for run in runs.values() for entry in _removable(run, keep_last, keep_every, oldest)}
    to_remove = [
        (entry, checkpoint)
        for entry, checkpoint in listed
        if entry.url in removable and not _may_be_in_use(checkpoint, now - grace)
    ]
    # Without its metadata, a checkpoint with leased data would be lost, and its data would stay.
    leased = [one for entry, checkpoint in to_remove for one in _leased(store, entry.url, checkpoint)]
    leased_urls = {one.url for one in leased}
    to_remove = [(entry, checkpoint) for entry, checkpoint in to_remove if entry.url not in leased_urls]
    # Also for a dry run, which reports metadata that cannot be read.
    leftovers = find_leftovers(store, location, (checkpoint for _, checkpoint in listed), now - grace)
    leftovers += find_model_leftovers(store, location, blobs, now - grace)
    removed = {entry.url for entry, _ in to_remove}
    undeleted_metadata: list[Undeleted] = []  # its checkpoints stay
    undeleted_data: list[Undeleted] = []
    if not dry_run:
        sizes = {blob.path: blob.size for blob in blobs}
        removed, undeleted_metadata, undeleted_data = _remove(store, location, to_remove, sizes)
        errors = remove_leftovers(store, leftovers)
        for one in leftovers:
            undeleted_data += _undeleted(one.url, one.blobs, errors, sizes)
        folders = {folder.path for folder in empty_folders if folder.last_modified <= now - grace}
        folders |= {folder.rpartition("/")[0] for folder in folders}  # perhaps of a checkpoint that was never completed
        remove_empty_folders(store, store.location, folders, set())
    freed = sum(entry.size for entry, _ in listed if entry.url in removed) + sum(one.size for one in leftovers)
    leftover_paths = {path for one in leftovers for path in one.blobs}
    return PruneReport(
        removed=[entry for entry, _ in listed if entry.url in removed],
        kept=[
            entry
            for entry, checkpoint in listed
            if entry.url not in removed
            and (entry.complete or any(blob.path not in leftover_paths for blob in checkpoint.blobs))
        ],
        remains=leftovers,
        undeleted=leased + undeleted_metadata + undeleted_data,
        freed=freed - sum(one.size for one in undeleted_data),
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


def _removable(
    run: Sequence[CheckpointEntry],
    keep_last: int | None,
    keep_every: int | None,
    oldest_to_keep: datetime.datetime | None,
) -> list[CheckpointEntry]:
    """Return the complete checkpoints of one run that no rule keeps; never the newest."""
    if keep_last is None and keep_every is None and oldest_to_keep is None:
        return []
    by_age = sorted(run, key=age_key(run))
    older = by_age[: max(len(by_age) - (keep_last or 1), 0)]
    # If some have no step ("best"), the newest by time need not be the one that training continues from.
    last_step = max((entry.step for entry in run if entry.step is not None), default=None)

    def keeps(entry: CheckpointEntry) -> bool:
        if keep_every is not None and (entry.step is None or entry.step % keep_every == 0):
            return True
        return oldest_to_keep is not None and entry.modified >= oldest_to_keep

    return [entry for entry in older if not keeps(entry) and (entry.step is None or entry.step != last_step)]


def _leased(store: BlobStore, url: str, checkpoint: ListedCheckpoint) -> list[Undeleted]:
    """Return the leased data of a checkpoint as one entry, or none."""
    blobs = [blob for blobs in checkpoint.saves.values() for blob in blobs if blob.leased]
    if not blobs:
        return []
    error = RequestRefusedError(
        f"{store.location}/{blobs[0].path} is leased, so the checkpoint stays whole. Wait until the lease ends, or "
        "break it (az storage blob lease break)"
    )
    return [Undeleted(url, [blob.path for blob in blobs], sum(blob.size for blob in blobs), error)]


def _may_be_in_use(checkpoint: ListedCheckpoint, oldest_to_keep: datetime.datetime) -> bool:
    """Whether a running save may have written data there: data younger than the grace period and than the metadata."""
    committed = max(blob.last_modified for blob in checkpoint.metadata.values())
    return any(
        blob.last_modified > committed and blob.last_modified > oldest_to_keep
        for blobs in checkpoint.saves.values()
        for blob in blobs
    )


def _remove(
    store: BlobStore,
    location: BlobLocation,
    to_remove: list[tuple[CheckpointEntry, ListedCheckpoint]],
    sizes: Mapping[str, int],
) -> tuple[set[str], list[Undeleted], list[Undeleted]]:
    """Remove checkpoints; return the URLs of the removed ones, and undeleted metadata and data.

    A checkpoint that was replaced since the listing stays. All metadata is read before the first blob is deleted.
    """
    cancel = Cancel()
    data_paths: dict[str, list[str]] = {}  # by the checkpoint's URL
    etags: dict[str, tuple[BlobLocation, list[tuple[int | None, str]]]] = {}

    def read_one(entry: CheckpointEntry, checkpoint: ListedCheckpoint) -> None:
        root = path_location(location, checkpoint.path)
        parts = read_metadata(store, root, checkpoint.metadata)
        listed_etags = {rank: blob.etag for rank, blob in checkpoint.metadata.items()}
        if {part.rank: part.stored.etag for part in parts} != listed_etags:
            _log.info("%s stays, because it was replaced or removed a moment ago", entry.url)
            return
        data_paths[entry.url] = sorted({root.join(name).path for part in parts for name in part.names})
        etags[entry.url] = root, [(part.rank, part.stored.etag) for part in parts]

    removed: set[str] = set()
    failed: dict[str, Undeleted] = {}
    unavailable: list[ServiceUnavailableError] = []

    def remove_metadata(url: str) -> None:
        if unavailable:
            return
        root, parts = etags[url]
        for rank, etag in parts:
            try:
                if not delete_metadata(store, root, rank, etag, cancel):
                    _log.info("%s stays, because it was replaced a moment ago", url)
                    return
            except AzureCheckpointError as error:
                path = root.join(metadata_name(rank)).path
                _log.warning("%s stays, because its metadata could not be deleted: %s", url, error)
                failed[url] = Undeleted(url, [path], sizes.get(path, 0), error)
                if isinstance(error, ServiceUnavailableError):
                    unavailable.append(error)
                return
        removed.add(url)

    def run_tasks(tasks: Iterable[Callable[[], None]]) -> None:
        run_all(tasks, store.options.concurrency, "blob-prune", cancel.cancel)

    run_tasks(functools.partial(read_one, entry, checkpoint) for entry, checkpoint in to_remove)
    run_tasks(functools.partial(remove_metadata, url) for url in data_paths)
    urls = sorted(removed)
    errors = remove_blobs(
        store,
        location.container_root(),
        [path for url in urls for path in data_paths[url]],
        [checkpoint.path for entry, checkpoint in to_remove if entry.url in removed],
    )
    if unavailable:
        raise unavailable[0]
    undeleted_data = [one for url in urls for one in _undeleted(url, data_paths[url], errors, sizes)]
    return removed, [failed[url] for url in sorted(failed)], undeleted_data


def _undeleted(
    url: str, paths: Iterable[str], errors: Mapping[str, AzureCheckpointError], sizes: Mapping[str, int]
) -> list[Undeleted]:
    """Return the blobs of a checkpoint that could not be deleted as one entry, or none."""
    blobs = [path for path in paths if path in errors]
    return [Undeleted(url, blobs, sum(sizes.get(path, 0) for path in blobs), errors[blobs[0]])] if blobs else []
