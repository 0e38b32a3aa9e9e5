"""Plans of ranks that hold parts of a tensor of float32, and their layout, for the tests of layout and joining."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from azure_torch_ckpt.huggingface.model_layout import ModelLayout, lay_out

Cut = tuple[int, int]


def plan(cuts: list[Cut], of: list[int], name: str = "w") -> SavePlan:
    """The plan of a rank that holds these indices of each dimension."""
    chunk = ChunkStorageMetadata(
        torch.Size([start for start, _ in cuts]), torch.Size([end - start for start, end in cuts])
    )
    data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size(of))
    return SavePlan([WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)])


def columns(*, of: int, rows: int, ranks: int) -> list[SavePlan]:
    cuts = [(of * rank // ranks, of * (rank + 1) // ranks) for rank in range(ranks)]
    return [plan([(0, rows), cut], [rows, of]) for cut in cuts]


def laid_out(plans: list[SavePlan], **how: Any) -> ModelLayout:
    sizes = {"max_file_size": 1 << 40, "block_size": 1 << 20, "joined_block_size": 1 << 20}
    layout: ModelLayout = lay_out(plans, "0" * 16, **{"mapping": None, **sizes, **how})
    return layout
