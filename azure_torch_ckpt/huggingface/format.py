"""The bytes before the tensors of a safetensors file, and the index of several files.

https://huggingface.co/docs/safetensors/index#format: eight bytes with the length of a JSON object, that object, and the
tensors back to back. https://huggingface.co/docs/transformers/big_models#shard-metadata: the index.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch

from azure_torch_ckpt.errors import CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError

__all__ = [
    "HEADER_LENGTH_BYTES",
    "INDEX",
    "INDEX_LIMIT",
    "SINGLE",
    "Index",
    "Stored",
    "dump_header",
    "dump_index",
    "header_length",
    "parse_header",
    "parse_index",
    "why_no_text",
    "why_not",
]

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
INDEX_LIMIT: Final = 1 << 30
"""Bytes of an index that are read; what is larger is none."""
HEADER_LENGTH_BYTES: Final = 8
# What safetensors itself refuses to read.
_MAX_HEADER: Final = 100_000_000
# Of ours, in the index' metadata, of which transformers reads `total_size` only.
_EXTRA: Final = "azure_torch_ckpt"

# By the format's names, which count the bits of an element. As far as this torch has the dtype.
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F4": "float4_e2m1fn_x2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "U16": "uint16",
        "I16": "int16",
        "F16": "float16",
        "BF16": "bfloat16",
        "U32": "uint32",
        "I32": "int32",
        "F32": "float32",
        "U64": "uint64",
        "I64": "int64",
        "F64": "float64",
        "C64": "complex64",
    }.items()
    if hasattr(torch, attribute)
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
# Two numbers make one element of torch's dtype. The format counts the numbers, in the last dimension.
_PACKED: Final = frozenset({"F4"})
_METADATA: Final = "__metadata__"
_FILE: Final = re.compile(r"[^/\\:\x00-\x1f\x7f]{1,255}\.safetensors")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor, or a part of one, in a file.

    Attributes:
        dtype: None if this torch cannot hold it.
        dtype_name: the format's name of it.
        shape: in elements of `dtype`.
        offset: of its first byte in the file.
        length: bytes.
        at: where it starts in the tensor; zeros, unless torch's HuggingFaceStorageWriter saved shards.
    """

    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """What an index says.

    Attributes:
        files: the file of each tensor.
        crc64: CRC64-NVME of a tensor's bytes, of those that our writer saved.
    """

    files: Mapping[str, str]
    crc64: Mapping[str, int]


def why_not(name: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why a tensor has no place in a safetensors file, for a message; None if it has one."""
    if dtype not in _NAMES:
        return f"{name!r} has the dtype {dtype}, which safetensors does not have"
    if _NAMES[dtype] in _PACKED and not shape:
        return f"{name!r} is a scalar of {dtype}, and safetensors has no shape for its two numbers"
    if name == _METADATA:
        return f"safetensors keeps the name {name!r} for something else than a tensor"
    return why_no_text(name)


def why_no_text(text: str) -> str | None:
    """Why a text has no place in a safetensors file, for a message; None if it has one."""
    try:
        text.encode()
    except UnicodeEncodeError:  # json would write the half as an escape, which safetensors refuses to read
        return f"{text[:200]!r} has half a surrogate pair, which is no text"
    return None


def dump_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], texts: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a file whose tensors follow in this order. Its length is a multiple of eight.

    It was parsed again, and says what it was made of.

    Args:
        tensors: those for which `why_not` knows no reason.
        texts: for the file's ``__metadata__``; ``format`` is added, as other writers do it.

    Raises:
        UnsupportedCheckpointError: nobody could read it.
    """
    entries: dict[str, Any] = {_METADATA: {"format": "pt", **(texts or {})}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        numbers = [*shape]
        if _NAMES[dtype] in _PACKED:
            numbers[-1] *= 2
        entries[name] = {"dtype": _NAMES[dtype], "shape": numbers, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise UnsupportedCheckpointError(
            f"The header of a safetensors file with {len(tensors)} tensors takes {len(text)} bytes, and readers take "
            f"{_MAX_HEADER}. Spread the tensors over more files"
        )
    try:
        stored = parse_header(text, HEADER_LENGTH_BYTES + len(text) + position, "The header of the file to be written")
    except CorruptCheckpointError as error:
        raise UnsupportedCheckpointError(f"A safetensors file cannot hold this state dict: {error}") from error
    for name, (dtype, shape) in tensors.items():
        if name not in stored or (stored[name].dtype, stored[name].shape) != (dtype, shape):
            raise UnsupportedCheckpointError(f"{name[:200]!r} has no place in a safetensors file. Rename it")
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def header_length(data: bytes, size: int, where: str) -> int:
    """Bytes of the JSON object, from the first eight of a file of `size` bytes.

    Raises:
        CorruptCheckpointError: this is the beginning of no safetensors file.
    """
    length = int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
    if len(data) < HEADER_LENGTH_BYTES or length > min(_MAX_HEADER, size - HEADER_LENGTH_BYTES):
        _corrupt(where, "it does not begin with the length of a header")
    return length


def parse_header(text: bytes, size: int, where: str) -> dict[str, Stored]:
    """The tensors of a file of `size` bytes.

    Args:
        text: the JSON object.
        where: names the file in messages.

    Raises:
        CorruptCheckpointError: it is no header, or does not fit the file.
    """
    entries = _object(text, where)
    start = HEADER_LENGTH_BYTES + len(text)
    extra = entries.pop(_METADATA, None) or {}
    sharding = _sharding(extra, where)
    tensors: dict[str, Stored] = {}
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            _corrupt(where, f"{name[:200]!r} has no dtype, shape or data_offsets")
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            _corrupt(where, f"the shape or data_offsets of {name[:200]!r} are no numbers")
        if type(dtype) is not str:
            _corrupt(where, f"the dtype of {name[:200]!r} is no string")
        held = _DTYPES.get(dtype)
        if dtype in _PACKED and held is not None:
            if shape and shape[-1] % 2 == 0:
                shape = (*shape[:-1], shape[-1] // 2)
            else:
                held = None  # two numbers of different rows would share an element
        length = end - begin if held is None else math.prod(shape) * held.itemsize
        if end - begin != length or length < 0 or start + end > size:
            _corrupt(where, f"{name[:200]!r} needs {length} bytes, from {begin} to {end} of {size - start}")
        at = sharding.get(name, (0,) * len(shape))
        if len(at) != len(shape):
            _corrupt(where, f"the saved offsets of {name[:200]!r} do not fit its shape")
        tensors[name] = Stored(held, dtype, shape, start + begin, length, at)
    return tensors


def dump_index(files: Mapping[str, str], total_size: int, save_id: str, crc64: Mapping[str, int]) -> bytes:
    """The index, with a save's id and the checksums beside what HuggingFace defines.

    It was parsed again, and says what it was made of.

    Raises:
        UnsupportedCheckpointError: nobody could read it.
    """
    ours = {"save_id": save_id, "crc64": {name: f"{crc:016x}" for name, crc in crc64.items()}}
    index = {"metadata": {"total_size": total_size, _EXTRA: ours}, "weight_map": dict(sorted(files.items()))}
    data = json.dumps(index, indent=1).encode()
    if len(data) > INDEX_LIMIT or parse_index(data, "The index of this save") != Index(files, crc64):
        raise UnsupportedCheckpointError(
            f"The index of this model ({len(data)} bytes for {len(files)} tensors) could not be read again. Save fewer "
            "tensors in one model"
        )
    return data


def parse_index(data: bytes, where: str) -> Index:
    """What an index says.

    Raises:
        CorruptCheckpointError: it is none.
        UnsafeMetadataError: it names a file that does not lie beside it.
    """
    index = _object(data, where)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        _corrupt(where, "weight_map is missing, or does not map names to files")
    for file in set(files.values()):
        if not _FILE.fullmatch(file):
            raise UnsafeMetadataError(
                f"{where} names the file {file[:200]!r}, which is no safetensors file beside it. Nothing was fetched. "
                "It is damaged or was made to do harm; use another checkpoint"
            )
    metadata = index.get("metadata")
    ours = metadata.get(_EXTRA) if isinstance(metadata, dict) else None
    sums = ours.get("crc64") if isinstance(ours, dict) else None
    try:
        crc64 = {name: int(crc, 16) for name, crc in sums.items()} if isinstance(sums, dict) else {}
    except (TypeError, ValueError):
        _corrupt(where, "its checksums are no hexadecimal numbers")
    return Index(files, crc64)


def _sharding(extra: Any, where: str) -> dict[str, tuple[int, ...]]:
    """Of the files in which torch's HuggingFaceStorageWriter(save_distributed=True) keeps a rank's shards."""
    if not isinstance(extra, dict) or "DCP_SHARDING_INFO" not in extra:
        return {}
    try:
        info = json.loads(extra["DCP_SHARDING_INFO"])
        return {name: tuple(int(start) for start in entry["saved_offsets"]) for name, entry in info.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        _corrupt(where, "its DCP_SHARDING_INFO is not what torch writes")


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        _corrupt(where, "it holds no JSON")
    if not isinstance(value, dict):
        _corrupt(where, "it holds no JSON object")
    return value


def _corrupt(where: str, reason: str) -> NoReturn:
    raise CorruptCheckpointError(f"{where} is damaged: {reason}. Restore it or use another checkpoint")
