"""The layout of a model: which tensor is in which file, and which rank writes which bytes of it.

A file is its header and its tensors, row-major and back to back. So a rank's shard of a tensor that is sharded by rows
is one run of bytes of the file, and the ranks can stage their shards as blocks of one blob: the file has whole tensors,
and nothing puts shards together. The same goes for a shard of some long runs (experts that are sharded in their second
dimension). Where the runs are short, as those of columns are, the ranks write their shards to files of their own first,
and the coordinator joins them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from azure_torch_ckpt._internal.checksums import combine
from azure_torch_ckpt.blobs.upload import Item
from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk, are_disjoint
from azure_torch_ckpt.dcp.tensors.regions import row_major
from azure_torch_ckpt.errors import CheckpointError, IncompleteSaveError
from azure_torch_ckpt.huggingface.blob_names import file_name, shards_name
from azure_torch_ckpt.huggingface.block_stager import StagedBlock
from azure_torch_ckpt.huggingface.safetensors_header import why_not
from azure_torch_ckpt.location import BlobLocation

__all__ = [
    "LARGEST_IN_BLOCKS",
    "FileLayout",
    "ItemRuns",
    "JoinedTensor",
    "ModelLayout",
    "StoredChunk",
    "WrittenItem",
    "check_whole",
    "check_written",
    "checksums_of",
    "lay_out",
]

# Of the 50,000 that a blob may have: https://learn.microsoft.com/azure/storage/blobs/scalability-targets
_MAX_BLOCKS = 45_000
LARGEST_IN_BLOCKS = 30_000
"""Blocks of the largest tensor, where the size of a block has to follow from it. Its shards end in shorter blocks."""
# Bytes. A run of this size is worth a request of its own; many shorter ones cost less if they are joined.
_SHORTEST_RUN = 1 << 20


@dataclass(frozen=True, slots=True)
class ItemRuns:
    """The runs of `run` bytes each of a file that an item consists of, in the order of the item's bytes.

    `starts` are counted from the end of the file's header.
    """

    file: str
    starts: tuple[int, ...]
    run: int

    @property
    def length(self) -> int:
        return self.run * len(self.starts)


@dataclass(slots=True)
class FileLayout:
    """One file: dtype and shape of each tensor, in the order of their bytes, and the bytes of all."""

    name: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    length: int = 0


@dataclass(frozen=True, slots=True)
class StoredChunk(TensorChunk):
    """One rank's chunk of a tensor that is to be joined, and its bytes in a file of shards."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """A tensor that the coordinator joins from the ranks' chunks.

    Attributes:
        file: where it belongs.
        offset: in that file, from the end of the header.
        chunks: the ranks' chunks, which make up the tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    chunks: list[StoredChunk]

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """All files of a save.

    Attributes:
        files: the safetensors files.
        runs: for each rank the runs of its items.
        shards: bytes of each file of shards that are to be joined, by the file's name.
        joined: the tensors that are joined from those shards.
    """

    files: list[FileLayout]
    runs: list[dict[MetadataIndex, ItemRuns]]
    shards: dict[str, int]
    joined: list[JoinedTensor]


@dataclass(frozen=True, slots=True)
class _RankChunk(TensorChunk):
    """A rank's chunk of a tensor: `runs` runs of `run` bytes each."""

    rank: int
    index: MetadataIndex
    runs: int
    run: int

    @property
    def length(self) -> int:
        return self.runs * self.run


@dataclass(slots=True)
class _PlannedTensor:
    """A tensor, and all ranks' chunks of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[_RankChunk] = field(default_factory=list)
    is_joined: bool = False
    blocks: int = 0  # at most

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def starts(self, chunk: _RankChunk) -> tuple[int, ...]:
        """The offset of each run of a chunk in the tensor, in bytes."""
        if not chunk.length:
            return (0,)
        strides = [stride * self.dtype.itemsize for stride in row_major(self.shape)]
        first = sum(offset * stride for offset, stride in zip(chunk.offsets, strides, strict=True))
        dims = _dims_outside_runs(self.shape, chunk.sizes)
        return tuple(
            first + sum(index * stride for index, stride in zip(indices, strides[:dims], strict=True))
            for indices in itertools.product(*(range(size) for size in chunk.sizes[:dims]))
        )


def lay_out(
    plans: Sequence[SavePlan],
    save_id: str,
    *,
    mapping: Mapping[str, int] | None,
    max_file_size: int,
    block_size: int,
    joined_block_size: int,
) -> ModelLayout:
    """Lay out the tensors of all ranks.

    Args:
        mapping: the number of each tensor's file, from 1 on. None: as many tensors to a file as fit.
        max_file_size: bytes of a file's tensors, without `mapping`; one that is larger has a file of its own.
        block_size: largest block of a rank.
        joined_block_size: largest block of a tensor that is joined.

    Raises:
        CheckpointError: safetensors does not have the dtype of a tensor, the ranks do not save every element of it
            once, or `mapping` lacks it.
    """
    tensors = _gather(plans)
    shortest = min(_SHORTEST_RUN, block_size)
    for tensor in tensors.values():
        _check_whole(tensor)
        tensor.blocks = sum(chunk.runs * (-(-chunk.run // block_size) + 1) for chunk in tensor.chunks)
        tensor.is_joined = any(
            chunk.runs > 1 and (chunk.run < shortest or tensor.blocks > _MAX_BLOCKS) for chunk in tensor.chunks
        )
        if tensor.is_joined:
            tensor.blocks = -(-tensor.length // joined_block_size) + 1
    groups = _by_size(tensors.values(), max_file_size) if mapping is None else _by_mapping(tensors, mapping)
    result = ModelLayout([], [{} for _ in plans], {}, [])
    for number, group in enumerate(groups, start=1):
        file = FileLayout(file_name(save_id, number, len(groups)))
        for tensor in sorted(group, key=_order):
            if tensor.is_joined:
                _join(tensor, file, save_id, result)
            else:
                for chunk in tensor.chunks:
                    starts = tuple(file.length + start for start in tensor.starts(chunk))
                    result.runs[chunk.rank][chunk.index] = ItemRuns(file.name, starts, chunk.run)
            file.tensors[tensor.name] = tensor.dtype, tensor.shape
            file.length += tensor.length
        result.files.append(file)
    return result


def _join(tensor: _PlannedTensor, file: FileLayout, save_id: str, result: ModelLayout) -> None:
    chunks = []
    for chunk in tensor.chunks:
        name = shards_name(save_id, chunk.rank)
        offset = result.shards.setdefault(name, 0) if chunk.length else 0
        result.runs[chunk.rank][chunk.index] = ItemRuns(name, (offset,), chunk.length)
        if chunk.length:
            result.shards[name] += chunk.length
            chunks.append(StoredChunk(chunk.offsets, chunk.sizes, name, offset, chunk.length))
    result.joined.append(JoinedTensor(tensor.name, tensor.dtype, tensor.shape, file.name, file.length, chunks))


def _order(tensor: _PlannedTensor) -> tuple[int, int, str]:
    # Wide types first, so that every tensor is aligned. Then by process, so that each writes few runs.
    writer = -1 if len(tensor.chunks) > 1 else tensor.chunks[0].rank
    return -tensor.dtype.itemsize, -2 if tensor.is_joined else writer, tensor.name


def _gather(plans: Sequence[SavePlan]) -> dict[str, _PlannedTensor]:
    tensors: dict[str, _PlannedTensor] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            data = item.tensor_data
            assert data is not None  # the writer has refused the others
            name, dtype = item.index.fqn, data.properties.dtype
            if (reason := why_not(name, dtype, data.size)) is not None:
                raise CheckpointError(f"{reason}. Cast or rename it first, or save it with AzureBlobWriter")
            tensor = tensors.setdefault(name, _PlannedTensor(name, dtype, tuple(data.size)))
            if (tensor.dtype, tensor.shape) != (dtype, tuple(data.size)):
                raise CheckpointError(
                    f"{name!r} is {tensor.dtype} of shape {tensor.shape} on rank {tensor.chunks[0].rank}, and {dtype} "
                    f"of shape {tuple(data.size)} on rank {rank}"
                )
            offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
            dims = _dims_outside_runs(tensor.shape, sizes)
            run = math.prod(sizes[dims:]) * dtype.itemsize
            tensor.chunks.append(_RankChunk(offsets, sizes, rank, item.index, math.prod(sizes[:dims]), run))
    return tensors


def _dims_outside_runs(shape: Sequence[int], sizes: Sequence[int]) -> int:
    """How many of the first dimensions of a chunk are iterated over from one run of bytes to the next."""
    dim = len(sizes)
    while dim and sizes[dim - 1] == shape[dim - 1]:
        dim -= 1
    dim = max(dim - 1, 0)  # a run ends in the last dimension that the chunk does not have whole
    while dim and sizes[dim - 1] == 1:
        dim -= 1
    return dim if math.prod(sizes) else 0


def _check_whole(tensor: _PlannedTensor) -> None:
    """Raise `CheckpointError` unless the ranks save every element of a tensor once."""
    filled = [chunk for chunk in tensor.chunks if chunk.length]
    for chunk in filled:
        ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(start < 0 for start in chunk.offsets) or any(map(int.__gt__, ends, tensor.shape)):
            raise CheckpointError(
                f"Rank {chunk.rank} saves {_shown(chunk)} of {tensor.name!r}, whose shape is {tensor.shape}"
            )
    if not are_disjoint(filled):
        one, other = next(
            (one, other)
            for one, other in itertools.combinations(filled, 2)
            if one.overlap(other.offsets, other.sizes) is not None
        )
        raise CheckpointError(
            f"Ranks {one.rank} and {other.rank} save the same elements of {tensor.name!r}: {_shown(one)} and "
            f"{_shown(other)}"
        )
    saved = sum(chunk.length for chunk in filled)
    if saved != tensor.length:
        raise CheckpointError(
            f"The ranks save {saved} of the {tensor.length} bytes of {tensor.name!r}. Save it from all ranks that "
            "hold a chunk of it"
        )


def _shown(chunk: TensorChunk) -> str:
    return f"the shape {chunk.sizes} at {chunk.offsets}"


def _by_size(tensors: Iterable[_PlannedTensor], max_file_size: int) -> list[list[_PlannedTensor]]:
    groups: list[list[_PlannedTensor]] = []
    size = blocks = 0
    for tensor in tensors:
        _check_blocks(tensor.name, tensor.blocks)
        if not groups or size + tensor.length > max_file_size or blocks + tensor.blocks > _MAX_BLOCKS:
            groups.append([])
            size = blocks = 0
        groups[-1].append(tensor)
        size += tensor.length
        blocks += tensor.blocks
    return groups


def _by_mapping(tensors: Mapping[str, _PlannedTensor], mapping: Mapping[str, int]) -> list[list[_PlannedTensor]]:
    missing = [name for name in tensors if name not in mapping]
    if missing:
        raise CheckpointError(f"fqn_to_index_mapping has no file for {missing[0]!r} ({len(missing)} in all)")
    groups: dict[int, list[_PlannedTensor]] = {}
    for tensor in tensors.values():
        groups.setdefault(mapping[tensor.name], []).append(tensor)
    for number, group in groups.items():
        _check_blocks(f"file {number} of fqn_to_index_mapping", sum(tensor.blocks for tensor in group))
    return [groups[number] for number in sorted(groups)]


def _check_blocks(what: str, blocks: int) -> None:
    if blocks > _MAX_BLOCKS:
        raise CheckpointError(
            f"{what!r} would consist of {blocks} blocks, and a blob may have 50,000: it has too many shards. Spread it "
            "over more files, save from fewer ranks, or let TransferOptions choose block_size"
        )


@dataclass(frozen=True, slots=True)
class WrittenItem:
    """What a rank reports of an item that it wrote.

    Attributes:
        runs: of the item's bytes.
        crc64: CRC64-NVME of each run; None without checksums.
        blocks: all blocks of the rank, with its first item.
    """

    runs: ItemRuns
    crc64: tuple[int, ...] | None
    blocks: tuple[StagedBlock, ...] = ()


def check_written(layout: ModelLayout, location: BlobLocation, blocks: Mapping[str, Sequence[StagedBlock]]) -> None:
    """Raise `IncompleteSaveError` unless the ranks have staged as many bytes as planned, in `blocks` by path."""
    expected = {file.name: file.length for file in layout.files} | layout.shards
    for tensor in layout.joined:
        expected[tensor.file] -= tensor.length
    for name, length in expected.items():
        staged = sum(block.length for block in blocks.get(location.join(name).path, ()))
        if staged != length:
            raise _incomplete(name, staged, length, location)


def check_whole(layout: ModelLayout, location: BlobLocation, blocks: Mapping[str, Sequence[StagedBlock]]) -> None:
    """Raise `IncompleteSaveError` unless the blocks of each file follow one another from its first byte to its last."""
    for file in layout.files:
        position = 0
        for block in sorted(blocks.get(location.join(file.name).path, ()), key=lambda one: one.offset):
            if block.offset != position:
                break
            position += block.length
        if position != file.length:
            raise _incomplete(file.name, position, file.length, location)


def _incomplete(name: str, written: int, length: int, location: BlobLocation) -> IncompleteSaveError:
    return IncompleteSaveError(
        f"Of {name} the ranks wrote {written} of {length} bytes without a gap, so nothing was committed at {location}. "
        "A rank or a planner dropped something; save again"
    )


def checksums_of(results: Sequence[Sequence[WriteResult]], joined: Mapping[str, list[Item]]) -> dict[str, int]:
    """Combine the CRC64 of each tensor from its runs, in their order; of a `joined` one, from those items instead."""
    parts: dict[str, list[tuple[int, int, int]]] = {}
    for result in itertools.chain.from_iterable(results):
        if result.index.fqn not in joined:
            runs = result.storage_data.runs
            sums = zip(runs.starts, result.storage_data.crc64, strict=True)
            parts.setdefault(result.index.fqn, []).extend((start, runs.run, crc) for start, crc in sums)
    for name, items in joined.items():
        parts[name] = [(item.offset, item.length, item.crc64()) for item in items]
    return {
        name: functools.reduce(lambda crc, part: combine(crc, part[2], part[1]), sorted(of_tensor), 0)
        for name, of_tensor in parts.items()
    }
