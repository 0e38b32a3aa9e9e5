"""The head of a safetensors file (https://huggingface.co/docs/safetensors/index#format)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from azure_torch_ckpt.errors import UnsupportedCheckpointError

__all__ = ["as_text", "safetensors_head"]

# The format's names, as far as torch has the dtype (float8_e8m0fnu and the like came with torch 2.7 and later).
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}


def safetensors_head(
    tensors: Mapping[str, TensorStorageMetadata], texts: Mapping[str, str]
) -> tuple[bytes, list[tuple[str, TensorStorageMetadata]]]:
    """The bytes before the first tensor's, and the tensors in the order in which theirs follow.

    Args:
        texts: for the file's ``__metadata__``; ``format`` is added, as other writers do it.

    Raises:
        UnsupportedCheckpointError: the format has no name for a dtype, or for a tensor that is called ``__metadata__``.
    """
    unnamed = sorted(key for key, entry in tensors.items() if _name(entry.properties.dtype) is None)
    if unnamed or "__metadata__" in tensors:
        key = unnamed[0] if unnamed else "__metadata__"
        raise UnsupportedCheckpointError(
            f"{key!r} ({tensors[key].properties.dtype}) has no place in a safetensors file. Write a .pt file, or leave "
            "the tensor out with keys="
        )
    # Largest elements first, so that each tensor's bytes are aligned to their size.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].properties.dtype.itemsize, pair[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **texts}}
    position = 0
    for key, entry in ordered:
        end = position + math.prod(entry.size) * entry.properties.dtype.itemsize
        header[key] = {
            "dtype": _name(entry.properties.dtype),
            "shape": list(entry.size),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def as_text(value: object) -> str | None:
    """A value for ``__metadata__``, which holds strings only: a string as it is, anything else as JSON.

    None if it is more than numbers, strings, booleans, None, and lists, tuples and dicts with string keys of them.
    """
    if isinstance(value, str):
        return value
    return json.dumps(value) if _is_simple(value) else None


def _is_simple(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_simple(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_simple, value))
    return value is None or type(value) in (bool, int, float, str)


def _name(dtype: torch.dtype) -> str | None:
    return _NAMES.get(str(dtype).removeprefix("torch."))
