"""A load planner for one shard of every tensor, without a process group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class ShardPlanner(DefaultLoadPlanner):
    """Takes the state dict's tensors for shards of the saved ones.

    Args:
        offsets: where in the saved tensor a shard starts, by the tensor's name.
    """

    def __init__(self, offsets: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._offsets = offsets

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, offset in self._offsets.items():
            assert self.metadata is not None
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            shard = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=self.state_dict[name].size())
            items += create_read_items_for_chunk_list(name, stored, [shard])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]
