"""`azure_torch_ckpt.lightning.stock` for the namespace ``pytorch_lightning``: the same names, line by line."""

from __future__ import annotations

import inspect

try:
    import pytorch_lightning as pytorch
except ImportError as error:
    raise ImportError(
        "azure_torch_ckpt.pytorch_lightning needs that distribution: pip install 'pytorch-lightning>=2.5' (for the "
        "distribution lightning there is azure_torch_ckpt.lightning)"
    ) from error

from lightning_fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning_fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning_fabric.strategies.fsdp import FSDPStrategy as FabricFSDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy as FabricModelParallelStrategy
from lightning_fabric.strategies.parallel import ParallelStrategy as FabricParallelStrategy
from pytorch_lightning.plugins.io import AsyncCheckpointIO

# What AsyncCheckpointIO inherits from, and Lightning's own test for plugins that only wrap another one.
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO

__all__ = [
    "LOAD_TAKES_WEIGHTS_ONLY",
    "AsyncCheckpointIO",
    "CheckpointIO",
    "FabricDDPStrategy",
    "FabricFSDPStrategy",
    "FabricModelParallelStrategy",
    "FabricParallelStrategy",
    "TorchCheckpointIO",
    "WrappingCheckpointIO",
    "pytorch",
]

LOAD_TAKES_WEIGHTS_ONLY = "weights_only" in inspect.signature(TorchCheckpointIO.load_checkpoint).parameters
"""From Lightning 2.6 on ``load_checkpoint`` has this argument, and torch's default; before, it unpickles all."""
