"""Storage backend for torch.distributed.checkpoint."""

from __future__ import annotations

from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.removal import Remains, remove_checkpoint
from azure_torch_ckpt.dcp.save_planner import AzureSavePlanner
from azure_torch_ckpt.dcp.verification import BlobReport, VerifyReport, verify
from azure_torch_ckpt.dcp.writer import AzureBlobWriter

__all__ = [
    "AzureBlobReader",
    "AzureBlobWriter",
    "AzureSavePlanner",
    "BlobReport",
    "Remains",
    "VerifyReport",
    "remove_checkpoint",
    "verify",
]
