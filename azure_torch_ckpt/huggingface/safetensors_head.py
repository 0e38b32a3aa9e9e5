"""The head of a safetensors file (https://huggingface.co/docs/safetensors/index#format)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from azure_torch_ckpt.errors import UnsupportedCheckpointError
from azure_torch_ckpt.huggingface.format import dump_header, why_no_text, why_not

__all__ = ["as_text", "safetensors_head"]


def safetensors_head(
    tensors: Mapping[str, TensorStorageMetadata], texts: Mapping[str, str]
) -> tuple[bytes, list[tuple[str, TensorStorageMetadata]]]:
    """The bytes before the first tensor's, and the tensors in the order in which theirs follow.

    Args:
        texts: for the file's ``__metadata__``; ``format`` is added, as other writers do it.

    Raises:
        UnsupportedCheckpointError: the format has no place for a tensor or a text.
    """
    reasons = [why_not(key, entry.properties.dtype, entry.size) for key, entry in sorted(tensors.items())]
    reasons += [why_no_text(key) or why_no_text(text) for key, text in texts.items()]
    for reason in filter(None, reasons):
        raise UnsupportedCheckpointError(f"{reason}. Write a .pt file, or leave it out with keys=")
    # Largest elements first, so that each tensor's bytes are aligned to their size.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].properties.dtype.itemsize, pair[0]))
    return dump_header({key: (entry.properties.dtype, tuple(entry.size)) for key, entry in ordered}, texts), ordered


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
