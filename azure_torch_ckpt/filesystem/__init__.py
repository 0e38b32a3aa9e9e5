"""``azblob://`` for fsspec: what takes an fsspec URL takes one of Blob Storage."""

from __future__ import annotations

from azure_torch_ckpt.filesystem.spec import AzureBlobFileSystem

__all__ = ["AzureBlobFileSystem"]
