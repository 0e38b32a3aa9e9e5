"""`inspect`: what a checkpoint holds, from its metadata alone."""

from __future__ import annotations

import datetime
import math
import os
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.listed_checkpoint import rank_of
from azure_torch_ckpt.dcp.metadata.schema import stored_item
from azure_torch_ckpt.dcp.open_checkpoint import open_checkpoint
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["CheckpointContents", "ObjectEntry", "ShardEntry", "TensorEntry", "dtype_name", "inspect"]


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One stored chunk of a tensor.

    Attributes:
        offsets: its first element in the tensor, one number per dimension.
        sizes: its extent, one number per dimension.
        blob: where it lies, below the checkpoint's URL.
        rank: the rank that wrote it, or None where the blob's name does not tell.
        offset: of its first byte in the blob.
        length: bytes in the blob, with what ``torch.save`` puts around the elements.
        crc64: CRC64-NVME of those bytes, or None.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: str
    rank: int | None
    offset: int
    length: int
    crc64: int | None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `key` in the flattened state dict, `shape`, `dtype` (``"bfloat16"``), bytes of its elements."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    shards: list[ShardEntry]


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """One value that is no tensor: `key` in the flattened state dict, bytes of its pickle, where it lies."""

    key: str
    length: int
    blob: str
    rank: int | None


@dataclass(frozen=True, slots=True)
class CheckpointContents:
    """What `inspect` found.

    Attributes:
        url: the checkpoint's place, without a SAS.
        torch_version: of the torch that saved it; None where its writer did not say (torch's own does not).
        writer_version: of this package, if it saved it; else None.
        dcp_version: what torch calls the version of the metadata, or None.
        save_id: of the save, or None.
        modified: when it was completed. With time zone.
        tensors: in the order of their keys.
        objects: in the order of their keys.
        size: bytes of all items.
    """

    url: str
    torch_version: str | None
    writer_version: str | None
    dcp_version: str | None
    save_id: str | None
    modified: datetime.datetime
    tensors: list[TensorEntry]
    objects: list[ObjectEntry]
    size: int


def inspect(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> CheckpointContents:
    """What the checkpoint at a URL holds. Fetches its metadata and nothing else.

    Of a save with ``use_collectives=False`` it is what all ranks hold together.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: its metadata cannot be read.
        StoreError: the service could not be asked.
    """
    checkpoint = open_checkpoint(url, Access(credential, options, ca_file))
    metadata = checkpoint.metadata
    tensors, objects = [], []
    for key in sorted(metadata.state_dict_metadata):
        entry = metadata.state_dict_metadata[key]
        if isinstance(entry, TensorStorageMetadata):
            tensors.append(_tensor(metadata, key, entry))
        else:
            item = stored_item(metadata.storage_data[MetadataIndex(key)])
            objects.append(ObjectEntry(key, item.length, item.relative_path, rank_of(item.relative_path)))
    meta = metadata.storage_meta
    return CheckpointContents(
        url=checkpoint.url,
        torch_version=_text(meta, "torch_version"),
        writer_version=_text(meta, "writer_version"),
        dcp_version=metadata.version,
        save_id=_text(meta, "save_id"),
        modified=checkpoint.modified,
        tensors=tensors,
        objects=objects,
        size=sum(stored_item(info).length for info in metadata.storage_data.values()),
    )


def dtype_name(dtype: object) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _tensor(metadata: Metadata, key: str, entry: TensorStorageMetadata) -> TensorEntry:
    shards = []
    for chunk in entry.chunks:
        item = stored_item(metadata.storage_data[MetadataIndex(key, chunk.offsets)])
        shards.append(
            ShardEntry(
                tuple(chunk.offsets),
                tuple(chunk.sizes),
                item.relative_path,
                rank_of(item.relative_path),
                item.offset,
                item.length,
                item.crc64,
            )
        )
    shards.sort(key=lambda shard: shard.offsets)
    dtype = entry.properties.dtype
    return TensorEntry(key, tuple(entry.size), dtype_name(dtype), math.prod(entry.size) * dtype.itemsize, shards)


def _text(meta: object, name: str) -> str | None:
    """An attribute of ``Metadata.storage_meta``, which whoever wrote it may have given any value."""
    value = getattr(meta, name, None)
    return value if type(value) is str else None
