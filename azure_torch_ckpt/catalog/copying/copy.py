"""`copy`: copies checkpoints between containers and disks, in parallel, verified, with the metadata last."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from azure_torch_ckpt._internal.units import format_bytes, format_duration
from azure_torch_ckpt.blobs.blob_copy import ServiceFetch
from azure_torch_ckpt.blobs.blob_info import CopiedSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.catalog.copying.file_copy import CopyRun, FileCopy
from azure_torch_ckpt.catalog.copying.plan import CheckpointPlan, plan_copy
from azure_torch_ckpt.catalog.copying.trees import BlobTree, FolderTree, Tree, open_tree
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.report import job_rank, rate_and_requests, report_log
from azure_torch_ckpt.errors import AzureCheckpointError, BlobChangedError, CheckpointExistsError, LocationError
from azure_torch_ckpt.events import TransferEvent, emit
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import Meter, Progress, ProgressOption, check_progress

__all__ = ["CopyMetrics", "CopyReport", "copy"]

# Checkpoints that are copied at a time: enough to keep all connections busy.
_BATCH_FILES = 256
_BATCH_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class CopyReport:
    """The result of `copy`.

    Attributes:
        bytes: bytes copied.
        blobs: number of blobs or files copied, metadata included.
        skipped: number of blobs or files that the destination had already.
        seconds: duration of the call.
    """

    bytes: int
    blobs: int
    skipped: int
    seconds: float


def copy(
    src: str | os.PathLike[str] | BlobLocation,
    dst: str | os.PathLike[str] | BlobLocation,
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: ProgressOption = None,
    credential: Credential = None,
    dst_credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> CopyReport:
    """Copy the checkpoint at `src` to `dst`, or all checkpoints at or below `src` to the same names below `dst`.

    Each of the two is a URL or a local path; at least one is a URL. Between containers the service fetches the data
    itself (https://learn.microsoft.com/rest/api/storageservices/put-block-from-url). It reads the source with the SAS
    of the source's URL, with a SAS made from the account key, or with a token of this process. If it cannot, the data
    goes through this machine, and the log says so. torch's ``FileSystemReader`` loads a checkpoint on a disk.

    The metadata is written once all data is in place, with the condition that no other save has written any. An
    interrupted copy is therefore an incomplete save, and a second call continues it: it skips the blobs and files that
    are complete. It recognizes blobs by a mark in their metadata (``copy_of``), and files by their checksums, or
    without checksums by size and time. Files have a temporary name until they are complete and on the disk.

    Incomplete saves are not copied, with a warning in the log. Nor is data that the metadata does not name.

    A blob's content settings (its type, encoding and so on), metadata and index tags are copied to another container.
    Tags need credentials that may read and write them; without them, a warning says that the tags are missing. A file
    on a disk has no settings. The access tier is the default of the destination's account.

    Args:
        src: URL or local path of the source.
        dst: URL or local path of the destination.
        overwrite: replace other checkpoints at the destination, and then remove their data. False raises before
            anything is copied.
        verify: compare the checksums of all items even where that takes reading the copy: data for which the service
            returned no CRC64, and files that existed before. Data that goes through this machine is always compared.
        progress: as for `AzureBlobReader`; counts the bytes that have arrived or were there already.
        credential: for source and destination.
        dst_credential: for the destination, if it needs another one. For a new checkpoint, write permission is enough;
            then a second call copies everything again.

    Raises:
        LocationError: one place lies within the other, or both are local.
        CheckpointNotFoundError: the source has no complete checkpoint.
        CheckpointExistsError: the destination has another checkpoint, and ``overwrite`` is False.
        CorruptCheckpointError: the source is damaged or lacks data. No checkpoint became visible.
        CheckpointReplacedError: the source was replaced meanwhile.
        CommitConflictError: another process saved at the destination meanwhile.
        LocalFileError: a file could not be read or written.
        StoreError: a request failed.
    """
    check_progress(progress)
    options = options or TransferOptions()
    source = open_tree(src, Access(credential, options, ca_file))
    destination = open_tree(dst, Access(credential if dst_credential is None else dst_credential, options, ca_file))
    _check_places(source, destination)
    stores = [tree.store for tree in (source, destination) if isinstance(tree, BlobTree)]
    skipped = 0
    with CopyMetrics("copy", str(source), str(destination), stores) as metrics:
        plans = plan_copy(source, destination, options, overwrite=overwrite)
        files = [file for plan in plans for file in plan.files]
        total = sum(file.source.size for file in files)
        destination.remove_abandoned()
        with Meter(progress, Progress("copy", str(source), job_rank(), 0, total, 0.0)) as meter:
            run = CopyRun(
                source=source,
                destination=destination,
                options=options,
                part_size=options.part_size(total),
                verify=verify,
                service=ServiceFetch(source.store) if len(stores) == 2 and isinstance(source, BlobTree) else None,
                meter=meter,
            )
            copies = {id(file): FileCopy(file, run) for file in files}
            try:
                _run_round(run, copies.values(), FileCopy.comparisons, FileCopy.after_comparisons)
                destination.check_free_space(sum(file.size for file in copies.values() if not file.skipped))
                for batch in _batches(plans):
                    of_batch = [copies[id(file)] for plan in batch for file in plan.files]
                    skipped += _copy_batch(run, batch, of_batch, metrics)
            finally:
                metrics.bytes += meter.done - sum(file.size for file in copies.values() if file.skipped)
        if skipped:
            metrics.remark = f"; {skipped} {'blob was' if skipped == 1 else 'blobs were'} there already"
    return CopyReport(metrics.bytes, metrics.items, skipped, metrics.seconds)


def _check_places(source: Tree, destination: Tree) -> None:
    if isinstance(source, FolderTree) and isinstance(destination, FolderTree):
        raise LocationError(
            f"{source} and {destination} are both local paths; copy them with the system's own tools. A URL looks like "
            "https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH"
        )
    outer, inner = sorted((f"{source}/", f"{destination}/"), key=len)
    if inner.startswith(outer):
        raise LocationError(f"{source} cannot be copied to {destination}: one of them lies within the other")


def _batches(plans: list[CheckpointPlan]) -> Iterator[list[CheckpointPlan]]:
    batch: list[CheckpointPlan] = []
    files = size = 0
    for plan in plans:
        batch.append(plan)
        files += len(plan.files)
        size += sum(file.source.size for file in plan.files)
        if files >= _BATCH_FILES or size >= _BATCH_BYTES:
            yield batch
            batch, files, size = [], 0, 0
    if batch:
        yield batch


def _copy_batch(run: CopyRun, plans: list[CheckpointPlan], files: list[FileCopy], metrics: CopyMetrics) -> int:
    """Copy some checkpoints; return how many of their blobs the destination had already."""
    to_copy = [file for file in files if not file.skipped]
    run.run_tasks(functools.partial(_hide, run.destination, plan, files) for plan in plans)
    try:
        run.run_tasks(itertools.chain.from_iterable(file.moves() for file in to_copy))
    finally:
        for file in to_copy:
            file.abandon()
    _run_round(run, to_copy, FileCopy.read_backs, FileCopy.raise_if_damaged)
    run.destination.sync([file.plan.source.path for file in files])
    uncommitted = [plan for plan in plans if not plan.is_committed]
    run.run_tasks(functools.partial(_commit, run.source, run.destination, plan) for plan in uncommitted)
    metadata = [stored for plan in uncommitted for stored in plan.metadata.values()]
    metrics.items += len(to_copy) + len(metadata)
    metrics.bytes += sum(len(stored.data) for stored in metadata)  # the meter counts data alone
    return len(files) - len(to_copy) + sum(len(plan.metadata) for plan in plans) - len(metadata)


def _run_round(
    run: CopyRun,
    files: Iterable[FileCopy],
    tasks: Callable[[FileCopy], Iterator[Callable[[], None]]],
    afterwards: Callable[[FileCopy], None],
) -> None:
    all_files = list(files)
    run.run_tasks(itertools.chain.from_iterable(map(tasks, all_files)))
    for file in all_files:
        afterwards(file)


def _hide(destination: Tree, plan: CheckpointPlan, files: list[FileCopy]) -> None:
    """Remove the metadata of the replaced checkpoint first if the new one has data of the same names.

    Our own checkpoints have a save id in their data's names, so this is for torch's layout: a crash in the middle would
    leave a mixture of both checkpoints that looks complete.
    """
    if plan.is_committed or not plan.replaced:
        return
    names = {file.source.path for file in plan.files}
    if any(file.plan.source.path in names and not file.skipped and file.plan.existing is not None for file in files):
        for rank in list(plan.replaced):
            destination.remove_metadata(plan.name, rank, plan.replaced.pop(rank))


def _commit(source: Tree, destination: Tree, plan: CheckpointPlan) -> None:
    # Readers prefer metadata of all ranks to metadata of each rank, so only the new kind may stay.
    for rank in plan.replaced.keys() - plan.metadata.keys():
        destination.remove_metadata(plan.name, rank, plan.replaced[rank])
    for rank, stored in plan.metadata.items():
        try:
            to_blob = isinstance(destination, BlobTree)
            settings = source.settings(plan.metadata_infos[rank]) if to_blob else CopiedSettings()
            settings = dataclasses.replace(settings, metadata={**settings.metadata, **plan.marks.get(rank, {})})
            destination.commit_metadata(plan.name, rank, stored.data, plan.replaced.get(rank), settings)
        except AzureCheckpointError as error:
            if destination.readable or not _is_refused_condition(error):
                raise
            raise CheckpointExistsError(
                f"A checkpoint at or below {destination}, which this credential may not read, was not replaced. It is "
                "another checkpoint, or this one if the service's answer to an earlier copy got lost. Read it with "
                "another credential, or choose another destination"
            ) from error
    destination.remove(sorted(plan.outdated))


def _is_refused_condition(error: BaseException | None) -> bool:
    """Whether the service refused the commit's condition, and then refused to let the credential read the reason."""
    while error is not None and not isinstance(error, BlobChangedError):
        error = error.__cause__ or error.__context__
    return error is not None


_PAST = {"copy": "copied", "consolidate": "consolidated"}


class CopyMetrics:
    """A context manager around a `copy` or `consolidate`: counts what it does, and reports it when it is left.

    The report is an event and, unless there was an error, a log line: the error has its own message. `remark` is the
    end of the line. The requests are those of `stores`, which were made for this copy. Source and destination are URLs
    without a SAS, or local paths.
    """

    def __init__(
        self, operation: Literal["copy", "consolidate"], source: str, destination: str, stores: Iterable[BlobStore]
    ) -> None:
        self.items = 0
        self.bytes = 0
        self.remark = ""
        self._operation = operation
        self._source = source
        self._destination = destination
        self._stores = list(stores)
        self._began = time.monotonic()
        self._started = datetime.datetime.now(datetime.timezone.utc)

    @property
    def seconds(self) -> float:
        """Seconds since the copy began."""
        return time.monotonic() - self._began

    def __enter__(self) -> CopyMetrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        counts = [store.counts for store in self._stores]
        event = TransferEvent(
            operation=self._operation,
            url=self._source,
            rank=job_rank(),
            items=self.items,
            bytes=self.bytes,
            seconds=self.seconds,
            requests=sum(count.requests for count in counts),
            retries=sum(count.retries for count in counts),
            checkpoint_bytes=None,
            error=error,
            started=self._started,
            finished=datetime.datetime.now(datetime.timezone.utc),
            target=self._destination,
        )
        if error is None:
            took = f"{format_duration(event.seconds)} ({rate_and_requests(event)})"
            line = f"{_PAST[self._operation]} {format_bytes(event.bytes)} in {took} from {event.url} to {event.target}"
            report_log.info("%s%s", line, self.remark)
        emit(event)
