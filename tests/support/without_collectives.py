"""Checkpoints as ``dcp.save(use_collectives=False)`` saves them: with metadata of each rank."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AzureBlobWriter
from tests.support.mixed_checkpoint import KEY


def save_without_collectives(url: str, *ranks: int) -> None:
    """Save as some ranks would, one after the other: 50 numbers under ``rank0`` and so on."""
    for rank in ranks:
        writer, planner = AzureBlobWriter(url, credential=KEY), dcp.DefaultSavePlanner()
        writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
        planner.set_up_planner({f"rank{rank}": torch.arange(50)}, writer.storage_meta(), True)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        [plan], metadata = planner.create_global_plan([plan])
        [plan] = writer.prepare_global_plan([plan])
        results = writer.write_data(planner.finish_plan(plan), planner)
        writer.finish(metadata, [results.wait()])
