"""PyTorch checkpoints in Azure Blob Storage."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from azure_torch_ckpt.catalog import prune
from azure_torch_ckpt.datasets import (
    Blob,
    BlobCache,
    BlobDataset,
    BlobListing,
    BlobSampler,
    IterableBlobDataset,
    TarDataset,
)
from azure_torch_ckpt.dcp import AzureBlobReader, AzureBlobWriter, remove_checkpoint, verify
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
    ConfigurationError,
    ContainerNotFoundError,
    CorruptCheckpointError,
    CredentialError,
    CredentialTypeError,
    EmulatorError,
    IncompleteSaveError,
    LocalFileError,
    LocationError,
    MissingDependencyError,
    RequestRefusedError,
    ServiceUnavailableError,
    StoreError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from azure_torch_ckpt.huggingface import AzureBlobHuggingFaceReader, AzureBlobHuggingFaceWriter
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = [
    "AccessDeniedError",
    "AzureBlobFileSystem",
    "AzureBlobHuggingFaceReader",
    "AzureBlobHuggingFaceWriter",
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
    "ConfigurationError",
    "ContainerNotFoundError",
    "CorruptCheckpointError",
    "CredentialError",
    "CredentialTypeError",
    "EmulatorError",
    "IncompleteSaveError",
    "IterableBlobDataset",
    "LocalFileError",
    "LocationError",
    "MissingDependencyError",
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
