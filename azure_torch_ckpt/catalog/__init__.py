"""Which checkpoints are there, are they sound, and which can go?

The functions find, inspect, compare, verify, copy, consolidate and remove checkpoints. `__all__` is for others.
"""

from __future__ import annotations

from azure_torch_ckpt.catalog.consolidation import ConsolidateReport, consolidate
from azure_torch_ckpt.catalog.contents import CheckpointContents, ObjectEntry, ShardEntry, TensorEntry, inspect
from azure_torch_ckpt.catalog.copying.copy import CopyReport, copy
from azure_torch_ckpt.catalog.difference import Change, CheckpointDiff, diff
from azure_torch_ckpt.catalog.listing import CheckpointEntry, latest, list_checkpoints
from azure_torch_ckpt.catalog.retention import PruneReport, Undeleted, prune
from azure_torch_ckpt.catalog.verification import verify
from azure_torch_ckpt.dcp.removal import Remains, remove_checkpoint
from azure_torch_ckpt.dcp.verification import BlobReport, VerifyReport

__all__ = [
    "BlobReport",
    "Change",
    "CheckpointContents",
    "CheckpointDiff",
    "CheckpointEntry",
    "ConsolidateReport",
    "CopyReport",
    "ObjectEntry",
    "PruneReport",
    "Remains",
    "ShardEntry",
    "TensorEntry",
    "Undeleted",
    "VerifyReport",
    "consolidate",
    "copy",
    "diff",
    "inspect",
    "latest",
    "list_checkpoints",
    "prune",
    "remove_checkpoint",
    "verify",
]
