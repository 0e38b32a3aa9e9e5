"""`AzureBlobHuggingFaceWriter`: saves a sharded model as the safetensors files that transformers loads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs import outcome
from azure_torch_ckpt.blobs.outcome import Outcome
from azure_torch_ckpt.blobs.upload import Item
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.base import BaseWriter, SaveTicket, step
from azure_torch_ckpt.dcp.commit import commit
from azure_torch_ckpt.dcp.metadata.columns import entries_of
from azure_torch_ckpt.dcp.metadata.views import show_columns
from azure_torch_ckpt.dcp.planners import keeps_its_memory, with_plain_keys
from azure_torch_ckpt.dcp.removal import remove_blobs
from azure_torch_ckpt.dcp.tensors.memory import is_plain, tensor_views
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    BlobNotFoundError,
    CheckpointError,
    CheckpointExistsError,
    CommitConflictError,
)
from azure_torch_ckpt.huggingface.blob_names import (
    INDEX,
    INDEX_LIMIT,
    SINGLE,
    dump_index,
    name_prefix,
    new_save_id,
    parse_index,
)
from azure_torch_ckpt.huggingface.block_stager import BlockStager, StagedBlock, rank_block_id
from azure_torch_ckpt.huggingface.joining import join, joined_block_size
from azure_torch_ckpt.huggingface.leftovers import other_files_at, saved_files_at
from azure_torch_ckpt.huggingface.model_layout import (
    LARGEST_IN_BLOCKS,
    ItemRuns,
    ModelLayout,
    WrittenItem,
    check_whole,
    check_written,
    checksums_of,
    lay_out,
)
from azure_torch_ckpt.huggingface.safetensors_header import dump_header
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import ProgressOption
from azure_torch_ckpt.transport.buffers import Gather

__all__ = ["AzureBlobHuggingFaceWriter"]

_log = logging.getLogger(__name__)

_HEADER_RANK = 999_999  # in the ids of blocks; larger than any real rank


@dataclasses.dataclass(frozen=True, slots=True)
class _ModelTicket(SaveTicket):
    """The ticket that comes back from the coordinator: the largest block in bytes, and the runs of the rank's items."""

    block_size: int = 0
    runs: Mapping[MetadataIndex, ItemRuns] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class _OldModel:
    """What was at the URL when the save began: the index, its ETag, and the ETag of ``model.safetensors``, if any."""

    index: bytes | None = None
    index_etag: str | None = None
    single_etag: str | None = None


class AzureBlobHuggingFaceWriter(BaseWriter):
    """Save a model's state dict under a URL as safetensors files with ``model.safetensors.index.json``.

        dcp.save(model.state_dict(), storage_writer=AzureBlobHuggingFaceWriter(url))

    Every file holds whole tensors, whatever the number of ranks: a rank stages its rows as blocks of the file, and the
    coordinator commits the list of all blocks. Nothing is gathered, and nothing is joined afterwards. This holds for
    plain tensors and for DTensors whose shards are rows (``Shard(0)``, as FSDP2 has them) or other long runs of bytes.
    Other shards (columns, as tensor parallelism has them) are stored as they are first. The coordinator reads them
    again and joins them, range by range in bounded memory: their bytes are moved three times, twice by the coordinator.

    The files of a save have names that no other save has, and the index, which names them, is written last. A save that
    raised, or died, left the model at the URL untouched. The next save removes what it left.

    Args:
        url, credential, options, ca_file: as for `AzureBlobWriter`.
        overwrite: whether a model at the URL may be replaced. Its files are removed once the new index is there. **For
            readers that follow the index** (transformers, torch, this package) the model is at every moment the old or
            the new one. **Readers that list ``*.safetensors`` instead** (vLLM and SGLang on an ``az://`` URL) find the
            files of both models, and load a mixture without an error: while the files are exchanged, and after a
            process has died in that moment, until the next save or `prune`. Blob Storage cannot exchange several files
            at once. Save each model at a URL of its own for such readers.
        fqn_to_index_mapping: the number of each tensor's file, from 1 on, as for torch's ``HuggingFaceStorageWriter``.
            None fills files one after the other.
        max_file_size: bytes of a file, without `fqn_to_index_mapping`. A larger tensor has a file of its own.
        progress: as for `AzureBlobWriter`.

    Raises:
        LocationError, CredentialError: the URL or the credential cannot be used.
        MissingDependencyError: ``progress=True``, and tqdm is not installed.
        ValueError: `max_file_size` is not positive.

    Errors while saving are those of `azure_torch_ckpt.errors`; see `AzureBlobWriter`.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | BlobLocation,
        *,
        credential: Credential = None,
        overwrite: bool = False,
        fqn_to_index_mapping: Mapping[str, int] | None = None,
        max_file_size: int = 5_000_000_000,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
        progress: ProgressOption = None,
    ) -> None:
        super().__init__(url, Access(credential, options, ca_file), progress, overwrite)
        if max_file_size < 1:
            raise ValueError(f"max_file_size must be positive, not {max_file_size}")
        self._mapping = fqn_to_index_mapping
        self._max_file_size = max_file_size
        self._replaces = _OldModel()
        self._layout = ModelLayout([], [], {}, [])
        self._joined_block_size = 0
        self._save_id = ""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        save = self._begin_save(is_coordinator)
        if not kwargs.get("use_collectives", True):
            error = CheckpointError(
                "All ranks write a HuggingFace file together, which use_collectives=False does not allow. Omit it"
            )
            save._report.end(error)
            raise error

    @step
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Remove what this writer's failed saves left, and look at the model that this save replaces.

        Raises:
            CheckpointError: a value of the state dict is not a tensor, or a key not a string.
            CheckpointExistsError: a model or another safetensors file is there and ``overwrite`` is False.
        """
        plan = with_plain_keys(plan)
        others = [item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO]
        if others:
            raise CheckpointError(
                f"A HuggingFace file holds tensors only, and {others[0]!r} is not one ({len(others)} in all). Save "
                "model.state_dict(), and the rest with AzureBlobWriter"
            )
        if self._is_coordinator:
            self._remove_abandoned()
            self._replaces = self._look_at_url()
        return dataclasses.replace(plan, storage_data=SaveTicket(self._nonce, where=self._within_account()))

    @step
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Decide which tensor is in which file, and which rank writes which bytes. Errors as of `lay_out`."""
        if not all(getattr(plan, "usable", True) and isinstance(plan.storage_data, SaveTicket) for plan in plans):
            raise CheckpointError(
                "A rank's plan is from an earlier save (enable_plan_caching), or the planner has replaced its "
                "storage_data. Use AzureSavePlanner, which keeps plans without that"
            )
        for rank, plan in enumerate(plans):
            self._check_same_url(rank, plan.storage_data)
        # Enough for the rank with most to write, and such that the largest tensor fits into one file.
        sizes = [_size_of(plan) for plan in plans]
        least = -(-_largest(plans) // LARGEST_IN_BLOCKS)
        block_size = max(self._store.options.part_size(max(sizes, default=0)), least)
        self._joined_block_size = max(joined_block_size(self._store.options, sum(sizes)), least)
        self._save_id = new_save_id()
        self._layout = lay_out(
            plans,
            self._save_id,
            mapping=self._mapping,
            max_file_size=self._max_file_size,
            block_size=block_size,
            joined_block_size=self._joined_block_size,
        )
        return [
            dataclasses.replace(
                plan,
                storage_data=_ModelTicket(
                    plan.storage_data.nonce, self._save_id, rank, block_size=block_size, runs=runs
                ),
            )
            for rank, (plan, runs) in enumerate(zip(plans, self._layout.runs, strict=True))
        ]

    @step
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Stage this rank's bytes of all files; `CheckpointError` if the planner gives a tensor it had not planned."""
        ticket = plan.storage_data
        if not isinstance(ticket, _ModelTicket) or ticket.nonce != self._nonce:
            raise CheckpointError(
                "The planner gave the plan of an earlier save (enable_plan_caching). Use AzureSavePlanner, which keeps "
                "plans without that"
            )
        assert ticket.save_id is not None and ticket.rank is not None
        runs = ticket.runs
        items = sorted(plan.items, key=lambda item: (runs[item.index].file, runs[item.index].starts))
        own = sum(one.length for one in runs.values())
        to_join = sum(tensor.length for tensor in self._layout.joined) if self._is_coordinator else 0
        written = []
        lent = not keeps_its_memory(planner)
        with (
            self._report.transfer(len(items), own + to_join) as meter,
            BlockStager(self._store, ticket.save_id, ticket.rank, ticket.block_size, meter.moved) as stager,
        ):
            for item in items:
                in_file = runs[item.index]
                views = _views(item, planner.resolve_data(item), ticket.block_size // 4, lent)
                path = self._location.join(in_file.file).path
                written.append(stager.add(path, in_file.starts, in_file.run, views))
            stager.finish()
            if to_join:
                meter.pause()
        checksums = self._store.options.checksums
        results = [
            WriteResult(
                index=item.index,
                size_in_bytes=runs[item.index].length,
                storage_data=WrittenItem(
                    runs[item.index],
                    tuple(one.crc64() for one in done) if checksums else None,
                    () if number else tuple(stager.blocks),
                ),
            )
            for number, (item, done) in enumerate(zip(items, written, strict=True))
        ]
        return self._end_of_write(results)

    @step
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the files, then the index that names them, then remove what was replaced.

        Raises:
            IncompleteSaveError: a planned item was not written. Nothing was committed.
            CommitConflictError: another save committed at this URL meanwhile. Its model was left alone.
            CommitUnknownError: whether the index was written is unknown. The model at the URL is whole, the old one or
                the new one, and nothing was deleted.
            StoreError: the service could not be asked. The model at the URL is whole, the old one or the new one.
        """
        if (entries := entries_of(metadata)) is not None:
            show_columns(metadata, entries)
        written = [result.storage_data for rank in results for result in rank]
        blocks: dict[str, list[StagedBlock]] = {}
        for block in itertools.chain.from_iterable(one.blocks for one in written):
            blocks.setdefault(block.path, []).append(block)
        check_written(self._layout, self._location, blocks)
        self._unfinished = (self._location, self._save_id)
        items = self._join(blocks, written)
        check_whole(self._layout, self._location, blocks)
        self._commit_files({file.name: dump_header(file.tensors) for file in self._layout.files}, blocks)
        remove_blobs(self._store, self._location, self._layout.shards)
        index = dump_index(
            {name: file.name for file in self._layout.files for name in file.tensors},
            sum(file.length for file in self._layout.files),
            self._save_id,
            checksums_of(results, items) if self._store.options.checksums else {},
        )
        strays = self._strays()
        write_index = functools.partial(
            commit,
            self._store,
            self._location,
            INDEX,
            index,
            what="model",
            if_etag=self._replaces.index_etag,
            has_data=self._has_files,
            always_ask=True,
        )
        self._commit_or_remove(write_index, [file.name for file in self._layout.files])
        self._remove_replaced(strays)
        self._report.end(checkpoint_bytes=sum(file.length for file in self._layout.files))

    def _join(self, blocks: dict[str, list[StagedBlock]], written: list[WrittenItem]) -> dict[str, list[Item]]:
        """Join the tensors of which the ranks stored chunks; add to `blocks`, and return the items of each tensor."""
        if not self._layout.shards:
            return {}
        self._commit_files(dict.fromkeys(self._layout.shards), blocks)
        sums = {
            (one.runs.file, one.runs.starts[0]): None if one.crc64 is None else one.crc64[0]
            for one in written
            if one.runs.length
        }
        with self._report.paused():
            joined = join(
                self._store,
                self._location,
                self._layout.joined,
                sums,
                self._save_id,
                self._joined_block_size,
                self._report.moved,
            )
        for block in joined.blocks:
            blocks.setdefault(block.path, []).append(block)
        return joined.items

    def _commit_files(self, headers: Mapping[str, bytes | None], blocks: Mapping[str, list[StagedBlock]]) -> None:
        run_all(
            (functools.partial(self._commit_file, name, header, blocks) for name, header in headers.items()),
            self._store.options.concurrency,
            "blob-commit",
        )

    def _commit_file(self, name: str, header: bytes | None, blocks: Mapping[str, list[StagedBlock]]) -> None:
        path = self._location.join(name).path
        ids = [block.id for block in sorted(blocks.get(path, ()), key=lambda one: one.offset)]
        if header is not None:
            ids.insert(0, rank_block_id(self._save_id, _HEADER_RANK, 0))
            crc = crc64(header) if self._store.options.checksums else None
            self._store.stage_block(path, ids[0], Gather([memoryview(header)]), crc)
        self._store.commit_blocks(path, ids)

    @staticmethod
    def _data_prefix(save_id: str) -> str:
        return name_prefix(save_id)

    def _has_files(self) -> bool:
        """Whether the files of this save exist, as far as the credential may list.

        Another save may have been committed and removed before the first commit of this one. It took the files of this
        one for leftovers.
        """
        prefix = self._location.prefix
        try:
            listed = {blob.path[len(prefix) :] for blob in self._store.list(prefix + name_prefix(self._save_id))}
        except AccessDeniedError:  # listing is not necessary to save
            return True
        return listed >= {file.name for file in self._layout.files}

    def _look_at_url(self) -> _OldModel:
        index = index_etag = single_etag = None
        with contextlib.suppress(BlobNotFoundError):
            index, index_etag = self._store.read(self._location.join(INDEX).path, limit=INDEX_LIMIT)
        with contextlib.suppress(BlobNotFoundError):
            single_etag = self._store.stat(self._location.join(SINGLE).path).etag
        if (index_etag or single_etag) and not self._overwrite:
            raise CheckpointExistsError(
                f"There is a model at {self.checkpoint_id} and overwrite=False. Use another URL; or overwrite=True to "
                "replace it, if no reader that lists files instead of reading the index (vLLM, SGLang) comes meanwhile"
            )
        if not self._overwrite:
            self._check_alone()
        return _OldModel(index, index_etag, single_etag)

    def _check_alone(self) -> None:
        """Raise `CheckpointExistsError` for other safetensors files: readers that list files would load them, too."""
        try:
            others = other_files_at(self._store, self._location)
        except AccessDeniedError:  # listing is not necessary to save
            return
        if others:
            raise CheckpointExistsError(
                f"{others[0][:200]!r} is at {self.checkpoint_id} ({len(others)} such in all), and readers that list "
                "files (vLLM, SGLang) would load it together with this model. Use another URL, or remove it first; "
                "overwrite=True saves beside it, for readers that follow the index"
            )

    def _strays(self) -> set[str]:
        """List the files of other saves at the URL, which no model needs once this save has written its index.

        A save that is still running may have made some of them. But it began before this commit, on the condition that
        the index has not changed, so it cannot commit any more.
        """
        try:
            names = saved_files_at(self._store, self._location)
            return {name for name in names if not name.startswith(name_prefix(self._save_id))}
        except AzureCheckpointError as error:
            _log.info("leftovers at %s are not removed, for they cannot be listed: %s", self.checkpoint_id, error)
            return set()

    def _remove_replaced(self, strays: set[str]) -> None:
        replaced = self._replaces
        if replaced.single_etag is not None:
            # This costs more than storage: of the two, transformers loads this one.
            path = self._location.join(SINGLE).path
            result = outcome.delete(self._store, path, if_etag=replaced.single_etag)
            if result.outcome is Outcome.LOST:
                raise CommitConflictError(
                    f"Another process wrote {SINGLE} at {self.checkpoint_id} since this save began, and transformers "
                    "loads that one. The new model is beside it; remove the one that you do not want"
                ) from result.error
            if result.outcome is Outcome.UNKNOWN:
                raise result.unknown(
                    f"The new model is at {self.checkpoint_id}, but whether the old {SINGLE} beside it was removed is "
                    "unknown, and transformers prefers that one. Remove it"
                )
        old = strays
        if replaced.index is not None:
            try:
                old |= set(parse_index(replaced.index, f"{self.checkpoint_id}/{INDEX}").files.values())
            except Exception as error:  # this save is committed, and stays so
                _log.warning("files of the replaced model were not removed, for its index is unreadable: %s", error)
        remove_blobs(self._store, self._location, sorted(old - {file.name for file in self._layout.files}))


def _largest(plans: list[SavePlan]) -> int:
    """Bytes of the largest tensor of all ranks."""
    planned = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None]
    return max((data.size.numel() * data.properties.dtype.itemsize for data in planned), default=0)


def _size_of(plan: SavePlan) -> int:
    """Bytes of a rank's chunks."""
    planned = [item.tensor_data for item in plan.items if item.tensor_data is not None]
    return sum(data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in planned)


def _views(item: WriteItem, data: torch.Tensor | io.BytesIO, limit: int, lent: bool) -> Iterable[memoryview]:
    """The bytes of an item's tensor; `CheckpointError` if it is not the planned one, or not a plain tensor."""
    planned = item.tensor_data
    name = item.index.fqn
    if not isinstance(data, torch.Tensor) or planned is None:
        raise CheckpointError(f"The planner gave {type(data).__name__} for {name!r}, not a tensor")
    if data.dtype != planned.properties.dtype or data.shape != planned.chunk.sizes:
        raise CheckpointError(
            f"The planner gave {data.dtype} of shape {tuple(data.shape)} for {name!r}, where it had planned "
            f"{planned.properties.dtype} of shape {tuple(planned.chunk.sizes)}"
        )
    tensor = data.detach()
    if tensor.is_meta:
        raise CheckpointError(
            f"{name!r} is on the meta device, where tensors have no values to save. Materialise it first"
        )
    if not is_plain(tensor) and tensor.layout is torch.strided and not tensor.is_quantized:
        tensor = tensor.resolve_conj().resolve_neg()
    if not is_plain(tensor):
        raise CheckpointError(
            f"{name!r} is a {type(data).__name__} with layout {data.layout}, and safetensors holds plain tensors only. "
            "Make it dense, or save it with AzureBlobWriter"
        )
    return tensor_views(tensor, max(limit, 1), copies=lent)
