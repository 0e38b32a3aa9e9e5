"""Checkpoints in the layout of HuggingFace: safetensors files and their index."""

from __future__ import annotations

from azure_torch_ckpt.huggingface.reader import AzureBlobHuggingFaceReader
from azure_torch_ckpt.huggingface.writer import AzureBlobHuggingFaceWriter

__all__ = ["AzureBlobHuggingFaceReader", "AzureBlobHuggingFaceWriter"]
