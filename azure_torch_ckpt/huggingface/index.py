"""The index of a model: which tensor is in which file, and the checksums of the tensors.

https://huggingface.co/docs/transformers/big_models#shard-metadata
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from azure_torch_ckpt.errors import UnsafeMetadataError, UnsupportedCheckpointError
from azure_torch_ckpt.huggingface.blob_names import is_file_name
from azure_torch_ckpt.huggingface.safetensors_header import corrupt, parse_object

__all__ = ["INDEX_LIMIT", "ModelIndex", "dump_index", "parse_index"]

INDEX_LIMIT: Final = 1 << 30
"""The largest index that is read, in bytes."""
# Where our part of the index' metadata is. transformers reads `total_size` only.
_EXTRA: Final = "azure_torch_ckpt"


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """The content of an index.

    Attributes:
        files: the file of each tensor.
        crc64: CRC64-NVME of each tensor's bytes, as far as our writer saved them.
    """

    files: Mapping[str, str]
    crc64: Mapping[str, int]


def dump_index(files: Mapping[str, str], total_size: int, save_id: str, crc64: Mapping[str, int]) -> bytes:
    """Serialise an index, with a save's id and the checksums beside what HuggingFace defines.

    The result has been parsed again and compared with the arguments.

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
    """Parse an index.

    Args:
        where: names the index in messages.

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
