"""Checkpoints in Blob Storage for ``lightning.pytorch.Trainer`` and ``lightning.fabric.Fabric``.

For the distribution ``pytorch-lightning`` import the same names from `azure_torch_ckpt.pytorch_lightning`.
"""

from __future__ import annotations

from .names import *  # noqa: F403  (the names of both packages stand in one place)
from .names import __all__ as __all__
