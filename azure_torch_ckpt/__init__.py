"""PyTorch checkpoints in Azure Blob Storage."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from azure_torch_ckpt.datasets import (
    Blob,
    BlobCache,
    BlobDataset,
    BlobListing,
    BlobSampler,
    IterableBlobDataset,
    TarDataset,
)
from azure_torch_ckpt.dcp import AzureBlobReader, AzureBlobWriter, prune, remove_checkpoint, verify
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    BlobChangedError,
    BlobExistsError,
    BlobNotFoundError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CommitConflictError,
    ContainerNotFoundError,
    CorruptCheckpointError,
    CredentialError,
    EmulatorError,
    IncompleteSaveError,
    LocationError,
    RequestRefusedError,
    ServiceUnavailableError,
    StoreError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = [
    "AccessDeniedError",
    "AzureBlobReader",
    "AzureBlobWriter",
    "AzureCheckpointError",
    "Blob",
    "BlobCache",
    "BlobChangedError",
    "BlobDataset",
    "BlobExistsError",
    "BlobIO",
    "BlobListing",
    "BlobLocation",
    "BlobNotFoundError",
    "BlobSampler",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CheckpointReplacedError",
    "CommitConflictError",
    "ContainerNotFoundError",
    "CorruptCheckpointError",
    "CredentialError",
    "EmulatorError",
    "IncompleteSaveError",
    "IterableBlobDataset",
    "LocationError",
    "RequestRefusedError",
    "ServiceUnavailableError",
    "StoreError",
    "TarDataset",
    "TransferOptions",
    "UnsafeMetadataError",
    "UnsupportedCheckpointError",
    "__version__",
    "prune",
    "remove_checkpoint",
    "verify",
]

try:
    __version__ = version("azure-torch-ckpt")
except PackageNotFoundError:  # a source tree on sys.path that nobody installed
    __version__ = "0+source"
