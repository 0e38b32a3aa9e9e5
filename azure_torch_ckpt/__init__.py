"""PyTorch checkpoints in Azure Blob Storage."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from azure_torch_ckpt import errors
from azure_torch_ckpt.errors import *  # noqa: F403
from azure_torch_ckpt.events import TransferEvent, add_listener, listening, remove_listener
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import AllRanks, Progress

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import prune, verify
    from azure_torch_ckpt.datasets import (
        Blob,
        BlobCache,
        BlobDataset,
        BlobListing,
        BlobSampler,
        IterableBlobDataset,
        TarDataset,
    )
    from azure_torch_ckpt.dcp import AzureBlobReader, AzureBlobWriter, AzureSavePlanner, remove_checkpoint
    from azure_torch_ckpt.filesystem import AzureBlobFileSystem
    from azure_torch_ckpt.huggingface import AzureBlobHuggingFaceReader, AzureBlobHuggingFaceWriter
    from azure_torch_ckpt.io import BlobIO

__all__ = [
    "AllRanks",
    "AzureBlobFileSystem",
    "AzureBlobHuggingFaceReader",
    "AzureBlobHuggingFaceWriter",
    "AzureBlobReader",
    "AzureBlobWriter",
    "AzureSavePlanner",
    "Blob",
    "BlobCache",
    "BlobDataset",
    "BlobIO",
    "BlobListing",
    "BlobLocation",
    "BlobSampler",
    "IterableBlobDataset",
    "Progress",
    "TarDataset",
    "TransferEvent",
    "TransferOptions",
    "__version__",
    "add_listener",
    "listening",
    "prune",
    "remove_checkpoint",
    "remove_listener",
    "verify",
]
__all__ += errors.__all__

# Imported when it is used: torch takes seconds, for which the command's --help and its completion need not wait.
_HOMES = {
    "catalog": ("prune", "verify"),
    "datasets": ("Blob", "BlobCache", "BlobDataset", "BlobListing", "BlobSampler", "IterableBlobDataset", "TarDataset"),
    "dcp": ("AzureBlobReader", "AzureBlobWriter", "AzureSavePlanner", "remove_checkpoint"),
    "filesystem": ("AzureBlobFileSystem",),
    "huggingface": ("AzureBlobHuggingFaceReader", "AzureBlobHuggingFaceWriter"),
    "io": ("BlobIO",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # `azure_torch_ckpt.catalog`
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


try:
    __version__ = version("azure-torch-ckpt")
except PackageNotFoundError:  # a source tree on sys.path that nobody installed
    __version__ = "0+source"
