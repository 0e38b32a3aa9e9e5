"""Checkpoints in Blob Storage for ``pytorch_lightning.Trainer`` and ``lightning_fabric.Fabric``.

The names of `azure_torch_ckpt.lightning`, with base classes of the other namespace; its module `stock` tells how.
"""

# ruff: noqa: F403  (the names of both packages stand in one place)

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# The modules of `azure_torch_ckpt.lightning` once more, as modules of this package; only `stock` is this one's own.
__path__ = [*__path__, str(Path(__file__).parents[1] / "lightning")]

if TYPE_CHECKING:  # a type checker knows a file by one name, so to it the classes of both packages are the same
    from azure_torch_ckpt.lightning.names import *
    from azure_torch_ckpt.lightning.names import __all__ as __all__
else:
    from .names import *
    from .names import __all__ as __all__
