"""The headers of safetensors files: what safetensors itself writes and reads, and nothing that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from azure_torch_ckpt import UnsafeMetadataError, UnsupportedCheckpointError
from azure_torch_ckpt.huggingface.blob_names import dump_index, parse_index
from azure_torch_ckpt.huggingface.safetensors_header import dump_header, parse_header, why_not

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtypes_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype):
    """Every dtype of torch is written under the name that safetensors gives it, or refused as safetensors does."""
    try:
        data = save({"w": torch.zeros(16, dtype=torch.uint8).view(dtype)})
    except (KeyError, RuntimeError, TypeError, ValueError):
        assert why_not("w", dtype, (2,)) is not None
        return
    theirs = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["w"]
    (tmp_path / "file").write_bytes(data)
    shape = load_file(tmp_path / "file")["w"].shape
    assert why_not("w", dtype, shape) is None
    ours = dump_header({"w": (dtype, tuple(shape))})
    assert json.loads(ours[8:])["w"] == theirs
    stored = parse_header(ours[8:], len(ours) + 16, "x")["w"]
    assert (stored.dtype, stored.shape, stored.length) == (dtype, shape, 16)


def test_a_header_or_an_index_that_no_reader_could_parse_is_not_made(monkeypatch: pytest.MonkeyPatch):
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"w": (torch.float32, (2,)), "v": (torch.int8, ())}
    data = dump_header(tensors)
    assert list(parse_header(data[8:], len(data) + 9, "x")) == ["w", "v"]
    with pytest.raises(UnsupportedCheckpointError, match="__metadata__"):
        dump_header({"__metadata__": (torch.int8, (4,))})
    monkeypatch.setattr("azure_torch_ckpt.huggingface.safetensors_header._MAX_HEADER", 100)
    with pytest.raises(UnsupportedCheckpointError, match=r"2 tensors takes \d+ bytes"):
        dump_header(tensors)
    assert parse_index(dump_index({"w": "a.safetensors"}, 4, "id", {"w": 5}), "x").crc64 == {"w": 5}
    with pytest.raises(UnsafeMetadataError):
        dump_index({"w": "../a.safetensors"}, 4, "id", {})
    monkeypatch.setattr("azure_torch_ckpt.huggingface.blob_names.INDEX_LIMIT", 10)
    with pytest.raises(UnsupportedCheckpointError):
        dump_index({"w": "a.safetensors"}, 4, "id", {})
