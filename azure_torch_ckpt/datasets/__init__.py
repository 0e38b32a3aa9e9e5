"""Datasets of blobs for `torch.utils.data.DataLoader`."""

from __future__ import annotations

from azure_torch_ckpt.datasets.blob import Blob
from azure_torch_ckpt.datasets.cache import BlobCache
from azure_torch_ckpt.datasets.iterable import IterableBlobDataset
from azure_torch_ckpt.datasets.listing import BlobListing, ListedBlob
from azure_torch_ckpt.datasets.mapped import BlobDataset, BlobSampler
from azure_torch_ckpt.datasets.tar import TarDataset

__all__ = [
    "Blob",
    "BlobCache",
    "BlobDataset",
    "BlobListing",
    "BlobSampler",
    "IterableBlobDataset",
    "ListedBlob",
    "TarDataset",
]
