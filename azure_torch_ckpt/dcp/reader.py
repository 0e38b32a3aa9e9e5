"""`AzureBlobReader`: the ``StorageReader`` of torch.distributed.checkpoint that loads from Blob Storage."""

from __future__ import annotations

import dataclasses
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.download import Check, Download, Read
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.base import BaseStorage, step
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.commit import read_metadata_blob
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, check_metadata, load_metadata, stored_item
from azure_torch_ckpt.dcp.open_checkpoint import nothing_at
from azure_torch_ckpt.dcp.planners import takes_any_order
from azure_torch_ckpt.dcp.report import Figures
from azure_torch_ckpt.dcp.tensors.coverage import find_uncovered
from azure_torch_ckpt.dcp.tensors.memory import converts, no_conversion, own_bytes
from azure_torch_ckpt.dcp.tensors.overlaps import find_overlaps, repeats_an_element, repeats_elements
from azure_torch_ckpt.dcp.tensors.reads import copy_region, region_reads
from azure_torch_ckpt.dcp.tensors.torch_items import load_tensor, open_item
from azure_torch_ckpt.errors import (
    AzureCheckpointError,
    BlobChangedError,
    BlobNotFoundError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
    RequestRefusedError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import ProgressOption

__all__ = ["AzureBlobReader"]

# Memory that is taken on the metadata's word alone. For more, the service is asked whether the blob has the bytes.
_UNASKED = 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """Travels in the load plans: which metadata a rank has read."""

    name: str
    etag: str


@dataclasses.dataclass(slots=True)
class _Wanted:
    """One thing that the plan asks for."""

    request: ReadItem
    item: StoredItem
    target: torch.Tensor | None = None  # where it goes; None for an object, and until the planner has been asked
    staged: torch.Tensor | None = None  # its elements, on the way there

    @property
    def is_raw(self) -> bool:
        """Whether it is a tensor whose raw bytes have a known place."""
        item = self.item
        return self.request.type == LoadItemType.TENSOR and item.payload_offset is not None and not item.transforms


class AzureBlobReader(BaseStorage, StorageReader):
    """Load a checkpoint from a URL in Blob Storage, on any number of ranks and with any sharding.

    Reads what `AzureBlobWriter`, torch's ``FileSystemWriter`` and ``FsspecWriter`` write. Only the bytes that the
    state dict asks for are fetched, straight into its tensors where those are contiguous CPU memory of the saved dtype.
    After an error the state dict's tensors hold old and new values in no particular order.

    Of tensors in the state dict that share memory, the last one in the plan stays: the last key, as ``dcp.load`` sorts
    them. A planner that overrides a method by which torch's gives or commits tensors gets its items in the order of the
    plan: each is resolved, filled and committed before the next. A tensor of which the checkpoint holds a part only is
    an error, with ``allow_partial_load`` as well, which is for missing keys.

    Args:
        url: the checkpoint's place, as for `AzureBlobWriter`.
        credential: as for `AzureBlobWriter`; reading and listing are all that it must allow.
        options: limits of connections, memory and time, and whether checksums are compared.
        ca_file: a PEM file with certificates to trust besides the platform's.
        progress: as for `AzureBlobWriter`.

    Raises:
        LocationError: the URL names no place in Blob Storage.
        CredentialError: the credential cannot be used.
        MissingDependencyError: ``progress=True``, and tqdm is not installed.

    Errors while loading are those of `azure_torch_ckpt.errors`. ``dcp.load`` carries them to every rank in torch's
    ``CheckpointException``: ``failures[rank][0]`` is the error.
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
        super().__init__(url, Access(credential, options, ca_file), Figures("load", progress))
        self._metadata = Metadata({}, storage_data={})
        self._chunks: dict[str, dict[torch.Size, torch.Size]] = {}
        self._paths: dict[str, str] = {}  # of data blobs in the container, by their names below the URL
        self._sizes: dict[str, int] = {}
        self._seen: _Seen | None = None
        self._why_no_metadata: AzureCheckpointError | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Fetch and check the checkpoint's metadata; with ``rank=``, one rank's of a save without collectives.

        Raises:
            CheckpointNotFoundError: there is no complete checkpoint.
            UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: it cannot be trusted or read.
            StoreError: the service could not be asked.
        """
        rank: int | None = kwargs.get("rank")
        load = self._begun_here()
        if rank is None or load is None or load._why_no_metadata is None:
            load = self._begin()
            load._figures.begin(load.checkpoint_id, load._store)
            try:
                return load._read_metadata(rank)
            except BaseException as error:
                if rank is None and isinstance(error, AzureCheckpointError):
                    load._why_no_metadata = error
                if rank is None and isinstance(error, CheckpointNotFoundError):
                    load._figures.doubt(error)  # the rank may have metadata of its own
                else:
                    load._figures.end(error)
                raise
        # torch's load swallows the error of its first call, asks for the rank's own metadata, and reports an
        # AssertionError if that is not there either. What it gets here instead raises the first error when it is used.
        first, load._why_no_metadata = load._why_no_metadata, None
        if not isinstance(first, CheckpointNotFoundError):
            return load._unreadable(first)
        load._figures.doubt(None)
        try:
            return load._read_metadata(rank)
        except CheckpointNotFoundError:
            return load._unreadable(first)
        except AzureCheckpointError as error:
            return load._unreadable(error)

    def _unreadable(self, error: AzureCheckpointError) -> _Unreadable:
        self._figures.end(error)
        return _Unreadable(error)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if isinstance(metadata, _Unreadable):
            raise metadata.error
        # Where another thread has read the metadata, this one goes on with a copy of what that one knows.
        load = self._begun_here() or self._begin(self._current())
        load._figures.lead(is_coordinator)
        load._metadata = metadata
        load._chunks = {}
        load._paths = {}
        load._sizes = {}

    @step
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return dataclasses.replace(plan, storage_data=self._seen)

    @step
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See that all ranks have read the same metadata.

        Raises:
            CheckpointReplacedError: the checkpoint was replaced between one rank's look and another's.
        """
        seen = {plan.storage_data for plan in plans if isinstance(plan.storage_data, _Seen)}
        # Ranks of which only some have read their own metadata would wait for each other in different collectives.
        if len(seen) > 1 and any(one.name == metadata_name() for one in seen):
            raise self._replaced()
        return plans

    @step
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fetch what the plan names into the planner's tensors, and hand it the pickled objects.

        Raises:
            CorruptCheckpointError: a blob is missing or too short, a checksum does not match, or the checkpoint has not
                all of a tensor that is wanted.
            UnsupportedCheckpointError: it was saved with ``use_collectives=False``, and what this rank saved is not all
                that it wants.
            CheckpointReplacedError: the checkpoint was replaced or removed meanwhile.
            StoreError: the service could not be asked.
        """
        with CollectorPause() as pause:
            self._check_covered(plan, planner)
            all_wanted = [self._look_up(request) for request in plan.items]
            any_order = takes_any_order(planner)
            at_once, in_turn = self._sort_out(all_wanted, planner, pause) if any_order else ([], all_wanted)
        with self._figures.transfer(len(plan.items), None):
            if at_once:
                self._fetch_regions(at_once)
            for batch in self._batches(in_turn):
                self._load_in_turn(batch, planner)
        self._figures.end()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    # What the plan asks for

    def _look_up(self, request: ReadItem) -> _Wanted:
        info = self._metadata.storage_data.get(request.storage_index)
        if info is None:
            raise CorruptCheckpointError(
                f"The metadata does not say where {self._name(request)} lies. Use another checkpoint"
            )
        return _Wanted(request, stored_item(info))

    def _name(self, request: ReadItem) -> str:
        index = request.storage_index
        return f"{index.fqn!r}{'' if index.offset is None else f' at {list(index.offset)}'} of {self.checkpoint_id}"

    def _target(self, wanted: _Wanted, planner: LoadPlanner) -> torch.Tensor:
        target: torch.Tensor = planner.resolve_tensor(wanted.request).detach()
        if target.shape != wanted.request.lengths:
            raise CheckpointError(
                f"The planner gave a tensor of shape {tuple(target.shape)} for {self._name(wanted.request)}, where the "
                f"plan reads {tuple(wanted.request.lengths)}"
            )
        if wanted.is_raw and not converts(saved := self._stored_as(wanted.request)[0], target.dtype):
            raise no_conversion(self._name(wanted.request), saved, target.dtype)
        if target.layout is torch.strided and not target.is_contiguous() and repeats_an_element(target):
            raise CheckpointError(
                f"The tensor to load {self._name(wanted.request)} into is expanded: many of its elements are one in "
                "memory. Give the state dict a tensor with memory for all of them (clone() makes one)"
            )
        return target

    def _sort_out(
        self, all_wanted: list[_Wanted], planner: LoadPlanner, pause: CollectorPause
    ) -> tuple[list[_Wanted], list[_Wanted]]:
        """What is fetched at once, straight into its targets, and what follows in the order of the plan."""
        for wanted in all_wanted:
            pause.heed_time()
            if wanted.request.type == LoadItemType.TENSOR:
                wanted.target = self._target(wanted, planner)
        overlaps = find_overlaps([wanted.target for wanted in all_wanted])
        at_once: list[_Wanted] = []
        in_turn: list[_Wanted] = []
        for number, wanted in enumerate(all_wanted):
            if number in overlaps.hidden:
                continue
            (at_once if wanted.is_raw and number not in overlaps.shared else in_turn).append(wanted)
        return at_once, in_turn

    def _check_covered(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        missing = find_uncovered(plan, planner, self._metadata)
        if missing is None:
            return
        if self._seen is not None and self._seen.name != metadata_name():
            raise UnsupportedCheckpointError(
                f"{self.checkpoint_id} was saved with use_collectives=False, each rank for itself, and "
                f"{self._seen.name} has not all of {missing!r} that this rank wants. Load it on as many ranks as saved "
                "it, sharded in the same way; to load it in another way, save it from there with collectives"
            )
        raise CorruptCheckpointError(
            f"{self.checkpoint_id} has not all elements of {missing!r} that this rank wants, or some of them twice. "
            "Its metadata is damaged, or one of several ranks saved its shards alone (no_dist=True), so that only that "
            "rank can load them. Use another checkpoint"
        )

    def _stored_as(self, request: ReadItem) -> tuple[torch.dtype, torch.Size]:
        """The dtype and the sizes of the stored chunk that a request reads from."""
        index = request.storage_index
        entry = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        hint = index.index
        if hint is not None and hint < len(entry.chunks) and entry.chunks[hint].offsets == index.offset:
            return entry.properties.dtype, entry.chunks[hint].sizes
        chunks = self._chunks.setdefault(index.fqn, {chunk.offsets: chunk.sizes for chunk in entry.chunks})
        assert index.offset is not None
        return entry.properties.dtype, chunks[index.offset]

    # Tensors whose raw bytes have a known place

    def _fetch_regions(self, all_wanted: list[_Wanted]) -> None:
        total = sum(wanted.target.nbytes for wanted in all_wanted if wanted.target is not None)
        download = Download(self._store, total, moved=self._figures.moved)
        with CollectorPause():
            reads = [read for wanted in all_wanted for read in self._reads(wanted, wanted.target, download.part_size)]
        self._run(download, reads)

    def _reads(self, wanted: _Wanted, target: torch.Tensor | None, limit: int) -> Iterator[Read]:
        request, item = wanted.request, wanted.item
        assert target is not None and item.payload_offset is not None
        dtype, chunk = self._stored_as(request)
        path = self._path(item)
        payload = item.offset + item.payload_offset
        check = None
        if target.shape == chunk:
            check = self._check(wanted)
            view = own_bytes(target) if target.dtype == dtype else None
            if check is None and view is not None:
                yield Read(path, payload, view.nbytes, view)
                return
            if check is not None:
                # The envelope is part of what the checksum covers; it comes with the same request.
                nbytes = target.numel() * dtype.itemsize
                self._see_that_it_exists(item, item.length - nbytes)
                if view is not None:
                    yield Read(path, item.offset, item.length, view, None, check, item.payload_offset)
                    return
                after = payload + nbytes
                for start, end in ((item.offset, payload), (after, item.offset + item.length)):
                    yield Read(path, start, end - start, None, None, check)
        yield from region_reads(path, payload, dtype, chunk, request.storage_offsets, target, limit=limit, check=check)

    # Items that are brought where they belong one after the other

    def _batches(self, all_wanted: list[_Wanted]) -> Iterator[list[_Wanted]]:
        """As many items at a time as half of the memory budget holds, but at least one."""
        batch: list[_Wanted] = []
        room = self._store.options.memory_budget // 2
        for wanted in all_wanted:
            size = self._staged_size(wanted)
            if batch and size > room:
                yield batch
                batch, room = [], self._store.options.memory_budget // 2
            batch.append(wanted)
            room -= size
        if batch:
            yield batch

    def _staged_size(self, wanted: _Wanted) -> int:
        if not wanted.is_raw:
            return wanted.item.length
        return math.prod(wanted.request.lengths) * self._stored_as(wanted.request)[0].itemsize

    def _load_in_turn(self, batch: list[_Wanted], planner: LoadPlanner) -> None:
        # Several requests may read from one item (a chunk that spans several of this rank's shards): fetch it once.
        buffers: dict[tuple[str, int], bytearray] = {}
        total = sum(self._staged_size(wanted) for wanted in batch)
        download = Download(self._store, total, moved=self._figures.moved)
        download.part_size = -(-download.part_size // 2)  # for the other half of the budget: what is in flight

        def reads() -> Iterator[Read]:
            for wanted in batch:
                item = wanted.item
                if wanted.is_raw:
                    yield from self._reads(wanted, self._stage(wanted, planner), download.part_size)
                elif (item.relative_path, item.offset) not in buffers:
                    self._see_that_it_exists(item, item.length)
                    buffers[item.relative_path, item.offset] = buffer = bytearray(item.length)
                    yield Read(
                        self._path(item), item.offset, item.length, memoryview(buffer), None, self._check(wanted)
                    )

        self._run(download, reads())
        for wanted in batch:
            request, item = wanted.request, wanted.item
            if request.type != LoadItemType.TENSOR:
                stream = open_item(buffers[item.relative_path, item.offset], item.transforms, self._name(request))
                planner.load_bytes(request, stream)
                continue
            region = wanted.staged
            if not wanted.is_raw:
                region = self._open_region(wanted, buffers[item.relative_path, item.offset])
            target = self._target(wanted, planner) if wanted.target is None else wanted.target
            if region is not None:
                copy_region(region, target, self._name(request))
            planner.commit_tensor(request, target)
            wanted.target = wanted.staged = None

    def _stage(self, wanted: _Wanted, planner: LoadPlanner) -> torch.Tensor:
        """Where to receive an item whose raw bytes have a known place: beside its target, which is not due yet."""
        size = self._staged_size(wanted)
        if size > self._store.options.memory_budget // 2:  # so it is alone in its batch, and due
            wanted.target = self._target(wanted, planner) if wanted.target is None else wanted.target
            if not repeats_elements(wanted.target):
                return wanted.target
        self._see_that_it_exists(wanted.item, size)
        dtype, _ = self._stored_as(wanted.request)
        wanted.staged = torch.empty(wanted.request.lengths, dtype=dtype, device="cpu")
        return wanted.staged

    def _open_region(self, wanted: _Wanted, received: bytearray) -> torch.Tensor:
        """The part that is asked for of an item that only torch can take apart."""
        request = wanted.request
        region = load_tensor(open_item(received, wanted.item.transforms, self._name(request)), self._name(request))
        for dim, (start, size) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            region = region.narrow(dim, start, size)
        return region

    # Fetching

    def _path(self, item: StoredItem) -> str:
        path = self._paths.get(item.relative_path)
        if path is None:
            path = self._paths[item.relative_path] = self._location.join(item.relative_path).path
        return path

    def _see_that_it_exists(self, item: StoredItem, length: int) -> None:
        """Before memory is taken for `length` of an item's bytes.

        Raises:
            CorruptCheckpointError: the blob is shorter than that, so damaged metadata asks for memory without end.
        """
        if length <= _UNASKED:
            return
        path = self._path(item)
        if path not in self._sizes:
            self._sizes[path] = self._store.stat(path).size
        if item.offset + item.length > self._sizes[path]:
            raise CorruptCheckpointError(
                f"A data blob of the checkpoint is shorter than its metadata says: {item.relative_path} has "
                f"{self._sizes[path]} bytes where {item.offset + item.length} are needed. Use another checkpoint"
            )

    def _check(self, wanted: _Wanted) -> Check | None:
        item = wanted.item
        if item.crc64 is None or not self._store.options.checksums:
            return None

        def mismatch(found: int) -> None:
            raise CorruptCheckpointError(
                f"{self._name(wanted.request)}: the {item.length} bytes at offset {item.offset} of blob "
                f"{item.relative_path} have CRC64 {found:016x} where {item.crc64:016x} was saved. They were damaged in "
                "storage or on the way. Load an older checkpoint, or try again to rule out the way"
            )

        return Check(item.crc64, item.length, mismatch)

    def _run(self, download: Download, reads: Iterable[Read]) -> None:
        try:
            download.run(self._figures.expecting(reads))
        except BlobNotFoundError as error:
            self._raise_if_replaced(error)
            raise CorruptCheckpointError(
                f"A data blob of the checkpoint is missing: {error}. Somebody deleted it; use another checkpoint"
            ) from error
        except RequestRefusedError as error:
            if error.status != 416:
                raise
            self._raise_if_replaced(error)
            raise CorruptCheckpointError(
                f"A data blob of the checkpoint is shorter than its metadata says: {error}. Use another checkpoint"
            ) from error
        except BlobChangedError as error:
            raise self._replaced() from error
        except CorruptCheckpointError as error:
            self._raise_if_replaced(error)
            raise

    def _raise_if_replaced(self, error: AzureCheckpointError) -> None:
        if self._seen is None:
            return
        try:
            etag = self._store.stat(self._location.join(self._seen.name).path).etag
        except BlobNotFoundError:
            etag = ""
        if etag != self._seen.etag:
            raise self._replaced() from error

    def _replaced(self) -> CheckpointReplacedError:
        return CheckpointReplacedError(
            f"The checkpoint at {self.checkpoint_id} was replaced or removed while it was being read. Load again"
        )

    def _read_metadata(self, rank: int | None) -> Metadata:
        stored = read_metadata_blob(self._store, self._location, rank)
        name = metadata_name(rank)
        if stored is None:
            raise nothing_at(self._store, self._location, name)
        where = f"{self.checkpoint_id}/{name}"
        with CollectorPause():
            metadata = load_metadata(stored.data, where)
            check_metadata(metadata, where)
        meta = metadata.storage_meta or StorageMeta()
        meta.load_id = str(uuid.uuid4())
        metadata.storage_meta = meta
        self._seen = _Seen(name, stored.etag)
        return metadata


class _Unreadable(Metadata):
    """Stands for metadata that could not be read. Whoever uses it gets the reason as an exception."""

    def __init__(self, error: AzureCheckpointError) -> None:
        object.__setattr__(self, "error", error)

    def __getattribute__(self, name: str) -> Any:
        if name == "error" or name.startswith("__"):
            return object.__getattribute__(self, name)
        raise object.__getattribute__(self, "error")
