"""`inspect`: the tensors and objects of a checkpoint, as its metadata describes them."""

from __future__ import annotations

import datetime
import math
import os
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.blob_names import data_rank
from azure_torch_ckpt.dcp.metadata.schema import stored_item
from azure_torch_ckpt.dcp.open_checkpoint import open_checkpoint
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["CheckpointContents", "ObjectEntry", "ShardEntry", "TensorEntry", "dtype_name", "inspect"]


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One stored chunk of a tensor.

    Attributes:
        offsets: index of its first element in the tensor, one number per dimension.
        sizes: its shape.
        blob: name of its blob, relative to the checkpoint's URL.
        rank: rank that wrote it, or None if the blob's name does not contain one.
        offset: offset of its first byte in the blob.
        length: bytes in the blob, including what ``torch.save`` puts around the elements.
        crc64: CRC64-NVME of these bytes, or None.
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
    """One tensor.

    Attributes:
        key: key in the flattened state dict.
        shape: shape of the whole tensor.
        dtype: name such as ``"bfloat16"``.
        size: bytes of its elements.
        shards: its stored chunks, in the order of their offsets.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    shards: list[ShardEntry]


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """One value that is not a tensor.

    Attributes:
        key: key in the flattened state dict.
        length: bytes of its pickle.
        blob: name of its blob, relative to the checkpoint's URL.
        rank: rank that wrote it, or None if the blob's name does not contain one.
    """

    key: str
    length: int
    blob: str
    rank: int | None


@dataclass(frozen=True, slots=True)
class CheckpointContents:
    """The result of `inspect`.

    Attributes:
        url: URL of the checkpoint without a SAS.
        torch_version: version of the torch that saved it; None if its writer did not record it (torch's own does not).
        writer_version: version of this package if it saved the checkpoint; else None.
        dcp_version: torch's version of the metadata, or None.
        save_id: id of the save, or None.
        modified: time of completion, with time zone.
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
    """Describe the checkpoint at a URL. Reads only its metadata.

    After a save with ``use_collectives=False``, the result has the tensors and objects of all ranks.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: its metadata cannot be read.
        StoreError: a request failed.
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
            objects.append(ObjectEntry(key, item.length, item.relative_path, data_rank(item.relative_path)))
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
    """Return ``"bfloat16"`` for ``torch.bfloat16``."""
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
                data_rank(item.relative_path),
                item.offset,
                item.length,
                item.crc64,
            )
        )
    shards.sort(key=lambda shard: shard.offsets)
    dtype = entry.properties.dtype
    return TensorEntry(key, tuple(entry.size), dtype_name(dtype), math.prod(entry.size) * dtype.itemsize, shards)


def _text(meta: object, name: str) -> str | None:
    """Return an attribute of ``Metadata.storage_meta`` if it is a string; other writers may set anything."""
    value = getattr(meta, name, None)
    return value if type(value) is str else None
