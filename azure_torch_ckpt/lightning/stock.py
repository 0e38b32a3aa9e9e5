"""Every name of Lightning that this package uses. The same file, for the other namespace, is in `pytorch_lightning`.

Lightning comes as two distributions with the same classes twice: ``lightning`` (``lightning.pytorch``,
``lightning.fabric``) and ``pytorch_lightning`` (with ``lightning_fabric``). A Trainer takes plugins, callbacks and
strategies of its own namespace only. So there are two packages here as well, ``azure_torch_ckpt.lightning`` and
``azure_torch_ckpt.pytorch_lightning``, made of the same files: the second one's path leads to the first one's
directory, except for this module. The rule for the modules of this directory that follows from it:

- import names of Lightning from ``.stock``, and nowhere else from Lightning itself;
- import each other relatively (``from .checkpoint_io import ...``), so that each package gets its own;
- what knows nothing of Lightning, and whatever a pickle in a checkpoint may name, lives elsewhere (``objects/``), for
  here every class exists twice.
"""

from __future__ import annotations

import inspect

try:
    import lightning.pytorch as pytorch
except ImportError as error:
    raise ImportError(
        "azure_torch_ckpt.lightning needs Lightning: pip install 'azure-torch-ckpt[lightning]' (for the distribution "
        "pytorch-lightning there is azure_torch_ckpt.pytorch_lightning)"
    ) from error

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies.fsdp import FSDPStrategy as FabricFSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.fabric.strategies.parallel import ParallelStrategy as FabricParallelStrategy
from lightning.pytorch.plugins.io import AsyncCheckpointIO

# What AsyncCheckpointIO inherits from, and Lightning's own test for plugins that only wrap another one.
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO

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
