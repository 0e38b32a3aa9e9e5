"""The header of a safetensors file: the bytes before its tensors, which say where each tensor is.

https://huggingface.co/docs/safetensors/index#format: eight bytes with the length of a JSON object, that object, and the
tensors back to back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from azure_torch_ckpt.errors import CorruptCheckpointError, UnsupportedCheckpointError

__all__ = [
    "HEADER_LENGTH_BYTES",
    "StoredTensor",
    "as_text",
    "corrupt",
    "dump_header",
    "dump_ordered_header",
    "header_length",
    "parse_header",
    "parse_object",
    "why_not",
]

HEADER_LENGTH_BYTES: Final = 8
# Bytes. safetensors itself refuses longer ones.
_MAX_HEADER: Final = 100_000_000

# The dtypes of the format that torch has, by the format's names. Older versions of torch lack some. safetensors has
# F6_E2M3 and F6_E3M2 as well (https://docs.rs/safetensors/latest/safetensors/tensor/enum.Dtype.html); torch does not.
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
# An element of torch's dtype is two numbers. In the shape, the format counts the numbers, in the last dimension.
_PACKED: Final = frozenset({"F4"})
_METADATA: Final = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, or a chunk of one, in a file.

    Attributes:
        dtype: None if this torch does not have it.
        dtype_name: the format's name of the dtype.
        shape: in elements of `dtype`.
        offset: of its first byte in the file.
        length: bytes.
        at: the chunk's first index in the tensor; zeros, unless torch's HuggingFaceStorageWriter saved shards.
    """

    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    at: tuple[int, ...]


def why_not(name: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why a safetensors file cannot hold a tensor, for a message; None if it can."""
    if dtype not in _NAMES:
        return f"{name!r} has the dtype {dtype}, which safetensors does not have"
    if _NAMES[dtype] in _PACKED and not shape:
        return f"{name!r} is a scalar of {dtype}, and safetensors has no shape for its two numbers"
    if name == _METADATA:
        return f"safetensors reserves the name {name!r}, so no tensor can have it"
    return _why_no_text(name)


def _why_no_text(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:  # json would write it as an escape, which safetensors refuses to read
        return f"{text[:200]!r} has half a surrogate pair, and safetensors holds valid Unicode only"
    return None


def dump_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], texts: Mapping[str, str] | None = None
) -> bytes:
    """Serialise the header of a file whose tensors follow in this order. Its length is a multiple of eight.

    The result has been parsed again and compared with the arguments.

    Args:
        tensors: dtype and shape by name. `why_not` is None for each.
        texts: for the file's ``__metadata__``; ``format`` is added, as other writers do.

    Raises:
        UnsupportedCheckpointError: no reader could parse it.
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
            raise UnsupportedCheckpointError(f"A safetensors file cannot hold a tensor {name[:200]!r}. Rename it")
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def dump_ordered_header(
    tensors: Mapping[str, TensorStorageMetadata], texts: Mapping[str, str]
) -> tuple[bytes, list[tuple[str, TensorStorageMetadata]]]:
    """`dump_header`, and the tensors in the order in which they must follow it."""
    reasons = [why_not(key, entry.properties.dtype, entry.size) for key, entry in sorted(tensors.items())]
    reasons += [_why_no_text(key) or _why_no_text(text) for key, text in texts.items()]
    for reason in filter(None, reasons):
        raise UnsupportedCheckpointError(f"{reason}. Write a .pt file, or omit it with keys=")
    # Largest elements first, so that each tensor's bytes are aligned to their size.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].properties.dtype.itemsize, pair[0]))
    return dump_header({key: (entry.properties.dtype, tuple(entry.size)) for key, entry in ordered}, texts), ordered


def as_text(value: object) -> str | None:
    """Convert a value for ``__metadata__``, which holds strings only: a string stays, anything else becomes JSON.

    None if the value is more than numbers, strings, booleans, None, and lists, tuples and dicts with string keys of
    them.
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


def header_length(data: bytes, size: int, where: str) -> int:
    """Parse a file's first eight bytes: the length of the JSON object that follows, in bytes; `size` is the file's."""
    length = int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
    if len(data) < HEADER_LENGTH_BYTES or length > min(_MAX_HEADER, size - HEADER_LENGTH_BYTES):
        corrupt(where, "it does not begin with the length of a header")
    return length


def parse_header(text: bytes, size: int, where: str) -> dict[str, StoredTensor]:
    """Parse the header of a file of `size` bytes: `text` is its JSON object, and `where` names the file in messages.

    Returns:
        The tensors by name.

    Raises:
        CorruptCheckpointError: it is not a header, or does not fit the file.
    """
    entries = parse_object(text, where)
    start = HEADER_LENGTH_BYTES + len(text)
    extra = entries.pop(_METADATA, None) or {}
    sharding = _sharding(extra, where)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            corrupt(where, f"{name[:200]!r} has no dtype, shape or data_offsets")
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            corrupt(where, f"the shape or data_offsets of {name[:200]!r} are not numbers")
        if type(dtype) is not str:
            corrupt(where, f"the dtype of {name[:200]!r} is not a string")
        held = _DTYPES.get(dtype)
        if dtype in _PACKED and held is not None:
            if shape and shape[-1] % 2 == 0:
                shape = (*shape[:-1], shape[-1] // 2)
            else:
                held = None  # two numbers of different rows would share an element
        length = end - begin if held is None else math.prod(shape) * held.itemsize
        if end - begin != length or length < 0 or start + end > size:
            corrupt(where, f"{name[:200]!r} needs {length} bytes, from {begin} to {end} of {size - start}")
        at = sharding.get(name, (0,) * len(shape))
        if len(at) != len(shape):
            corrupt(where, f"the saved offsets of {name[:200]!r} do not fit its shape")
        tensors[name] = StoredTensor(held, dtype, shape, start + begin, length, at)
    return tensors


def _sharding(extra: Any, where: str) -> dict[str, tuple[int, ...]]:
    """The first index of each chunk, in a file of torch's HuggingFaceStorageWriter(save_distributed=True)."""
    if not isinstance(extra, dict) or "DCP_SHARDING_INFO" not in extra:
        return {}
    try:
        info = json.loads(extra["DCP_SHARDING_INFO"])
        return {name: tuple(int(start) for start in entry["saved_offsets"]) for name, entry in info.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        corrupt(where, "its DCP_SHARDING_INFO is not what torch writes")


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; `CorruptCheckpointError` for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        corrupt(where, "it is not JSON")
    if not isinstance(value, dict):
        corrupt(where, "it is not a JSON object")
    return value


def corrupt(where: str, reason: str) -> NoReturn:
    """Raise `CorruptCheckpointError` for the file that `where` names."""
    raise CorruptCheckpointError(f"{where} is damaged: {reason}. Restore it or use another checkpoint")
