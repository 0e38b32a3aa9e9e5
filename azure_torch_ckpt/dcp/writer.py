"""`AzureBlobWriter`: the ``StorageWriter`` of torch.distributed.checkpoint that saves into Blob Storage."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import math
import os
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from azure_torch_ckpt._internal.gc_pause import CollectorPause, without_collector
from azure_torch_ckpt._internal.torch_private import CURRENT_DCP_VERSION
from azure_torch_ckpt.blobs.blob_info import CopiedSettings
from azure_torch_ckpt.blobs.upload import Item, Upload
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.base import BaseWriter, SaveTicket, step
from azure_torch_ckpt.dcp.blob_names import data_name, new_save_id
from azure_torch_ckpt.dcp.commit import commit_metadata
from azure_torch_ckpt.dcp.item_reader import item_name
from azure_torch_ckpt.dcp.metadata.columns import entries_of
from azure_torch_ckpt.dcp.metadata.front import dump_with_index
from azure_torch_ckpt.dcp.metadata.index import StoredColumns
from azure_torch_ckpt.dcp.metadata.schema import dump_metadata, storage_meta
from azure_torch_ckpt.dcp.metadata.views import StoredItems, data_paths, in_memory, plain_metadata, show_columns
from azure_torch_ckpt.dcp.metadata_blob import MetadataBlob, open_metadata_blob, read_metadata_blob
from azure_torch_ckpt.dcp.planners import keeps_its_memory, with_plain_keys
from azure_torch_ckpt.dcp.removal import remove_blobs
from azure_torch_ckpt.dcp.save_group import SaveGroup, begin_group, raise_if_overtaken
from azure_torch_ckpt.dcp.tensors.memory import is_plain, own_bytes, tensor_views
from azure_torch_ckpt.dcp.tensors.torch_file import envelope, serialize
from azure_torch_ckpt.dcp.written_items import PackedItems, UploadedItem, WrittenItems, join_results
from azure_torch_ckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CorruptCheckpointError,
    IncompleteSaveError,
    UnsafeMetadataError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import ProgressOption

__all__ = ["AzureBlobWriter"]

_log = logging.getLogger(__name__)

# Bytes around the payload of a tensor; a little more than most take. With too small an estimate, a save could need one
# block more than planned.
_ENVELOPE = 2048

# Items from which on metadata has an index. Below, to make and read columns takes longer than to go without them.
_INDEX_FROM = 4096


class AzureBlobWriter(BaseWriter):
    """Save a checkpoint under a URL in Blob Storage, every rank its own shard.

    A save that raised left the checkpoint at the URL untouched. A save that returned can be loaded, with
    `AzureBlobReader` or, once the prefix is copied to a disk, with torch's ``FileSystemReader``.

    One writer does any number of saves, one after the other or at the same time in several threads (as a second
    ``async_save`` does before the first is done): give each its URL as ``checkpoint_id=``.

    With ``dcp.save(..., use_collectives=False)`` every rank commits metadata of its own, and the checkpoint is complete
    once all ranks have. `AzureBlobReader` loads it on any number of ranks. Give each such save a URL of its own: where
    one replaces another, a crash in the middle leaves neither. If only the ranks of a ``process_group=`` save, only
    they can load it again, for torch does not tell a writer how many there are.

    Args:
        url: of the checkpoint, ``https://account.blob.core.windows.net/container/run/step-1000`` or
            ``azblob://account/container/run/step-1000``, with or without a SAS. The container must exist.
        credential: None for ``DefaultAzureCredential``; a ``TokenCredential``, ``AzureSasCredential``,
            ``AzureNamedKeyCredential``, account key, SAS or connection string; False for anonymous access. A SAS in
            the URL wins.
        overwrite: whether a checkpoint at the URL may be replaced, as torch's ``FileSystemWriter`` does by default.
            The old one stays until the new one is complete. False refuses before any data is written.
        options: limits of connections, memory and time.
        ca_file: a PEM file with certificates to trust besides the platform's.
        progress: True for a tqdm bar, or a callback that takes a `Progress`; both on rank 0 only, unless the callback
            is given as ``AllRanks(callback)``.

    Raises:
        LocationError: the URL is not one of Blob Storage.
        CredentialError: the credential cannot be used.
        MissingDependencyError: ``progress=True``, and tqdm is not installed.

    Errors while saving are those of `azure_torch_ckpt.errors`. ``dcp.save`` and ``dcp.load`` carry them to every rank
    in torch's ``CheckpointException``: ``failures[rank][0]`` is the error.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | BlobLocation,
        *,
        credential: Credential = None,
        overwrite: bool = True,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
        progress: ProgressOption = None,
    ) -> None:
        super().__init__(url, Access(credential, options, ca_file), progress, overwrite)
        self._rank: int | None = None
        self._use_collectives = True
        self._group: SaveGroup | None = None
        self._replaces: MetadataBlob | None = None
        # By its URL: the ETag of the metadata of the last save, and the names of its data blobs. For all threads.
        self._committed: dict[str, tuple[str, set[str]]] = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        save = self._begin_save(is_coordinator)
        save._rank = kwargs.get("rank")
        save._use_collectives = kwargs.get("use_collectives", True)
        if not save._use_collectives:
            self._begin_group()  # before anything can fail on one rank alone: it counts

    @step
    def _begin_group(self) -> None:
        self._group = begin_group(self.checkpoint_id, self._rank)

    @step
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Remove what this writer's failed saves left, and read the metadata of the checkpoint that this save replaces.

        Raises:
            CheckpointError: a key of the state dict is not a string.
            CheckpointExistsError: there is a checkpoint and ``overwrite`` is False, or it is of the other kind (saved
                with collectives, and this save is without).
        """
        plan = with_plain_keys(plan)
        if self._is_coordinator or not self._use_collectives:
            self._remove_abandoned()
            self._replaces = self._look_at_url()
        ticket = SaveTicket(self._nonce, rank=self._metadata_rank, where=self._within_account())
        return dataclasses.replace(plan, storage_data=ticket)

    @step
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give the save its id, and every rank a number for its blob."""
        save_id = new_save_id()
        self._unfinished = (self._location, save_id)
        planned = []
        for rank, plan in enumerate(plans):
            ticket = plan.storage_data
            if not getattr(plan, "usable", True):
                planned.append(plan)  # a placeholder for the plan that this rank's planner has in its cache
                continue
            if not isinstance(ticket, SaveTicket):
                raise CheckpointError(
                    f"The planner replaced SavePlan.storage_data of rank {rank} with {type(ticket).__name__}; that "
                    "field belongs to the storage writer. Put the planner's own data into planner_data"
                )
            self._check_same_url(rank, ticket)
            number = rank if ticket.rank is None else ticket.rank
            planned.append(
                dataclasses.replace(plan, storage_data=dataclasses.replace(ticket, save_id=save_id, rank=number))
            )
        return planned

    @step
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Upload this rank's items as one blob; return the position of each."""
        ticket = plan.storage_data
        if not isinstance(ticket, SaveTicket):
            ticket = SaveTicket("", rank=self._rank)  # from the planner's cache, of a save with another kind of writer
        save_id = ticket.save_id or self._nonce
        if ticket.nonce != self._nonce:
            # The planner took the plan of an earlier save from its cache. This save must not touch its blobs.
            save_id = self._nonce
        name = data_name(save_id, ticket.rank or 0)
        total = sum(_planned_size(item) for item in plan.items)
        checksums = self._store.options.checksums
        written: list[tuple[WriteItem, Item, int | None]] = []
        path = self._location.join(name).path
        lent = not keeps_its_memory(planner)
        with (
            self._report.transfer(len(plan.items), total) as meter,
            Upload(self._store, path, total, moved=meter.moved) as upload,
        ):
            for write_item in without_collector(plan.items):
                data = planner.resolve_data(write_item)
                # Every block takes whole views. Views of a quarter of a block leave little of it empty.
                views, payload_offset, copies = _views(write_item, data, upload.block_size // 4, lent)
                written.append((write_item, upload.add(views, copies=copies), payload_offset))
            upload.finish()
        items = [
            UploadedItem(write_item, item.offset, item.length, payload_offset, item.crc64() if checksums else None)
            for write_item, item, payload_offset in without_collector(written)
        ]
        # torch hands them to `finish` and to nobody else.
        return self._end_of_write(cast("list[WriteResult]", WrittenItems(name, items)))

    @step
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that the results cover the plan, make the checkpoint visible, and remove the one that it replaced.

        Raises:
            IncompleteSaveError: a planned item was not written. Nothing was committed.
            CommitConflictError: another save committed at this URL meanwhile. Its checkpoint was left alone.
            CommitUnknownError: whether the commit was carried out is unknown. The checkpoint at the URL is the old one
                or this one, whole, and nothing was deleted.
        """
        written = [rank for rank in cast("list[WrittenItems | PackedItems]", results) if len(rank)]
        names = {rank.blob for rank in written}
        try:
            with CollectorPause():
                metadata.version = CURRENT_DCP_VERSION
                save_id = self._unfinished[1] if self._unfinished else None
                group = self._group
                metadata.storage_meta = storage_meta(
                    self.checkpoint_id,
                    save_id,
                    save_group=None if group is None else group.id,
                    ranks=None if group is None else group.ranks,
                )
                columns = self._columns(metadata, written) if sum(map(len, written)) >= _INDEX_FROM else None
                data = self._dump(metadata, written) if columns is None else self._dump_columns(metadata, columns)
        except CheckpointError:
            self._unfinished = None
            remove_blobs(self._store, self._location, sorted(names), [""])
            raise
        settings = None if group is None else CopiedSettings(metadata=group.marks())
        rank = self._metadata_rank

        def commit() -> str:
            if group is not None:
                raise_if_overtaken(self.checkpoint_id, group)
            return commit_metadata(self._store, self._location, data, self._replaces, rank, settings)

        etag = self._commit_or_remove(commit, names)
        if self._replaces is not None:
            self._remove_replaced(self._replaces, names)
        self._committed.clear()
        self._committed[self.checkpoint_id] = (etag, names)
        self._report.end(checkpoint_bytes=sum(rank.nbytes for rank in written))

    @staticmethod
    def _columns(metadata: Metadata, written: list[WrittenItems | PackedItems]) -> StoredColumns | None:
        entries = entries_of(metadata)
        return None if entries is None else join_results(entries, [rank.packed() for rank in written])

    def _dump_columns(self, metadata: Metadata, columns: StoredColumns) -> bytes:
        """Make the content of ``.metadata`` with an index, and let `metadata` be small: torch sends it to all ranks."""
        where = f"The metadata of {self.checkpoint_id}"
        data = dump_with_index(metadata, columns, where)
        metadata.storage_data = StoredItems(columns.index, in_memory(b"".join(columns.encoded)), where)
        show_columns(metadata, columns.index.entries)
        return data

    def _dump(self, metadata: Metadata, written: list[WrittenItems | PackedItems]) -> bytes:
        """Make it as torch's own writer does: of few items, and of a plan that columns cannot hold or that failed."""
        metadata.storage_data = {index: info for rank in written for index, info in rank.storage_data().items()}
        try:
            return dump_metadata(plain_metadata(metadata), f"The metadata of {self.checkpoint_id}")
        except UnsafeMetadataError as error:
            if isinstance(error.__cause__, CorruptCheckpointError):
                _check_complete(metadata, self.checkpoint_id)  # the likely reason, and it has a better message
            raise

    @staticmethod
    def _data_prefix(save_id: str) -> str:
        return f"{save_id}/"

    @property
    def _metadata_rank(self) -> int | None:
        """The rank whose metadata this save commits; None if it commits the metadata of all ranks."""
        return None if self._use_collectives else self._rank

    def _has_finish(self) -> bool:
        return self._is_coordinator or not self._use_collectives

    def _look_at_url(self) -> MetadataBlob | None:
        if not self._use_collectives and read_metadata_blob(self._store, self._location) is not None:
            raise CheckpointExistsError(
                f"There is a checkpoint of all ranks at {self.checkpoint_id}; readers would prefer it to one that "
                "is saved with use_collectives=False. Use another URL, or remove that checkpoint first"
            )
        stored = read_metadata_blob(self._store, self._location, self._metadata_rank)
        if stored is not None:
            if not self._overwrite:
                raise CheckpointExistsError(
                    f"There is a checkpoint at {self.checkpoint_id} and overwrite=False. Use another URL, or "
                    "overwrite=True to replace it once the new one is complete"
                )
            _log.info("the checkpoint at %s will be replaced", self.checkpoint_id)
        return stored

    def _remove_replaced(self, replaced: MetadataBlob, names: set[str]) -> None:
        known = self._committed.get(self.checkpoint_id)
        if known is not None and known[0] == replaced.etag:
            old_names = known[1]  # this writer's last save; parsing its metadata again would take time
        else:
            try:
                old = open_metadata_blob(self._store, self._location, self._metadata_rank, replaced)
            except Exception as error:  # this save is committed, and stays so
                _log.warning(
                    "the data of the replaced checkpoint was not removed, for its metadata is unreadable: %s", error
                )
                return
            old_names = data_paths(old)
        remove_blobs(self._store, self._location, sorted(old_names - names))


def _planned_size(item: WriteItem) -> int:
    """Estimate the bytes of an item from the plan: 0 for an object, whose pickle does not exist yet."""
    if item.tensor_data is None:
        return 0
    return _ENVELOPE + math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _views(
    item: WriteItem, data: torch.Tensor | io.BytesIO, limit: int, lent: bool
) -> tuple[Iterable[memoryview], int | None, bool]:
    """Serialise an item as torch.save does, with copies of at most `limit` bytes of parts of the tensor.

    Args:
        lent: whether the planner may use the memory of `data` for the next item, so that the views must be of copies.

    Returns:
        The views; the offset in them where the tensor's raw bytes start, if they are the planned ones; and whether the
        views are of copies.
    """
    if item.type == WriteItemType.BYTE_IO:
        if not isinstance(data, io.BytesIO):
            raise CheckpointError(f"The planner gave {type(data).__name__} for {item.index.fqn!r}, not io.BytesIO")
        return [memoryview(data.getvalue()) if lent else data.getbuffer().toreadonly()], None, True
    if not isinstance(data, torch.Tensor):
        raise CheckpointError(f"The planner gave {type(data).__name__} for {item.index.fqn!r}, not a tensor")
    if data.is_meta:
        raise CheckpointError(
            f"{item.index.fqn!r} is on the meta device, where tensors have no values to save. Materialise it first"
        )
    if data.layout is not torch.strided:
        # torch.save could write it, but no planner could load it: planners narrow the tensor that they load into.
        raise CheckpointError(
            f"{item.index.fqn!r} has the layout {data.layout}, and torch.distributed.checkpoint loads strided tensors "
            "only. Save it dense (to_dense()), or save its indices and values as tensors of their own"
        )
    tensor = data
    own = own_bytes(tensor)
    if own is None and not is_plain(tensor):
        tensor = tensor.detach()
        if not tensor.is_quantized:
            tensor = tensor.resolve_conj().resolve_neg()
        if not is_plain(tensor):
            views = serialize(_alone(tensor))
            return [memoryview(bytes(view)) for view in views] if lent else views, None, True
        own = own_bytes(tensor)
    around = envelope(tensor.dtype, tensor.shape)
    planned = item.tensor_data
    # A planner may save another dtype or shape than it planned. Then the item can be read with torch.load only.
    as_planned = (
        planned is not None and tensor.dtype == planned.properties.dtype and tensor.shape == planned.chunk.sizes
    )
    payload_offset = len(around.head) if as_planned else None
    head, trailer = memoryview(around.head), memoryview(around.trailer)
    if own is not None and not lent:
        return (head, own, trailer), payload_offset, False
    return itertools.chain((head,), tensor_views(tensor.detach(), limit, copies=lent), (trailer,)), payload_offset, True


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU and to a storage of its own if necessary: torch.save writes a view's whole storage."""
    tensor = tensor.cpu()
    if tensor.untyped_storage().size() != tensor.nbytes:
        tensor = tensor.clone()
    return tensor


def _check_complete(metadata: Metadata, where: str) -> None:
    """Raise `IncompleteSaveError` unless every chunk and object of the metadata was written."""
    missing = []
    for fqn, entry in metadata.state_dict_metadata.items():
        indices = (
            [MetadataIndex(fqn, chunk.offsets) for chunk in entry.chunks]
            if isinstance(entry, TensorStorageMetadata)
            else [MetadataIndex(fqn)]
        )
        missing += [index for index in indices if index not in metadata.storage_data]
    if missing:
        named = ", ".join(map(item_name, missing[:5]))
        raise IncompleteSaveError(
            f"{len(missing)} of the planned items were not written ({named}{', ...' if len(missing) > 5 else ''}), so "
            f"nothing was committed at {where}. A rank or a planner dropped them; save again"
        )
