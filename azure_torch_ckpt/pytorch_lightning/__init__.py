"""How do ``pytorch_lightning.Trainer`` and ``lightning_fabric.Fabric`` save to a URL?

This package has the public names of `azure_torch_ckpt.lightning`, with base classes of the other distribution. It runs
the files of that folder once more as modules of its own; only `namespace` is a file of its own. `lightning/stock.py`
says why.
"""

# ruff: noqa: F403  (`names` lists the public names of both packages)

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# `namespace` is found in this folder, and every other module in the second one.
__path__ = [*__path__, str(Path(__file__).parents[1] / "lightning")]

if TYPE_CHECKING:  # a type checker knows a file by one name, so to it the classes of both packages are the same
    from azure_torch_ckpt.lightning.names import *
    from azure_torch_ckpt.lightning.names import __all__ as __all__
else:
    from .names import *
    from .names import __all__ as __all__
