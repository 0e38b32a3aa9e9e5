"""Checkpoints of any Python object, saved and loaded by one process; what the Lightning plugins stand on."""

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
