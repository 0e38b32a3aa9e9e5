"""`AzureBlobHuggingFaceWriter`: saves a sharded model as the safetensors files that transformers loads."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs import outcome
from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.outcome import Outcome, Result
from azure_torch_ckpt.blobs.transfer import Item
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.base import SavingPlace, step
from azure_torch_ckpt.dcp.layout import new_save_id, remove_blobs
from azure_torch_ckpt.dcp.planners import keeps_its_memory, with_plain_keys
from azure_torch_ckpt.dcp.report import TransferReport
from azure_torch_ckpt.dcp.tensors.memory import is_plain
from azure_torch_ckpt.dcp.tensors.views import tensor_views
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    BlobNotFoundError,
    CheckpointError,
    CheckpointExistsError,
    CommitConflictError,
    StoreError,
)
from azure_torch_ckpt.huggingface.blocks import Block, Runs, run_id
from azure_torch_ckpt.huggingface.format import INDEX, INDEX_LIMIT, SINGLE, dump_header, dump_index, parse_index
from azure_torch_ckpt.huggingface.joining import join, joined_block_size
from azure_torch_ckpt.huggingface.layout import LARGEST_IN_BLOCKS, Arrangement, Place, arrange, file_prefix
from azure_torch_ckpt.huggingface.leftovers import other_files_at, saved_files_at
from azure_torch_ckpt.huggingface.write_results import Written, check_whole, check_written, checksums_of
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import ProgressOption
from azure_torch_ckpt.transport.buffers import Gather

__all__ = ["AzureBlobHuggingFaceWriter"]

_log = logging.getLogger(__name__)

_HEADER_RANK = 999_999  # larger than that of any real one


@dataclasses.dataclass(frozen=True, slots=True)
class _Ticket:
    """Travels in the plans: from a rank to the coordinator, and back with what the rank is to do."""

    nonce: str
    save_id: str = ""
    rank: int = 0
    block_size: int = 0
    places: Mapping[MetadataIndex, Place] = dataclasses.field(default_factory=dict)
    where: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class _Standing:
    """What stood at the URL when the save began."""

    index: bytes | None
    index_etag: str | None
    single_etag: str | None


class AzureBlobHuggingFaceWriter(SavingPlace, StorageWriter):
    """Save a model's state dict under a URL as safetensors files with ``model.safetensors.index.json``.

        dcp.save(model.state_dict(), storage_writer=AzureBlobHuggingFaceWriter(url))

    Every file holds whole tensors, whatever the number of ranks: a rank stages its rows as blocks of the file, and the
    coordinator commits the list of all blocks. Nothing is gathered, and nothing is put together afterwards. That is so
    for plain tensors and for DTensors whose shards are rows (``Shard(0)``, as FSDP2 has them), or long runs of bytes
    otherwise. Other shards (columns, as tensor parallelism has them) are stored as they are first, and the coordinator
    reads them again and joins them, range by range in bounded memory: their bytes are moved three times, twice by it.

    The files of a save have names that no other save has, and the index, which names them, is written last. A save that
    raised, or died, left what stood at the URL before. What dead saves left at the URL is removed by the next one.

    Args:
        url, credential, options, ca_file: as for `AzureBlobWriter`.
        overwrite: whether a model at the URL may be replaced. Its files are removed once the new index is there. **For
            readers that go by the index** (transformers, torch, this package) the model is at every moment the old or
            the new one. **Readers that list ``*.safetensors`` instead** (vLLM and SGLang on an ``az://`` URL) find the
            files of both models, and load a mixture without an error: while the files are exchanged, and after a
            process has died in that moment, until the next save or `prune`. Blob Storage has no way to exchange several
            files at once. Save each model at a URL of its own where such readers may come.
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
        super().__init__(url, Access(credential, options, ca_file), TransferReport("save", progress))
        if max_file_size < 1:
            raise ValueError(f"max_file_size must be positive, not {max_file_size}")
        self._overwrite = overwrite
        self._mapping = fqn_to_index_mapping
        self._max_file_size = max_file_size
        self._is_coordinator = True
        self._nonce = new_save_id()
        self._standing = _Standing(None, None, None)
        self._plan = Arrangement([], [], {}, [])
        self._joined_block_size = 0
        self._save_id = ""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        save = self._begin_save()
        save._is_coordinator = is_coordinator
        save._nonce = new_save_id()
        save._report.begin(save.checkpoint_id, save._store, leads=is_coordinator)
        if not kwargs.get("use_collectives", True):
            error = CheckpointError(
                "A HuggingFace file is made by all ranks together, so use_collectives=False cannot be. Leave it away"
            )
            save._report.end(error)
            raise error

    @step
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Look at what stands at the URL.

        Raises:
            CheckpointError: the state dict has something that is no tensor, or a key that is no string.
            CheckpointExistsError: a model or another safetensors file is there and ``overwrite`` is False.
        """
        plan = with_plain_keys(plan)
        others = [item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO]
        if others:
            raise CheckpointError(
                f"A HuggingFace file holds tensors only, and {others[0]!r} is none ({len(others)} in all). Save "
                "model.state_dict(), and the rest with AzureBlobWriter"
            )
        if self._is_coordinator:
            self._remove_abandoned()
            self._standing = self._look_at_url()
        return dataclasses.replace(plan, storage_data=_Ticket(self._nonce, where=self._within_account()))

    @step
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Decide which tensor lies in which file, and which rank writes which bytes.

        Raises:
            CheckpointError: it cannot be done; see `arrange`.
        """
        if not all(getattr(plan, "usable", True) and isinstance(plan.storage_data, _Ticket) for plan in plans):
            raise CheckpointError(
                "A rank's plan is from an earlier save (enable_plan_caching), or the planner has replaced its "
                "storage_data. Use a planner without either"
            )
        for rank, plan in enumerate(plans):
            self._check_same_place(rank, plan.storage_data.where)
        # Enough for the rank with most to write, and such that the largest tensor fits into one file.
        sizes = [_size_of(plan) for plan in plans]
        least = -(-_largest(plans) // LARGEST_IN_BLOCKS)
        block_size = max(self._store.options.part_size(max(sizes, default=0)), least)
        self._joined_block_size = max(joined_block_size(self._store.options, sum(sizes)), least)
        self._save_id = new_save_id()[:16]
        self._plan = arrange(
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
                storage_data=_Ticket(plan.storage_data.nonce, self._save_id, rank, block_size, places),
            )
            for rank, (plan, places) in enumerate(zip(plans, self._plan.places, strict=True))
        ]

    @step
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Stage this rank's bytes of all files.

        Raises:
            CheckpointError: the planner gives another tensor than it planned.
            StoreError: a block could not be staged.
        """
        ticket = plan.storage_data
        if not isinstance(ticket, _Ticket) or ticket.nonce != self._nonce:
            raise CheckpointError(
                "The planner gave the plan of an earlier save (enable_plan_caching). Use a planner without it"
            )
        items = sorted(plan.items, key=lambda item: (ticket.places[item.index].file, ticket.places[item.index].starts))
        own = sum(place.length for place in ticket.places.values())
        to_join = sum(tensor.length for tensor in self._plan.scattered) if self._is_coordinator else 0
        written = []
        lent = not keeps_its_memory(planner)
        with (
            self._report.transfer(len(items), own + to_join) as meter,
            Runs(self._store, ticket.save_id, ticket.rank, ticket.block_size, meter.moved) as runs,
        ):
            for item in items:
                place = ticket.places[item.index]
                views = _views(item, planner.resolve_data(item), ticket.block_size // 4, lent)
                written.append(runs.add(self._location.join(place.file).path, place.starts, place.run, views))
            runs.finish()
            if to_join:
                meter.pause()
        checksums = self._store.options.checksums
        results = [
            WriteResult(
                index=item.index,
                size_in_bytes=ticket.places[item.index].length,
                storage_data=Written(
                    ticket.places[item.index],
                    tuple(one.crc64() for one in done) if checksums else None,
                    () if number else tuple(runs.blocks),
                ),
            )
            for number, (item, done) in enumerate(zip(items, written, strict=True))
        ]
        if not self._is_coordinator:
            self._report.end()  # `finish` is for the coordinator
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    @step
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the files, then the index that names them, then remove what was replaced.

        Raises:
            IncompleteSaveError: something of the plan was not written. Nothing was committed.
            CommitConflictError: another save committed at this URL meanwhile. Its model stands.
            CommitUnknownError: whether the index was written is unknown. The model at the URL is whole, the old one or
                the new one, and nothing was deleted.
            StoreError: the service could not be asked. The model at the URL is whole, the old one or the new one.
        """
        written = [result.storage_data for rank in results for result in rank]
        blocks: dict[str, list[Block]] = {}
        for block in itertools.chain.from_iterable(one.blocks for one in written):
            blocks.setdefault(block.path, []).append(block)
        check_written(self._plan, self._location, blocks)
        self._unfinished = (self._location, self._save_id)
        items = self._join(blocks, written)
        check_whole(self._plan, self._location, blocks)
        self._commit_files({file.name: dump_header(file.tensors) for file in self._plan.files}, blocks)
        remove_blobs(self._store, self._location, self._plan.shards)
        index = dump_index(
            {name: file.name for file in self._plan.files for name in file.tensors},
            sum(file.length for file in self._plan.files),
            self._save_id,
            checksums_of(results, items) if self._store.options.checksums else {},
        )
        strays = self._strays()
        # From here on the files may belong to a model: a commit without an answer may have been carried out.
        self._unfinished = None
        self._commit(index)
        self._remove_replaced(strays)
        self._report.end(checkpoint_bytes=sum(file.length for file in self._plan.files))

    def _join(self, blocks: dict[str, list[Block]], written: list[Written]) -> dict[str, list[Item]]:
        """Put tensors whose parts the ranks have stored together; return what their checksums follow from."""
        if not self._plan.shards:
            return {}
        self._commit_files(dict.fromkeys(self._plan.shards), blocks)
        sums = {
            (one.place.file, one.place.starts[0]): None if one.crc64 is None else one.crc64[0]
            for one in written
            if one.place.length
        }
        with self._report.paused():
            joined = join(
                self._store,
                self._location,
                self._plan.scattered,
                sums,
                self._save_id,
                self._joined_block_size,
                self._report.moved,
            )
        for block in joined.blocks:
            blocks.setdefault(block.path, []).append(block)
        return joined.items

    def _commit_files(self, headers: Mapping[str, bytes | None], blocks: Mapping[str, list[Block]]) -> None:
        run_all(
            (functools.partial(self._commit_file, name, header, blocks) for name, header in headers.items()),
            self._store.options.concurrency,
            "blob-commit",
        )

    def _commit_file(self, name: str, header: bytes | None, blocks: Mapping[str, list[Block]]) -> None:
        path = self._location.join(name).path
        ids = [block.id for block in sorted(blocks.get(path, ()), key=lambda one: one.offset)]
        if header is not None:
            ids.insert(0, run_id(self._save_id, _HEADER_RANK, 0))
            crc = crc64(header) if self._store.options.checksums else None
            self._store.stage_block(path, ids[0], Gather([memoryview(header)]), crc)
        self._store.commit_blocks(path, ids)

    def _commit(self, index: bytes) -> None:
        etag = self._standing.index_etag
        # The index holds the save's id, so that no other save's is the same.
        path = self._location.join(INDEX).path
        result = outcome.put(self._store, path, index, if_etag=etag, if_missing=etag is None)
        if etag is None and result.outcome is Outcome.DONE:
            try:
                result = self._settled(result)
            except StoreError as error:
                result = Result(Outcome.UNKNOWN, error=error)
        if result.outcome is Outcome.LOST:
            remove_blobs(self._store, self._location, [file.name for file in self._plan.files])
            raise CommitConflictError(
                f"Another save {'removed' if result.removed else 'committed'} the model at {self.checkpoint_id} since "
                "this one began, so this one was dropped. Give each job a URL of its own, or save again to replace it"
            ) from result.error
        if result.outcome is Outcome.UNKNOWN:
            raise result.unknown(
                f"Whether this save was committed at {self.checkpoint_id} is unknown. Its model is there, or what was "
                "there before, whole either way; nothing was deleted. Load it or save again; prune removes what is "
                "left over"
            )

    def _settled(self, result: Result) -> Result:
        """What the commit of a first save came to: another save may have come and gone before it.

        That one has taken the files of this one for leftovers, and the index must not stand without them.

        Raises:
            StoreError: the service could not be asked.
        """
        prefix = self._location.prefix
        try:
            found = {blob.path[len(prefix) :] for blob in self._store.list(prefix + file_prefix(self._save_id))}
        except AccessDeniedError:  # a credential that may not list may save all the same
            return result
        if found >= {file.name for file in self._plan.files}:
            return result
        removed = outcome.delete(self._store, self._location.join(INDEX).path, if_etag=result.etag)
        return removed if removed.outcome is Outcome.UNKNOWN else Result(Outcome.LOST, removed=True)

    def _look_at_url(self) -> _Standing:
        index = self._read(INDEX)
        try:
            single = self._store.stat(self._location.join(SINGLE).path).etag
        except BlobNotFoundError:
            single = None
        if (index or single) and not self._overwrite:
            raise CheckpointExistsError(
                f"A model stands at {self.checkpoint_id} already and overwrite=False. Use another URL; or "
                "overwrite=True to replace it, if no reader comes meanwhile that lists files instead of reading the "
                "index (vLLM, SGLang)"
            )
        if not self._overwrite:
            self._check_alone()
        return _Standing(None, None, single) if index is None else _Standing(*index, single)

    def _check_alone(self) -> None:
        """See that no files lie at the URL that readers take for a model, though no index names them."""
        try:
            found = other_files_at(self._store, self._location)
        except AccessDeniedError:  # a credential that may not list may save all the same
            return
        if found:
            raise CheckpointExistsError(
                f"{found[0][:200]!r} lies at {self.checkpoint_id} ({len(found)} such in all), and readers that list "
                "files (vLLM, SGLang) would load it together with this model. Use another URL, or remove it first; "
                "overwrite=True saves beside it, for readers that go by the index"
            )

    def _read(self, name: str) -> tuple[bytes, str] | None:
        try:
            return self._store.read(self._location.join(name).path, limit=INDEX_LIMIT)
        except BlobNotFoundError:
            return None

    def _strays(self) -> set[str]:
        """Names of the files of other saves at the URL. Once this one has written its index, they are nobody's.

        A save that still runs may have made some of them, but it began before that, under the condition that the index
        is what it was then. So it will not be committed any more.
        """
        try:
            found = saved_files_at(self._store, self._location)
            return {name for name in found if not name.startswith(file_prefix(self._save_id))}
        except AzureCheckpointError as error:
            _log.info("what dead saves left at %s stays, for it cannot be listed: %s", self.checkpoint_id, error)
            return set()

    def _remove_replaced(self, strays: set[str]) -> None:
        standing = self._standing
        if standing.single_etag is not None:
            # Not merely storage: of the two, transformers loads this one.
            path = self._location.join(SINGLE).path
            result = outcome.delete(self._store, path, if_etag=standing.single_etag)
            if result.outcome is Outcome.LOST:
                raise CommitConflictError(
                    f"Somebody wrote {SINGLE} at {self.checkpoint_id} since this save began, and transformers loads "
                    "that one. The new model stands beside it; remove the one that is not wanted"
                ) from result.error
            if result.outcome is Outcome.UNKNOWN:
                raise result.unknown(
                    f"The new model is at {self.checkpoint_id}, but whether the old {SINGLE} beside it was removed is "
                    "unknown, and transformers loads that one where it is. Remove it"
                )
        old = strays
        if standing.index is not None:
            try:
                old |= set(parse_index(standing.index, f"{self.checkpoint_id}/{INDEX}").files.values())
            except AzureCheckpointError as error:
                _log.warning("files of the replaced model stay, for its index says too little: %s", error)
        remove_blobs(self._store, self._location, sorted(old - {file.name for file in self._plan.files}))

    def _remove_save(self, location: BlobLocation, save_id: str) -> None:
        """Remove the files that an earlier save has made without an index."""
        prefix = location.prefix
        try:
            found = [blob.path for blob in self._store.list(prefix + file_prefix(save_id))]
        except AzureCheckpointError as error:
            _log.warning("could not look for the files of the failed save %s at %s: %s", save_id, location, error)
            return
        remove_blobs(self._store, location, [path[len(prefix) :] for path in found])


def _largest(plans: list[SavePlan]) -> int:
    """Bytes of the largest tensor."""
    planned = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None]
    return max((data.size.numel() * data.properties.dtype.itemsize for data in planned), default=0)


def _size_of(plan: SavePlan) -> int:
    planned = [item.tensor_data for item in plan.items if item.tensor_data is not None]
    return sum(data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in planned)


def _views(item: WriteItem, data: torch.Tensor | io.BytesIO, limit: int, lent: bool) -> Iterable[memoryview]:
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
