"""`PlanLoad`: carries out one rank's load plan, from stored items into the planner's tensors."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.blobs.download import Download, Read
from azure_torch_ckpt.dcp.item_reader import ItemReader, batches, open_item
from azure_torch_ckpt.dcp.planners import takes_any_order
from azure_torch_ckpt.dcp.stored_pieces import StoredPiece, find_pieces
from azure_torch_ckpt.dcp.tensors.copies import converts, copy_region, no_conversion
from azure_torch_ckpt.dcp.tensors.memory import own_bytes
from azure_torch_ckpt.dcp.tensors.overlaps import find_overlaps, is_expanded, repeats_elements
from azure_torch_ckpt.dcp.tensors.regions import region_reads
from azure_torch_ckpt.dcp.tensors.torch_file import load_tensor
from azure_torch_ckpt.errors import CheckpointError

__all__ = ["PlanLoad"]


@dataclasses.dataclass(slots=True)
class _Wanted:
    """One requested item; `staged` are its elements on the way to the target."""

    request: ReadItem
    pieces: list[StoredPiece]
    target: torch.Tensor | None = None
    staged: torch.Tensor | None = None

    @property
    def is_raw(self) -> bool:
        """Whether it is a tensor whose raw bytes have known places."""
        return self.request.type == LoadItemType.TENSOR and all(
            piece.item.payload_offset is not None and not piece.item.transforms for piece in self.pieces
        )


class PlanLoad:
    """Fetches what a load plan asks for.

    Tensors whose raw bytes have a known place are fetched all at once, straight into their targets. The others follow
    in batches, in the order of the plan: pickled objects, tensors that only ``torch.load`` can read, tensors that share
    memory, and everything if the planner may rely on that order.

    Args:
        metadata: of the checkpoint; it has been checked.
        moved: called by a worker with the bytes that have arrived.
    """

    def __init__(
        self, items: ItemReader, metadata: Metadata, planner: LoadPlanner, moved: Callable[[int], None]
    ) -> None:
        self._items = items
        self._metadata = metadata
        self._planner = planner
        self._moved = moved
        self._budget = items.store.options.memory_budget // 2  # the other half is for what is in flight
        self._at_once: list[_Wanted] = []
        self._in_turn: list[_Wanted] = []

    def prepare(self, requests: Iterable[ReadItem], pause: CollectorPause) -> None:
        """Look up the items, and get their targets from the planner unless it gives them one by one.

        Raises:
            CheckpointError: a target cannot hold what it is for.
            whatever `find_pieces` raises.
        """
        requests = list(requests)
        pieces = find_pieces(self._metadata, requests, self._items.name)
        all_wanted = [_Wanted(request, of_it) for request, of_it in zip(requests, pieces, strict=True)]
        if not takes_any_order(self._planner):
            self._in_turn = all_wanted
            return
        for wanted in all_wanted:
            pause.heed_time()
            if wanted.request.type == LoadItemType.TENSOR:
                wanted.target = self._target(wanted)
        overlaps = find_overlaps([wanted.target for wanted in all_wanted])
        for number, wanted in enumerate(all_wanted):
            if number in overlaps.hidden:
                continue
            (self._at_once if wanted.is_raw and number not in overlaps.shared else self._in_turn).append(wanted)

    def run(self) -> None:
        """Fetch everything, and give it to the planner. Errors as of `run_reads`."""
        if self._at_once:
            self._fetch_at_once()
        for batch in batches(self._in_turn, self._staged_size, self._budget):
            self._load_in_turn(batch)

    # What the plan asks for

    def _name(self, request: ReadItem) -> str:
        return self._items.name(request.storage_index)

    def _target(self, wanted: _Wanted) -> torch.Tensor:
        target: torch.Tensor = self._planner.resolve_tensor(wanted.request).detach()
        if target.shape != wanted.request.lengths:
            raise CheckpointError(
                f"The planner gave a tensor of shape {tuple(target.shape)} for {self._name(wanted.request)}, where the "
                f"plan reads {tuple(wanted.request.lengths)}"
            )
        saved = wanted.pieces[0].dtype if wanted.pieces else None
        if saved is not None and wanted.is_raw and not converts(saved, target.dtype):
            raise no_conversion(self._name(wanted.request), saved, target.dtype)
        if target.layout is torch.strided and not target.is_contiguous() and is_expanded(target):
            raise CheckpointError(
                f"The tensor to load {self._name(wanted.request)} into is expanded: many of its elements are one in "
                "memory. Give the state dict a tensor with memory for all of them (clone() makes one)"
            )
        return target

    # Tensors whose raw bytes have a known place

    def _fetch_at_once(self) -> None:
        total = sum(wanted.target.nbytes for wanted in self._at_once if wanted.target is not None)
        download = Download(self._items.store, total, moved=self._moved)
        with CollectorPause():
            reads = [
                read
                for wanted in self._at_once
                if wanted.target is not None
                for read in self._reads(wanted, wanted.target, download.part_size)
            ]
        self._items.run(download, reads)

    def _reads(self, wanted: _Wanted, target: torch.Tensor, limit: int) -> Iterator[Read]:
        for piece in wanted.pieces:
            yield from self._piece_reads(piece, piece.part(target), limit)

    def _piece_reads(self, piece: StoredPiece, target: torch.Tensor, limit: int) -> Iterator[Read]:
        item, dtype, chunk = piece.item, piece.dtype, piece.chunk
        assert dtype is not None and item.payload_offset is not None
        path = self._items.path(item)
        payload = item.offset + item.payload_offset
        check = None
        if target.shape == chunk:
            check = self._items.check(item, piece.index)
            view = own_bytes(target) if target.dtype == dtype else None
            if check is None and view is not None:
                yield Read(path, payload, view.nbytes, view)
                return
            if check is not None:
                # The envelope is part of what the checksum covers; it comes with the same request.
                nbytes = target.numel() * dtype.itemsize
                self._items.require(item, item.length - nbytes)
                if view is not None:
                    yield Read(path, item.offset, item.length, view, None, check, item.payload_offset)
                    return
                after = payload + nbytes
                for start, end in ((item.offset, payload), (after, item.offset + item.length)):
                    yield Read(path, start, end - start, None, None, check)
        yield from region_reads(path, payload, dtype, chunk, piece.storage_offsets, target, limit=limit, check=check)

    # Items that are brought to their targets one after the other

    def _staged_size(self, wanted: _Wanted) -> int:
        if not wanted.is_raw:
            return sum(piece.item.length for piece in wanted.pieces)
        return sum(
            math.prod(piece.lengths) * piece.dtype.itemsize for piece in wanted.pieces if piece.dtype is not None
        )

    def _load_in_turn(self, batch: list[_Wanted]) -> None:
        # Several requests may read from one item (a chunk that spans several of this rank's shards): fetch it once.
        buffers: dict[tuple[str, int], bytearray] = {}
        total = sum(self._staged_size(wanted) for wanted in batch)
        download = Download(self._items.store, total, moved=self._moved)
        download.part_size = -(-download.part_size // 2)  # for the other half of the budget: what is in flight

        def reads() -> Iterator[Read]:
            for wanted in batch:
                if wanted.is_raw:
                    yield from self._reads(wanted, self._stage(wanted), download.part_size)
                    continue
                for piece in wanted.pieces:
                    place = piece.item.relative_path, piece.item.offset
                    if place not in buffers:
                        buffers[place], read = self._items.whole(piece.item, piece.index)
                        yield read

        def opened(piece: StoredPiece) -> io.BytesIO:
            buffer = buffers[piece.item.relative_path, piece.item.offset]
            return open_item(buffer, piece.item, self._items.name(piece.index))

        self._items.run(download, reads())
        for wanted in batch:
            request = wanted.request
            if request.type != LoadItemType.TENSOR:
                self._planner.load_bytes(request, opened(wanted.pieces[0]))
                continue
            target = self._target(wanted) if wanted.target is None else wanted.target
            if wanted.staged is not None:
                copy_region(wanted.staged, target, self._name(request))
            elif not wanted.is_raw:
                for piece in wanted.pieces:
                    name = self._items.name(piece.index)
                    copy_region(_narrowed(load_tensor(opened(piece), name), piece), piece.part(target), name)
            self._planner.commit_tensor(request, target)
            wanted.target = wanted.staged = None

    def _stage(self, wanted: _Wanted) -> torch.Tensor:
        """Make memory beside the target to receive a raw item into, because the target's turn has not come."""
        size = self._staged_size(wanted)
        if size > self._budget:  # so it is alone in its batch, and its turn has come
            wanted.target = self._target(wanted) if wanted.target is None else wanted.target
            if not repeats_elements(wanted.target):
                return wanted.target
        for piece in wanted.pieces:
            self._items.require(piece.item, piece.item.length)
        dtype = wanted.pieces[0].dtype if wanted.pieces else None
        wanted.staged = torch.empty(wanted.request.lengths, dtype=dtype, device="cpu")
        return wanted.staged


def _narrowed(tensor: torch.Tensor, piece: StoredPiece) -> torch.Tensor:
    """The requested elements of a chunk that only torch can read."""
    for dim, (start, size) in enumerate(zip(piece.storage_offsets, piece.lengths, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
