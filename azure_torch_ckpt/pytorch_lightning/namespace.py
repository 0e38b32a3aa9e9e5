"""The modules of the distribution ``pytorch_lightning``, in place of `azure_torch_ckpt.lightning.namespace`."""

from __future__ import annotations

try:
    import pytorch_lightning as pytorch
except ImportError as error:
    raise ImportError(
        "azure_torch_ckpt.pytorch_lightning needs that distribution: pip install 'pytorch-lightning>=2.5' (for the "
        "distribution lightning, use azure_torch_ckpt.lightning)"
    ) from error

from lightning_fabric import plugins as fabric_plugins
from lightning_fabric.strategies import ddp, fsdp, model_parallel, parallel
from pytorch_lightning.plugins.io import wrapper

__all__ = ["ddp", "fabric_plugins", "fsdp", "model_parallel", "parallel", "pytorch", "wrapper"]
