"""Tensors of which the ranks have stored columns: read again range by range, and staged as whole rows."""

from __future__ import annotations

import contextlib
import datetime
import math
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
from azure_torch_ckpt.blobs.transfer import Item
from azure_torch_ckpt.dcp.metadata.schema import storage_info
from azure_torch_ckpt.dcp.open_checkpoint import OpenCheckpoint
from azure_torch_ckpt.dcp.tensor_stream import ahead, stream_chunks
from azure_torch_ckpt.dcp.tensors.memory import readable
from azure_torch_ckpt.errors import CorruptCheckpointError, IncompleteSaveError
from azure_torch_ckpt.huggingface.blocks import Block, Runs
from azure_torch_ckpt.huggingface.layout import Scattered
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["Joined", "join", "joined_block_size"]

_RANK = 999_998  # in the ids of blocks; larger than that of any real one
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Joined:
    """What was staged: the blocks, and for each tensor its parts, whose checksums make up the tensor's."""

    blocks: list[Block]
    items: dict[str, list[Item]]


def joined_block_size(options: TransferOptions, total: int) -> int:
    """The largest block of tensors of `total` bytes that are joined: a quarter of the memory is for what is sent."""
    quarter = TransferOptions(
        concurrency=options.concurrency,
        memory_budget=max(options.memory_budget // 4, _MIB),
        block_size=options.block_size,
    )
    return quarter.part_size(total)


def join(
    store: BlobStore,
    location: BlobLocation,
    scattered: Sequence[Scattered],
    crc64: Mapping[tuple[str, int], int | None],
    save_id: str,
    block_size: int,
    moved: Callable[[int], None],
) -> Joined:
    """Read the ranks' parts and stage whole tensors, within the memory budget of the store's options.

    While one window of bytes is sent, the next one is read. The parts' checksums are compared.

    Args:
        location: of the model.
        crc64: of the chunks, by file and offset in it.
        moved: called by a worker with the bytes of each block that has arrived.

    Raises:
        IncompleteSaveError: a part is not what a rank wrote.
        StoreError: the service could not be asked.
    """
    tensors = {one.name: one for one in scattered if one.length}
    checkpoint = _as_checkpoint(store, location, tensors, crc64)
    wanted = [(name, checkpoint.metadata.state_dict_metadata[name]) for name in tensors]
    window = max(store.options.memory_budget // 8, _MIB // 8)
    items: dict[str, list[Item]] = {name: [] for name in tensors}
    position = dict.fromkeys(tensors, 0)
    try:
        with (
            Runs(store, save_id, _RANK, block_size, moved) as runs,
            contextlib.closing(ahead(stream_chunks(checkpoint, wanted, window))) as windows,  # type: ignore[arg-type]
        ):
            for parts in windows:
                for part in parts:
                    tensor, view = tensors[part.key], readable(part.elements)
                    start = tensor.offset + position[part.key]
                    items[part.key] += runs.add(location.join(tensor.file).path, [start], view.nbytes, [view])
                    position[part.key] += view.nbytes
            runs.finish()
    except CorruptCheckpointError as error:
        raise IncompleteSaveError(
            f"The parts of a tensor that the ranks stored for {location} cannot be joined, so nothing was committed. "
            f"Save again ({error})"
        ) from error
    return Joined(runs.blocks, items)


def _as_checkpoint(
    store: BlobStore,
    location: BlobLocation,
    tensors: Mapping[str, Scattered],
    crc64: Mapping[tuple[str, int], int | None],
) -> OpenCheckpoint:
    """The ranks' parts in the terms of a sharded checkpoint, which they are."""
    entries = {}
    storage = {}
    for name, tensor in tensors.items():
        chunks = []
        for chunk in tensor.chunks:
            offsets = torch.Size(chunk.box.offsets)
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.box.sizes)))
            assert math.prod(chunk.box.sizes) * tensor.dtype.itemsize == chunk.length
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
