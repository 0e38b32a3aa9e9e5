"""What the blobs of a model are called, below its URL, and the index that names them: made and parsed here.

    model.safetensors.index.json                  names the file of each tensor; the model exists exactly when it does
    model.safetensors                             a model in one file, by other writers; readers prefer it to an index
    model-<save id>-00001-of-00003.safetensors    whole tensors of one save
    model-<save id>-000001.shards                 a rank's shards of tensors that are to be joined, during a save

The index, the first two names and the form of the third are those of transformers:
https://huggingface.co/docs/transformers/big_models#shard-metadata
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from azure_torch_ckpt.dcp import blob_names
from azure_torch_ckpt.errors import UnsafeMetadataError, UnsupportedCheckpointError
from azure_torch_ckpt.huggingface.safetensors_header import corrupt, parse_object

__all__ = [
    "INDEX",
    "INDEX_LIMIT",
    "INDEX_SUFFIX",
    "SINGLE",
    "ModelIndex",
    "dump_index",
    "file_name",
    "is_file_name",
    "name_prefix",
    "new_save_id",
    "parse_index",
    "save_id_of",
    "shards_name",
]

INDEX: Final = "model.safetensors.index.json"
INDEX_SUFFIX: Final = ".safetensors.index.json"
"""What the name of any index ends with."""
SINGLE: Final = "model.safetensors"
INDEX_LIMIT: Final = 1 << 30
"""The largest index that is read, in bytes."""

# Where our part of the index' metadata is. transformers reads `total_size` only.
_EXTRA: Final = "azure_torch_ckpt"

_SAVED = re.compile(r"model-([0-9a-f]{16})-(?:\d{5,}-of-\d{5,}\.safetensors|\d{6,}\.shards)")
_FILE = re.compile(r"[^/\\:\x00-\x1f\x7f]{1,255}\.safetensors")


def new_save_id() -> str:
    return blob_names.new_save_id()[:16]


def name_prefix(save_id: str) -> str:
    """What the names of all files of a save begin with."""
    return f"model-{save_id}-"


def file_name(save_id: str, number: int, count: int) -> str:
    """The name of one of the `count` files of a save; `number` counts from 1."""
    return f"{name_prefix(save_id)}{number:05d}-of-{count:05d}.safetensors"


def shards_name(save_id: str, rank: int) -> str:
    """The name of the file that a rank's shards are in until they are joined."""
    return f"{name_prefix(save_id)}{rank:06d}.shards"


def save_id_of(name: str) -> str | None:
    """The save id in the name of a file by `AzureBlobHuggingFaceWriter`; None for any other name."""
    match = _SAVED.fullmatch(name)
    return None if match is None else match[1]


def is_file_name(name: str) -> bool:
    """Whether an index may have this name: a safetensors file in the folder of the index."""
    return _FILE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """The content of an index: each tensor's file, and the CRC64-NVME of its bytes, as far as our writer saved them."""

    files: Mapping[str, str]
    crc64: Mapping[str, int]


def dump_index(files: Mapping[str, str], total_size: int, save_id: str, crc64: Mapping[str, int]) -> bytes:
    """Serialise an index, with a save's id and the checksums beside what HuggingFace defines, and check that it parses.

    Raises:
        UnsupportedCheckpointError: no reader could parse it.
    """
    ours = {"save_id": save_id, "crc64": {name: f"{crc:016x}" for name, crc in crc64.items()}}
    index = {"metadata": {"total_size": total_size, _EXTRA: ours}, "weight_map": dict(sorted(files.items()))}
    data = json.dumps(index, indent=1).encode()
    if len(data) > INDEX_LIMIT or parse_index(data, "The index of this save") != ModelIndex(files, crc64):
        raise UnsupportedCheckpointError(
            f"The index of this model ({len(data)} bytes for {len(files)} tensors) could not be read again. Save fewer "
            "tensors in one model"
        )
    return data


def parse_index(data: bytes, where: str) -> ModelIndex:
    """Parse an index, which `where` names in messages.

    Raises:
        CorruptCheckpointError: it is not an index.
        UnsafeMetadataError: it names a file outside its own folder.
    """
    index = parse_object(data, where)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        corrupt(where, "weight_map is missing, or does not map names to files")
    for file in set(files.values()):
        if not is_file_name(file):
            raise UnsafeMetadataError(
                f"{where} names the file {file[:200]!r}, which is not a safetensors file in the same folder. Nothing "
                "was fetched. The index is damaged or was made to do harm; use another checkpoint"
            )
    metadata = index.get("metadata")
    ours = metadata.get(_EXTRA) if isinstance(metadata, dict) else None
    sums = ours.get("crc64") if isinstance(ours, dict) else None
    try:
        crc64 = {name: int(crc, 16) for name, crc in sums.items()} if isinstance(sums, dict) else {}
    except (TypeError, ValueError):
        corrupt(where, "its checksums are not hexadecimal numbers")
    return ModelIndex(files, crc64)
