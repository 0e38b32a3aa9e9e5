"""The public names of `azure_torch_ckpt.lightning` and of `azure_torch_ckpt.pytorch_lightning`."""

from __future__ import annotations

from .checkpoint_io import AzureBlobCheckpointIO
from .conversion import export_checkpoint, import_checkpoint, load_from_checkpoint
from .model_checkpoint import AzureBlobModelCheckpoint
from .strategies import AzureDDPStrategy, AzureFSDPStrategy, AzureModelParallelStrategy

__all__ = [
    "AzureBlobCheckpointIO",
    "AzureBlobModelCheckpoint",
    "AzureDDPStrategy",
    "AzureFSDPStrategy",
    "AzureModelParallelStrategy",
    "export_checkpoint",
    "import_checkpoint",
    "load_from_checkpoint",
]
