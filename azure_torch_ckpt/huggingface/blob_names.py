"""What the blobs of a model are called, below its URL: their names are made and parsed here.

    model.safetensors.index.json                  names the file of each tensor; the model exists exactly when it does
    model.safetensors                             a model in one file, by other writers; readers prefer it to an index
    model-<save id>-00001-of-00003.safetensors    whole tensors of one save
    model-<save id>-000001.shards                 a rank's shards of tensors that are to be joined, during a save

The first two names and the form of the third are those of transformers:
https://huggingface.co/docs/transformers/big_models#shard-metadata
"""

from __future__ import annotations

import re
from typing import Final

from azure_torch_ckpt.dcp import blob_names

__all__ = [
    "INDEX",
    "INDEX_SUFFIX",
    "SINGLE",
    "file_name",
    "is_file_name",
    "name_prefix",
    "new_save_id",
    "save_id_of",
    "shards_name",
]

INDEX: Final = "model.safetensors.index.json"
INDEX_SUFFIX: Final = ".safetensors.index.json"
"""What the name of any index ends with."""
SINGLE: Final = "model.safetensors"

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
