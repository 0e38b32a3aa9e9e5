"""How does any Python object become tensors and come back, on one process or on all ranks?

`codec` turns an object into a flat state dict and back; `single_process` and `sharded` save and load it. The Lightning
plugins are built on these, on `states` (of modules and optimizers), `background_saves` and `resuming`. The names below
are public. Nothing here knows Lightning, because each module of `lightning/` exists twice, once for each of Lightning's
distributions, and a pickle in a checkpoint must not depend on the distribution.
"""

from __future__ import annotations

from azure_torch_ckpt.objects.codec import SKELETON, Packed, Unpacked, pack, unpack
from azure_torch_ckpt.objects.single_process import load_object, read_items, read_skeleton, save_object

__all__ = [
    "SKELETON",
    "Packed",
    "Unpacked",
    "load_object",
    "pack",
    "read_items",
    "read_skeleton",
    "save_object",
    "unpack",
]
