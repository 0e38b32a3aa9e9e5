"""`copy`: checkpoints to another container, to a disk or from one; parallel, resumable, verified, `.metadata` last."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.blob_copy import ServiceFetch
from azure_torch_ckpt.blobs.settings import CopiedSettings
from azure_torch_ckpt.catalog.copying.file_copy import CopyRun, FileCopy
from azure_torch_ckpt.catalog.copying.folders import BlobEnd, End, FolderEnd, open_end
from azure_torch_ckpt.catalog.copying.plan import CheckpointPlan, in_parallel, plan_copy
from azure_torch_ckpt.catalog.copying.report import CopyFigures
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.report import job_rank
from azure_torch_ckpt.errors import AzureCheckpointError, BlobChangedError, CheckpointExistsError, LocationError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import Meter, Progress, ProgressOption, check_progress

__all__ = ["CopyReport", "copy"]

# Checkpoints that are copied at a time: enough to keep all connections busy.
_BATCH_FILES = 256
_BATCH_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What `copy` did.

    Attributes:
        bytes: copied.
        blobs: copied, metadata included.
        skipped: blobs that were there already.
        seconds: from the call to its end.
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
    """Copy the checkpoint at `src` to `dst`, or all checkpoints at or below `src` to places of the same names.

    Each of the two is a URL or a local path, and at least one a URL. Between containers the service fetches the data
    itself (https://learn.microsoft.com/rest/api/storageservices/put-block-from-url), by the SAS of the source's URL, by
    one that is made from the account key, or by this process' token; where it cannot, the data goes through this
    machine, and the log says so. A checkpoint on a disk is what torch's ``FileSystemReader`` loads.

    A checkpoint's metadata is written when all its data is there, under the condition that nobody else has written any.
    So a copy that was broken off is an incomplete save, and calling again goes on: blobs that are there are skipped.
    They are known by a mark in the blob's metadata (``copy_of``); files by their checksums, and where the checkpoint
    has none by size and time. Files have a temporary name until they are whole and on the disk.

    Incomplete saves are left out, with a warning in the log, and so is data that the metadata does not name.

    A blob's content settings (its type, encoding and so on), metadata and index tags go along to another container,
    tags only where the credentials may read and write them: else a warning says so. A file on a disk has none. The
    access tier is the target account's default.

    Args:
        overwrite: replace other checkpoints that stand at the target, and then remove their data. False refuses before
            anything is copied.
        verify: compare the checksums of all items also where that takes reading the copy: of what the service has
            fetched without telling its CRC64, and of files that were there. Data that goes through this machine is
            always compared.
        progress: as for `AzureBlobReader`; counts the bytes that have arrived or were there already.
        credential: for both ends.
        dst_credential: for the target, if it needs another one. For a new checkpoint it has to allow writing and
            nothing else; what was copied by a copy that was broken off is then copied again.

    Raises:
        LocationError: the two places cannot be copied between.
        CheckpointNotFoundError: there is no complete checkpoint at the source.
        CheckpointExistsError: another checkpoint stands at the target, and ``overwrite`` is False.
        CorruptCheckpointError: the source is damaged or lacks data. Nothing that can be seen was written.
        CheckpointReplacedError: the source was replaced meanwhile.
        CommitConflictError: somebody else saved at the target meanwhile.
        LocalFileError: a file could not be read or written.
        StoreError: the service could not be asked.
    """
    check_progress(progress)
    options = options or TransferOptions()
    source = open_end(src, Access(credential, options, ca_file))
    target = open_end(dst, Access(credential if dst_credential is None else dst_credential, options, ca_file))
    _check_ends(source, target)
    stores = [end.store for end in (source, target) if isinstance(end, BlobEnd)]
    skipped = 0
    with CopyFigures("copy", source.where, target.where, stores) as figures:
        plans = plan_copy(source, target, options, overwrite=overwrite)
        files = [file for plan in plans for file in plan.files]
        total = sum(file.source.size for file in files)
        target.sweep()
        with Meter(progress, Progress("copy", source.where, job_rank(), 0, total, 0.0)) as meter:
            run = CopyRun(
                source=source,
                target=target,
                part_size=options.part_size(total),
                verify=verify,
                service=ServiceFetch(source.store) if len(stores) == 2 and isinstance(source, BlobEnd) else None,
                meter=meter,
            )
            copies = {id(file): FileCopy(file, run) for file in files}
            try:
                _round(run, options, copies.values(), FileCopy.checks, FileCopy.settle_checks)
                target.check_room(sum(each.size for each in copies.values() if not each.skipped))
                for batch in _batches(plans):
                    of_batch = [copies[id(file)] for plan in batch for file in plan.files]
                    skipped += _copy_batch(run, options, batch, of_batch, figures)
            finally:
                there = sum(each.size for each in copies.values() if each.skipped)
                figures.bytes += meter.done - there
        if skipped:
            figures.remark = f"; {skipped} {'blob was' if skipped == 1 else 'blobs were'} there already"
    return CopyReport(figures.bytes, figures.items, skipped, figures.seconds)


def _check_ends(source: End, target: End) -> None:
    if isinstance(source, FolderEnd) and isinstance(target, FolderEnd):
        raise LocationError(
            f"{source.where} and {target.where} are both local paths; copy them with the system's own tools. A URL "
            "looks like https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH"
        )
    above, below = sorted((f"{source.where}/", f"{target.where}/"), key=len)
    if below.startswith(above):
        raise LocationError(f"{source.where} cannot be copied to {target.where}: one of them lies within the other")


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


def _copy_batch(
    run: CopyRun, options: TransferOptions, plans: list[CheckpointPlan], files: list[FileCopy], figures: CopyFigures
) -> int:
    """Copy some checkpoints; return how many blobs were there already."""
    wanted = [file for file in files if not file.skipped]
    in_parallel(options, [functools.partial(_hide, run.target, plan, files) for plan in plans], run.cancel.cancel)
    try:
        in_parallel(options, itertools.chain.from_iterable(file.moves() for file in wanted), run.cancel.cancel)
    finally:
        for file in wanted:
            file.abandon()
    _round(run, options, wanted, FileCopy.read_backs, FileCopy.settle_read_backs)
    run.target.settle([file.plan.source.path for file in files])
    uncommitted = [plan for plan in plans if not plan.is_committed]
    in_parallel(
        options, [functools.partial(_commit, run.source, run.target, plan) for plan in uncommitted], run.cancel.cancel
    )
    metadata = [stored for plan in uncommitted for stored in plan.metadata.values()]
    figures.items += len(wanted) + len(metadata)
    figures.bytes += sum(len(stored.data) for stored in metadata)  # what the meter does not count
    return len(files) - len(wanted) + sum(len(plan.metadata) for plan in plans) - len(metadata)


def _round(
    run: CopyRun,
    options: TransferOptions,
    files: Iterable[FileCopy],
    tasks: Callable[[FileCopy], Iterator[Callable[[], None]]],
    settle: Callable[[FileCopy], None],
) -> None:
    every = list(files)
    in_parallel(options, itertools.chain.from_iterable(map(tasks, every)), run.cancel.cancel)
    for file in every:
        settle(file)


def _hide(target: End, plan: CheckpointPlan, files: list[FileCopy]) -> None:
    """Take the checkpoint that is to be replaced away first, if the new one has data of the same names.

    Save ids make that impossible for our own; for torch's layout a crash would else leave a mixture that looks whole.
    """
    if plan.is_committed or not plan.standing:
        return
    mine = {file.source.path for file in plan.files}
    if any(file.plan.source.path in mine and not file.skipped and file.plan.there is not None for file in files):
        for rank in list(plan.standing):
            target.remove_metadata(plan.name, rank, plan.standing.pop(rank))


def _commit(source: End, target: End, plan: CheckpointPlan) -> None:
    # Readers prefer the metadata of all ranks, so that of the other kind must not stay beside the new one.
    for rank in plan.standing.keys() - plan.metadata.keys():
        target.remove_metadata(plan.name, rank, plan.standing[rank])
    for rank, stored in plan.metadata.items():
        try:
            settings = source.settings_of(plan.blobs[rank]) if isinstance(target, BlobEnd) else CopiedSettings()
            target.commit_metadata(plan.name, rank, stored.data, plan.standing.get(rank), settings)
        except AzureCheckpointError as error:
            if target.may_look or not _is_refusal(error):
                raise
            raise CheckpointExistsError(
                f"There is a checkpoint at or below {target.where} that this credential may not look at, and it was "
                "left alone: another one, or the one that was copied here if the answer to that got lost. Look at it "
                "with a credential that may, or choose another place"
            ) from error
    target.remove(sorted(plan.outdated))


def _is_refusal(error: BaseException | None) -> bool:
    """Whether an error comes from a condition that did not hold, and from a look at why, which was denied."""
    while error is not None and not isinstance(error, BlobChangedError):
        error = error.__cause__ or error.__context__
    return error is not None
