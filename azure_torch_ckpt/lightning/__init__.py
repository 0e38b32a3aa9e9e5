"""How do ``lightning.pytorch.Trainer`` and ``lightning.fabric.Fabric`` save to a URL?

By a plugin (`checkpoint_io`), a callback (`model_checkpoint`), and strategies whose ranks save and load together
(`strategies` for the Trainer, `fabric` for Fabric). `names` lists the public names; `cli.AzureBlobLightningCLI`,
`strategy_check.check_strategy` and the strategies of `fabric` are public as well. For the distribution
``pytorch-lightning``, import the same names from `azure_torch_ckpt.pytorch_lightning`.
"""

from __future__ import annotations

from .names import *  # noqa: F403  (`names` lists the public names of both packages)
from .names import __all__ as __all__
