"""How blobs become samples of a `torch.utils.data.DataLoader`: datasets, their listing, their order and their cache.

Other folders use only the names below. A dataset goes through a `BlobListing` in an order (`order`), remembers how far
it has read (`epoch_state`), and makes samples of blobs (`blob_datasets`) or of members of tar files (`tar_archive`).
"""

from __future__ import annotations

from azure_torch_ckpt.datasets.blob import Blob
from azure_torch_ckpt.datasets.blob_datasets import BlobDataset, BlobSampler, IterableBlobDataset
from azure_torch_ckpt.datasets.cache import BlobCache
from azure_torch_ckpt.datasets.listing import BlobListing, ListedBlob
from azure_torch_ckpt.datasets.tar_dataset import TarDataset

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
