"""Which tensor lies in which file, and which rank writes which bytes of it.

A file is its header and its tensors, row-major and back to back. So a rank's part of a tensor that is sharded by rows
is one run of bytes of the file, and ranks can stage them as blocks of one blob: full tensors without a pass that puts
shards together. So they can where a part consists of some long runs (experts that are sharded in their second
dimension). Where the runs are short, as columns' are, the ranks write their parts to files of their own first, and the
coordinator joins those.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk
from azure_torch_ckpt.dcp.tensors.regions import row_major
from azure_torch_ckpt.errors import CheckpointError
from azure_torch_ckpt.huggingface.format import why_not

__all__ = [
    "LARGEST_IN_BLOCKS",
    "SAVED_FILE",
    "Arrangement",
    "Chunk",
    "FileLayout",
    "Place",
    "Scattered",
    "arrange",
    "file_prefix",
]

# Of the 50,000 that a blob may have: https://learn.microsoft.com/azure/storage/blobs/scalability-targets
_MAX_BLOCKS = 45_000
# What the largest tensor is cut into, if the size of a block has to follow from it; its shards end in shorter ones.
LARGEST_IN_BLOCKS = 30_000
# Bytes. A run of this size is worth a request of its own; many shorter ones cost less if they are joined.
_SHORTEST_RUN = 1 << 20

SAVED_FILE = re.compile(r"model-([0-9a-f]{16})-(\d{5,}-of-\d{5,}\.safetensors|\d{6,}\.shards)")
"""The name of a file of one of our saves: the save's id, and which file of it that is."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item's bytes belong.

    Attributes:
        file: name of the file.
        starts: where its runs of bytes start, from the end of the file's header; in the order of the item's bytes.
        run: bytes of each run.
    """

    file: str
    starts: tuple[int, ...]
    run: int

    @property
    def length(self) -> int:
        return self.run * len(self.starts)


@dataclass(slots=True)
class FileLayout:
    """One file: its tensors with dtype and shape, in their order, and the bytes of all of them."""

    name: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    length: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """One rank's part of a tensor that is joined: which one, and where in a file of shards it is."""

    box: TensorChunk
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Scattered:
    """A tensor that is joined from the ranks' parts.

    Attributes:
        file: that it belongs to.
        offset: from the end of that file's header.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    chunks: list[Chunk]

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What a save consists of.

    Attributes:
        files: with a header each.
        places: for each rank where its items go.
        shards: bytes of each file that ranks write parts to which are joined, by the file's name.
        scattered: the tensors that are joined.
    """

    files: list[FileLayout]
    places: list[dict[MetadataIndex, Place]]
    shards: dict[str, int]
    scattered: list[Scattered]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A rank's part of a tensor: `runs` runs of `run` bytes each."""

    rank: int
    index: MetadataIndex
    box: TensorChunk
    runs: int
    run: int

    @property
    def length(self) -> int:
        return self.runs * self.run


@dataclass(slots=True)
class _Tensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[_Piece] = field(default_factory=list)
    scattered: bool = False

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, block_size: int, joined_block_size: int) -> int:
        if self.scattered:
            return -(-self.length // joined_block_size) + 1
        return sum(piece.runs * (-(-piece.run // block_size) + 1) for piece in self.pieces)

    def starts(self, piece: _Piece) -> tuple[int, ...]:
        """Where the runs of a piece start in the tensor."""
        if not piece.length:
            return (0,)
        strides = [stride * self.dtype.itemsize for stride in row_major(self.shape)]
        first = sum(offset * stride for offset, stride in zip(piece.box.offsets, strides, strict=True))
        dims = _dims_outside_runs(self.shape, piece.box.sizes)
        return tuple(
            first + sum(index * stride for index, stride in zip(indices, strides[:dims], strict=True))
            for indices in itertools.product(*(range(size) for size in piece.box.sizes[:dims]))
        )


def file_prefix(save_id: str) -> str:
    """What the names of all files of a save begin with."""
    return f"model-{save_id}-"


def arrange(
    plans: Sequence[SavePlan],
    save_id: str,
    *,
    mapping: Mapping[str, int] | None,
    max_file_size: int,
    block_size: int,
    joined_block_size: int,
) -> Arrangement:
    """Lay out the tensors of all ranks.

    Args:
        mapping: the number of each tensor's file, from 1 on. None: as many tensors to a file as fit.
        max_file_size: bytes of a file's tensors, without `mapping`; one that is larger has a file of its own.
        block_size: largest block of a rank.
        joined_block_size: largest block of a tensor that is joined.

    Raises:
        CheckpointError: a tensor whose dtype safetensors does not have, or which the ranks do not save whole and once;
            or a tensor that `mapping` does not have.
    """
    sizes = (block_size, joined_block_size)
    tensors = _gather(plans)
    for tensor in tensors.values():
        _check_whole(tensor)
        shortest = min(_SHORTEST_RUN, block_size)
        tensor.scattered = any(
            piece.runs > 1 and (piece.run < shortest or tensor.blocks(*sizes) > _MAX_BLOCKS) for piece in tensor.pieces
        )
    groups = (
        _by_size(list(tensors.values()), max_file_size, *sizes)
        if mapping is None
        else _by_mapping(tensors, mapping, *sizes)
    )
    result = Arrangement([], [{} for _ in plans], {}, [])
    for number, group in enumerate(groups, start=1):
        file = FileLayout(f"{file_prefix(save_id)}{number:05d}-of-{len(groups):05d}.safetensors")
        for tensor in sorted(group, key=_order):
            if tensor.scattered:
                _scatter(tensor, file, save_id, result)
            else:
                for piece in tensor.pieces:
                    starts = tuple(file.length + start for start in tensor.starts(piece))
                    result.places[piece.rank][piece.index] = Place(file.name, starts, piece.run)
            file.tensors[tensor.name] = tensor.dtype, tensor.shape
            file.length += tensor.length
        result.files.append(file)
    return result


def _scatter(tensor: _Tensor, file: FileLayout, save_id: str, result: Arrangement) -> None:
    chunks = []
    for piece in tensor.pieces:
        name = f"{file_prefix(save_id)}{piece.rank:06d}.shards"
        offset = result.shards.setdefault(name, 0) if piece.length else 0
        result.places[piece.rank][piece.index] = Place(name, (offset,), piece.length)
        if piece.length:
            result.shards[name] += piece.length
            chunks.append(Chunk(piece.box, name, offset, piece.length))
    result.scattered.append(Scattered(tensor.name, tensor.dtype, tensor.shape, file.name, file.length, chunks))


def _order(tensor: _Tensor) -> tuple[int, int, str]:
    # Wide types first: then every tensor is aligned. What one process writes together: then that is few runs.
    writer = -1 if len(tensor.pieces) > 1 else tensor.pieces[0].rank
    return -tensor.dtype.itemsize, -2 if tensor.scattered else writer, tensor.name


def _gather(plans: Sequence[SavePlan]) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            data = item.tensor_data
            assert data is not None  # the writer has refused the others
            name, dtype = item.index.fqn, data.properties.dtype
            if (reason := why_not(name, dtype, data.size)) is not None:
                raise CheckpointError(f"{reason}. Cast or rename it first, or save it with AzureBlobWriter")
            tensor = tensors.setdefault(name, _Tensor(name, dtype, tuple(data.size)))
            if (tensor.dtype, tensor.shape) != (dtype, tuple(data.size)):
                raise CheckpointError(
                    f"{name!r} is {tensor.dtype} of shape {tensor.shape} on rank {tensor.pieces[0].rank}, and {dtype} "
                    f"of shape {tuple(data.size)} on rank {rank}"
                )
            box = TensorChunk(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
            outside = box.sizes[: _dims_outside_runs(tensor.shape, box.sizes)]
            run = math.prod(box.sizes[len(outside) :]) * dtype.itemsize
            tensor.pieces.append(_Piece(rank, item.index, box, math.prod(outside), run))
    return tensors


def _dims_outside_runs(shape: Sequence[int], sizes: Sequence[int]) -> int:
    """How many of the first dimensions of a chunk lead from one run of bytes to the next."""
    dim = len(sizes)
    while dim and sizes[dim - 1] == shape[dim - 1]:
        dim -= 1
    dim = max(dim - 1, 0)  # the dimension in which the chunk is a part ends a run
    while dim and sizes[dim - 1] == 1:
        dim -= 1
    return dim if math.prod(sizes) else 0


def _check_whole(tensor: _Tensor) -> None:
    pieces = [piece for piece in tensor.pieces if piece.length]
    for piece in pieces:
        ends = [start + size for start, size in zip(piece.box.offsets, piece.box.sizes, strict=True)]
        if any(start < 0 for start in piece.box.offsets) or any(map(int.__gt__, ends, tensor.shape)):
            raise CheckpointError(
                f"Rank {piece.rank} saves {_shown(piece.box)} of {tensor.name!r}, whose shape is {tensor.shape}"
            )
    _check_disjoint(tensor, pieces)
    saved = sum(piece.length for piece in pieces)
    if saved != tensor.length:
        raise CheckpointError(
            f"The ranks save {saved} of the {tensor.length} bytes of {tensor.name!r}. Save it from all ranks that "
            "hold a part of it"
        )


def _check_disjoint(tensor: _Tensor, pieces: list[_Piece]) -> None:
    if len(pieces) < 2:
        return
    # Along the dimension that tells most of them apart, only few are side by side.
    dim = max(range(len(tensor.shape)), key=lambda dim: len({piece.box.offsets[dim] for piece in pieces}), default=None)
    beside: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.box.offsets[dim] if dim is not None else 0):
        if dim is not None:
            start = piece.box.offsets[dim]
            beside = [one for one in beside if one.box.offsets[dim] + one.box.sizes[dim] > start]
        for one in beside:
            if one.box.overlap(piece.box.offsets, piece.box.sizes) is not None:
                raise CheckpointError(
                    f"Ranks {one.rank} and {piece.rank} save the same elements of {tensor.name!r}: "
                    f"{_shown(one.box)} and {_shown(piece.box)}"
                )
        beside.append(piece)


def _shown(box: TensorChunk) -> str:
    return f"the shape {box.sizes} at {box.offsets}"


def _by_size(
    tensors: list[_Tensor], max_file_size: int, block_size: int, joined_block_size: int
) -> list[list[_Tensor]]:
    groups: list[list[_Tensor]] = []
    size = blocks = 0
    for tensor in tensors:
        more = tensor.blocks(block_size, joined_block_size)
        _check_blocks(tensor.name, more)
        if not groups or size + tensor.length > max_file_size or blocks + more > _MAX_BLOCKS:
            groups.append([])
            size = blocks = 0
        groups[-1].append(tensor)
        size += tensor.length
        blocks += more
    return groups


def _by_mapping(
    tensors: Mapping[str, _Tensor], mapping: Mapping[str, int], block_size: int, joined_block_size: int
) -> list[list[_Tensor]]:
    missing = [name for name in tensors if name not in mapping]
    if missing:
        raise CheckpointError(f"fqn_to_index_mapping has no file for {missing[0]!r} ({len(missing)} in all)")
    groups: dict[int, list[_Tensor]] = {}
    for tensor in tensors.values():
        groups.setdefault(mapping[tensor.name], []).append(tensor)
    for number, group in groups.items():
        blocks = sum(tensor.blocks(block_size, joined_block_size) for tensor in group)
        _check_blocks(f"file {number} of fqn_to_index_mapping", blocks)
    return [groups[number] for number in sorted(groups)]


def _check_blocks(what: str, blocks: int) -> None:
    if blocks > _MAX_BLOCKS:
        raise CheckpointError(
            f"{what!r} would consist of {blocks} blocks, and a blob may have 50,000: it has too many shards. Spread it "
            "over more files, save from fewer ranks, or let TransferOptions choose block_size"
        )
