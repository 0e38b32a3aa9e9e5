"""How are models saved and loaded as safetensors files with an index, as transformers does?

Others may use the two classes, `safetensors_header`, and `leftovers`.
"""

from __future__ import annotations

from azure_torch_ckpt.huggingface.reader import AzureBlobHuggingFaceReader
from azure_torch_ckpt.huggingface.writer import AzureBlobHuggingFaceWriter

__all__ = ["AzureBlobHuggingFaceReader", "AzureBlobHuggingFaceWriter"]
