"""The modules of the distribution ``lightning``. `azure_torch_ckpt.pytorch_lightning` has its own file of this name."""

from __future__ import annotations

try:
    import lightning.pytorch as pytorch
except ImportError as error:
    raise ImportError(
        "azure_torch_ckpt.lightning needs Lightning: pip install 'azure-torch-ckpt[lightning]' (for the distribution "
        "pytorch-lightning, use azure_torch_ckpt.pytorch_lightning)"
    ) from error

from lightning.fabric import plugins as fabric_plugins
from lightning.fabric.strategies import ddp, fsdp, model_parallel, parallel
from lightning.pytorch.plugins.io import wrapper

__all__ = ["ddp", "fabric_plugins", "fsdp", "model_parallel", "parallel", "pytorch", "wrapper"]
