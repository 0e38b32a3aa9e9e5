"""Plans of ranks that hold parts of a matrix, for the tests of what becomes of them in the HuggingFace layout."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from azure_torch_ckpt.huggingface.layout import Arrangement, arrange

Cut = tuple[int, int]


def plan(rows: Cut, columns: Cut, of: Cut) -> SavePlan:
    """The plan of a rank that holds a part of a matrix of float32."""
    chunk = ChunkStorageMetadata(
        torch.Size([rows[0], columns[0]]), torch.Size([rows[1] - rows[0], columns[1] - columns[0]])
    )
    data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size(of))
    return SavePlan([WriteItem(MetadataIndex("w", chunk.offsets), WriteItemType.SHARD, tensor_data=data)])


def columns(*, of: int, rows: int, ranks: int) -> list[SavePlan]:
    cuts = [(of * rank // ranks, of * (rank + 1) // ranks) for rank in range(ranks)]
    return [plan((0, rows), cut, (rows, of)) for cut in cuts]


def arranged(plans: list[SavePlan], joined_block_size: int = 1 << 20) -> Arrangement:
    return arrange(
        plans,
        "0" * 16,
        mapping=None,
        max_file_size=1 << 40,
        block_size=1 << 20,
        joined_block_size=joined_block_size,
    )
