"""`AzureBlobReader`: the ``StorageReader`` of torch.distributed.checkpoint that loads from Blob Storage."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Iterable
from typing import Any, cast

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.blobs.download import Download, Read
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.base import BaseStorage, step
from azure_torch_ckpt.dcp.blob_names import metadata_name, metadata_rank
from azure_torch_ckpt.dcp.item_reader import ItemReader, run_reads
from azure_torch_ckpt.dcp.metadata.views import ColumnMetadata, whole_tensors
from azure_torch_ckpt.dcp.metadata_blob import replaced_error
from azure_torch_ckpt.dcp.open_checkpoint import is_replaced, not_found_error, read_metadata
from azure_torch_ckpt.dcp.plan_load import PlanLoad
from azure_torch_ckpt.dcp.rank_metadata import RankMetadata, read_rank_metadata
from azure_torch_ckpt.dcp.read_columns import PlannedReads
from azure_torch_ckpt.dcp.report import TransferReport
from azure_torch_ckpt.dcp.save_group import SaveGroup
from azure_torch_ckpt.dcp.tensors.chunks import find_uncovered
from azure_torch_ckpt.errors import (
    AzureCheckpointError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import ProgressOption

__all__ = ["AzureBlobReader", "SeenMetadata"]


@dataclasses.dataclass(frozen=True, slots=True)
class SeenMetadata:
    """Travels in the load plans: the name and the ETag of the metadata blob that a rank has read.

    And the id of its `SaveGroup`, if it is of a save without collectives.
    """

    name: str
    etag: str
    group: str | None = None


class AzureBlobReader(BaseStorage, StorageReader):
    """Load a checkpoint from a URL in Blob Storage, on any number of ranks and with any sharding.

    Reads what `AzureBlobWriter`, torch's ``FileSystemWriter`` and ``FsspecWriter`` write. Only the bytes that the
    state dict asks for are fetched, straight into its tensors where those are contiguous CPU memory of the saved dtype.
    After an error the state dict's tensors hold old and new values in no particular order.

    If tensors in the state dict share memory, the values of the last one in the plan remain: the last key, as
    ``dcp.load`` sorts them. A planner that overrides a method by which torch's gives or commits tensors gets its items
    in the order of the plan: each is resolved, filled and committed before the next. If the checkpoint has only a part
    of a tensor, that is an error, with ``allow_partial_load`` as well, which is for missing keys.

    A save with ``use_collectives=False`` loads in the same way, if it is complete. Where its ranks saved values of
    their own under one key (a state of random numbers, an object), each rank gets its own back, and a rank that did not
    save gets that of the lowest rank. torch reads the data of such a checkpoint without collectives, too: an error
    there is raised on its rank only, and the others wait in the barrier at the end.

    Args:
        url: of the checkpoint, as for `AzureBlobWriter`.
        credential: as for `AzureBlobWriter`; it must allow reading and listing.
        options: limits of connections, memory and time, and whether checksums are compared.
        ca_file, progress: as for `AzureBlobWriter`, and so are the errors, of the constructor and while loading.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | BlobLocation,
        *,
        credential: Credential = None,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
        progress: ProgressOption = None,
    ) -> None:
        super().__init__(url, Access(credential, options, ca_file), TransferReport("load", progress))
        self._metadata = Metadata({}, storage_data={})
        self._seen: SeenMetadata | None = None
        self._of_ranks: RankMetadata | None = None  # of a save without collectives
        self._why_no_metadata: AzureCheckpointError | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Fetch and check the checkpoint's metadata; with ``rank=``, that of a save without collectives.

        Then the ``state_dict_metadata`` may show, when iterated over, this rank's entries only. It finds all keys.

        A tensor that is stored in many chunks may be shown as one, which a plan may request any part of. `inspect` and
        ``storage_data`` tell where its chunks are stored.

        Raises:
            CheckpointNotFoundError: there is no complete checkpoint; without ``rank=``, none that was saved with
                collectives.
            UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: it cannot be trusted or read.
            StoreError: the service could not be asked.
        """
        rank: int | None = kwargs.get("rank")
        load = self._begun_here()
        if rank is None or load is None or load._why_no_metadata is None:
            load = self._begin()
            load._report.begin(load.checkpoint_id, load._store)
            try:
                return load._read_metadata(rank)
            except BaseException as error:
                if rank is None and isinstance(error, AzureCheckpointError):
                    load._why_no_metadata = error
                if rank is None and isinstance(error, CheckpointNotFoundError):
                    load._report.may_have_ended(error)  # the rank may have metadata of its own
                else:
                    load._report.end(error)
                raise
        # torch's load swallows the error of its first call, asks for the rank's own metadata, and reports an
        # AssertionError if that does not exist either. So it gets an object here that raises the first error when used.
        first = load._why_no_metadata
        try:
            if not isinstance(first, CheckpointNotFoundError):
                return load._unreadable(first)
            load._report.may_have_ended(None)
            return load._read_metadata(rank)
        except AzureCheckpointError as error:
            return load._unreadable(error)
        finally:
            load._why_no_metadata = None

    def _unreadable(self, error: AzureCheckpointError) -> _Unreadable:
        self._report.end(error)
        return _Unreadable(error)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if isinstance(metadata, _Unreadable):
            raise metadata.error
        # If another thread has read the metadata, this one continues with a copy of that thread's state.
        load = self._begun_here() or self._begin(self._current())
        load._report.confirm(is_coordinator)
        load._metadata = metadata

    @step
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        items = cast("list[ReadItem]", PlannedReads(plan.items))
        return dataclasses.replace(plan, items=items, storage_data=self._seen)

    @step
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that all ranks have read the same metadata.

        Raises:
            CheckpointReplacedError: the checkpoint was replaced after one rank had read the metadata, and before
                another had.
        """
        seen = {plan.storage_data for plan in plans if isinstance(plan.storage_data, SeenMetadata)}
        if len({one.group for one in seen}) > 1:
            raise self._replaced()
        # Ranks of which only some have read their own metadata would wait for each other in different collectives.
        if len(seen) > 1 and any(metadata_rank(one.name) is None for one in seen):
            raise self._replaced()
        return plans

    @step
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fetch what the plan names into the planner's tensors, and hand it the pickled objects.

        Raises:
            CorruptCheckpointError: a blob is missing or too short, a checksum does not match, or the checkpoint has
                only a part of a requested tensor.
            CheckpointNotFoundError: it was saved with ``use_collectives=False``, this rank requests more than it saved,
                and the metadata of the other ranks is not complete.
            CheckpointReplacedError: the checkpoint was replaced or removed meanwhile.
            StoreError: the service could not be asked.
        """
        plan = dataclasses.replace(plan, items=list(plan.items))
        items = ItemReader(self._store, self._location, self._run)
        load = PlanLoad(items, self._metadata, planner, self._report.moved)
        with CollectorPause() as pause:
            plan = self._covering_plan(plan, planner)
            load.prepare(plan.items, pause)
        with self._report.transfer(len(plan.items), None):
            load.run()
        self._report.end()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _covering_plan(self, plan: LoadPlan, planner: LoadPlanner) -> LoadPlan:
        """Return the plan, or a new one if the metadata of other ranks was added while it was made, or has to be."""
        missing = find_uncovered(plan, planner, self._metadata)
        of_ranks = self._of_ranks
        if of_ranks is not None and missing is not None:
            of_ranks.merge()
        if of_ranks is not None and of_ranks.was_extended:
            plan = planner.finish_plan(planner.create_local_plan())
            missing = find_uncovered(plan, planner, self._metadata)
        if missing is None:
            return plan
        raise CorruptCheckpointError(
            f"{self.checkpoint_id} has not all elements of {missing!r} that this rank wants, or some of them twice. "
            "Its metadata is damaged, or one of several ranks saved its shards alone (no_dist=True), so that only that "
            "rank can load them. Use another checkpoint"
        )

    def _run(self, download: Download, reads: Iterable[Read]) -> None:
        run_reads(download, self._report.expecting(reads), self._raise_if_replaced, self._replaced)

    def _raise_if_replaced(self, error: AzureCheckpointError) -> None:
        seen = self._seen
        etags = {} if seen is None else {seen.name: seen.etag}
        if self._of_ranks is not None:
            etags = self._of_ranks.etags
        if is_replaced(self._store, self._location, etags):
            raise self._replaced() from error

    def _replaced(self) -> CheckpointReplacedError:
        return replaced_error(self._location)

    def _read_metadata(self, rank: int | None) -> Metadata:
        if rank is None:
            opened = read_metadata(self._store, self._location, [None])
            metadata = opened[0].metadata if opened else None
            etags = {metadata_name(): opened[0].stored.etag} if opened else {}
            if isinstance(metadata, ColumnMetadata):
                metadata = whole_tensors(metadata)
        else:
            self._of_ranks = read_rank_metadata(self._store, self._location, rank)
            metadata = None if self._of_ranks is None else self._of_ranks.metadata
            etags = {} if self._of_ranks is None else self._of_ranks.etags
        if metadata is None:
            raise self._why_no_metadata or not_found_error(self._store, self._location, metadata_name(rank))
        meta = metadata.storage_meta or StorageMeta()
        meta.load_id = str(uuid.uuid4())
        metadata.storage_meta = meta
        group = SaveGroup.of(metadata)
        self._seen = SeenMetadata(*next(iter(etags.items())), None if rank is None or group is None else group.id)
        return metadata


class _Unreadable(Metadata):
    """Takes the place of metadata that could not be read: every use of it raises the reason."""

    def __init__(self, error: AzureCheckpointError) -> None:
        object.__setattr__(self, "error", error)

    def __getattribute__(self, name: str) -> Any:
        if name == "error" or name.startswith("__"):
            return object.__getattribute__(self, name)
        raise object.__getattribute__(self, "error")
