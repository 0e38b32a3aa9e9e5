"""Which tensor lies in which file, and which rank writes which bytes of it.

A file is its header and its tensors, row-major and back to back. So a rank's part of a tensor that is sharded by rows
is one run of bytes of the file, and ranks can stage them as blocks of one blob: full tensors without a pass that puts
shards together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from azure_torch_ckpt.dcp.regions import row_major
from azure_torch_ckpt.errors import CheckpointError
from azure_torch_ckpt.huggingface.format import dtype_name

__all__ = ["LARGEST_IN_BLOCKS", "FileLayout", "Place", "arrange", "file_prefix"]

# Of the 50,000 that a blob may have: https://learn.microsoft.com/azure/storage/blobs/scalability-targets
_MAX_BLOCKS = 45_000
# What the largest tensor is cut into, if the size of a block has to follow from it; its shards end in shorter ones.
LARGEST_IN_BLOCKS = 30_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item's bytes belong.

    Attributes:
        file: name of the file.
        offset: from the end of the file's header.
        length: bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(slots=True)
class FileLayout:
    """One file: its tensors with dtype and shape, in their order, and the bytes of all of them."""

    name: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    length: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    rank: int
    index: MetadataIndex
    start: int
    length: int


@dataclass(slots=True)
class _Tensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, block_size: int) -> int:
        return sum(-(-piece.length // block_size) + 1 for piece in self.pieces)


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
) -> tuple[list[FileLayout], list[dict[MetadataIndex, Place]]]:
    """Lay out the tensors of all ranks.

    Args:
        mapping: the number of each tensor's file, from 1 on. None: as many tensors to a file as fit.
        max_file_size: bytes of a file's tensors, without `mapping`; one that is larger has a file of its own.
        block_size: largest block.

    Returns:
        The files, and for each rank where its items go.

    Raises:
        CheckpointError: a tensor whose dtype safetensors does not have, whose shards are no runs of rows, or which the
            ranks do not save whole; or a tensor that `mapping` does not have.
    """
    tensors = _gather(plans)
    for tensor in tensors.values():
        _check_whole(tensor)
    groups = (
        _by_size(list(tensors.values()), max_file_size, block_size)
        if mapping is None
        else _by_mapping(tensors, mapping, block_size)
    )
    files: list[FileLayout] = []
    places: list[dict[MetadataIndex, Place]] = [{} for _ in plans]
    for number, group in enumerate(groups, start=1):
        file = FileLayout(f"{file_prefix(save_id)}{number:05d}-of-{len(groups):05d}.safetensors")
        for tensor in sorted(group, key=_order):
            for piece in tensor.pieces:
                places[piece.rank][piece.index] = Place(file.name, file.length + piece.start, piece.length)
            file.tensors[tensor.name] = tensor.dtype, tensor.shape
            file.length += tensor.length
        files.append(file)
    return files, places


def _order(tensor: _Tensor) -> tuple[int, int, str]:
    # Wide types first: then every tensor is aligned. One rank's tensors together: then it writes few runs.
    return -tensor.dtype.itemsize, tensor.pieces[0].rank if len(tensor.pieces) == 1 else -1, tensor.name


def _gather(plans: Sequence[SavePlan]) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            data = item.tensor_data
            assert data is not None  # the writer has refused the others
            name, dtype = item.index.fqn, data.properties.dtype
            if dtype_name(dtype) is None:
                raise CheckpointError(f"{name!r} has the dtype {dtype}, which safetensors does not have. Cast it first")
            tensor = tensors.setdefault(name, _Tensor(name, dtype, tuple(data.size)))
            if (tensor.dtype, tensor.shape) != (dtype, tuple(data.size)):
                raise CheckpointError(
                    f"{name!r} is {tensor.dtype} of shape {tensor.shape} on rank {tensor.pieces[0].rank}, and {dtype} "
                    f"of shape {tuple(data.size)} on rank {rank}"
                )
            start, length = _run(tensor, data.chunk.offsets, data.chunk.sizes)
            tensor.pieces.append(_Piece(rank, item.index, start, length))
    return tensors


def _run(tensor: _Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """First byte and number of bytes of a chunk in its tensor."""
    count = math.prod(sizes)
    if not count:
        return 0, 0
    strides = row_major(tensor.shape)
    spanned = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    if spanned != count:
        raise CheckpointError(
            f"{tensor.name!r} of shape {tensor.shape} has a shard of shape {tuple(sizes)} at {tuple(offsets)}, which "
            "is no run of rows. A HuggingFace file holds whole tensors, and ranks write runs of rows. Redistribute "
            "it to Shard(0) or Replicate(), or save with get_model_state_dict(..., "
            "options=StateDictOptions(full_state_dict=True))"
        )
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    return first * tensor.dtype.itemsize, count * tensor.dtype.itemsize


def _check_whole(tensor: _Tensor) -> None:
    position = 0
    for piece in sorted(tensor.pieces, key=lambda piece: (piece.start, piece.length)):
        if piece.length and piece.start != position:
            reason = "save the same rows" if piece.start < position else "do not save all rows"
            raise CheckpointError(f"The ranks {reason} of {tensor.name!r}: it breaks at byte {position}")
        position += piece.length
    if position != tensor.length:
        raise CheckpointError(
            f"The ranks save {position} of the {tensor.length} bytes of {tensor.name!r}. Save it from all ranks that "
            "hold a part of it"
        )


def _by_size(tensors: list[_Tensor], max_file_size: int, block_size: int) -> list[list[_Tensor]]:
    groups: list[list[_Tensor]] = []
    size = blocks = 0
    for tensor in tensors:
        more = tensor.blocks(block_size)
        _check_blocks(tensor.name, more)
        if not groups or size + tensor.length > max_file_size or blocks + more > _MAX_BLOCKS:
            groups.append([])
            size = blocks = 0
        groups[-1].append(tensor)
        size += tensor.length
        blocks += more
    return groups


def _by_mapping(tensors: Mapping[str, _Tensor], mapping: Mapping[str, int], block_size: int) -> list[list[_Tensor]]:
    missing = [name for name in tensors if name not in mapping]
    if missing:
        raise CheckpointError(f"fqn_to_index_mapping has no file for {missing[0]!r} ({len(missing)} in all)")
    groups: dict[int, list[_Tensor]] = {}
    for tensor in tensors.values():
        groups.setdefault(mapping[tensor.name], []).append(tensor)
    for number, group in groups.items():
        _check_blocks(f"file {number} of fqn_to_index_mapping", sum(tensor.blocks(block_size) for tensor in group))
    return [groups[number] for number in sorted(groups)]


def _check_blocks(what: str, blocks: int) -> None:
    if blocks > _MAX_BLOCKS:
        raise CheckpointError(
            f"{what!r} would consist of {blocks} blocks, and a blob may have 50,000: it has too many shards. Spread it "
            "over more files, save from fewer ranks, or let TransferOptions choose block_size"
        )
