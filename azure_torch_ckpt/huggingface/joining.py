"""Joining tensors of which the ranks have stored columns: they are read in ranges, and staged as whole rows."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.upload import Item
from azure_torch_ckpt.dcp.metadata.schema import storage_info
from azure_torch_ckpt.dcp.open_checkpoint import OpenCheckpoint
from azure_torch_ckpt.dcp.tensor_stream import ahead, stream_chunks
from azure_torch_ckpt.dcp.tensors.memory import readable
from azure_torch_ckpt.errors import CorruptCheckpointError, IncompleteSaveError
from azure_torch_ckpt.huggingface.block_stager import BlockStager, StagedBlock
from azure_torch_ckpt.huggingface.model_layout import JoinedTensor
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["JoinResult", "join", "joined_block_size"]

_RANK = 999_998  # in the ids of blocks; larger than any real rank
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class JoinResult:
    """What was staged: the blocks, and the items that each tensor consists of, in their order."""

    blocks: list[StagedBlock]
    items: dict[str, list[Item]]


def joined_block_size(options: TransferOptions, total: int) -> int:
    """The largest block of joined tensors of `total` bytes: the blocks on their way take a quarter of the memory."""
    quarter = TransferOptions(
        concurrency=options.concurrency,
        memory_budget=max(options.memory_budget // 4, _MIB),
        block_size=options.block_size,
    )
    return quarter.part_size(total)


def join(
    store: BlobStore,
    location: BlobLocation,
    wanted: Sequence[JoinedTensor],
    crc64: Mapping[tuple[str, int], int | None],
    save_id: str,
    block_size: int,
    moved: Callable[[int], None],
) -> JoinResult:
    """Read the ranks' chunks and stage whole tensors, within the memory budget of the store's options.

    While one window of bytes is sent, the next one is read. The chunks' checksums are compared.

    Args:
        crc64: of the chunks, by file and offset in it.
        moved: called by a worker with the bytes of each block that has arrived.

    Raises:
        IncompleteSaveError: a chunk is not what a rank wrote.
    """
    tensors = {one.name: one for one in wanted if one.length}
    checkpoint = _as_checkpoint(store, location, tensors, crc64)
    entries = [(name, checkpoint.metadata.state_dict_metadata[name]) for name in tensors]
    window = max(store.options.memory_budget // 8, _MIB // 8)
    items: dict[str, list[Item]] = {name: [] for name in tensors}
    position = dict.fromkeys(tensors, 0)
    try:
        with (
            BlockStager(store, save_id, _RANK, block_size, moved) as stager,
            contextlib.closing(ahead(stream_chunks(checkpoint, entries, window))) as windows,  # type: ignore[arg-type]
        ):
            for parts in windows:
                for part in parts:
                    tensor, view = tensors[part.key], readable(part.elements)
                    start = tensor.offset + position[part.key]
                    items[part.key] += stager.add(location.join(tensor.file).path, [start], view.nbytes, [view])
                    position[part.key] += view.nbytes
            stager.finish()
    except CorruptCheckpointError as error:
        raise IncompleteSaveError(
            f"The chunks that the ranks stored for {location} cannot be joined, so nothing was committed. Save again "
            f"({error})"
        ) from error
    return JoinResult(stager.blocks, items)


def _as_checkpoint(
    store: BlobStore,
    location: BlobLocation,
    tensors: Mapping[str, JoinedTensor],
    crc64: Mapping[tuple[str, int], int | None],
) -> OpenCheckpoint:
    """The ranks' chunks as a sharded checkpoint, which the reading code takes."""
    entries = {}
    storage = {}
    for name, tensor in tensors.items():
        chunks = []
        for chunk in tensor.chunks:
            offsets = torch.Size(chunk.offsets)
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
            storage[MetadataIndex(name, offsets)] = storage_info(
                chunk.file,
                chunk.offset,
                chunk.length,
                payload_offset=0,
                crc64=crc64[chunk.file, chunk.offset],
            )
        entries[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)
    metadata = Metadata(entries, storage_data=storage)  # type: ignore[arg-type]
    return OpenCheckpoint(location, store, [], metadata, datetime.datetime.now(datetime.timezone.utc))
