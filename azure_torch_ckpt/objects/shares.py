"""Which rank writes what, of a state that ranks hold in part together: every byte once, and each about as many."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from azure_torch_ckpt.errors import CheckpointError

__all__ = ["SharingPlanner", "share_out"]


class SharingPlanner(DefaultSavePlanner):
    """A planner for flat state dicts of which rank 0 has all plain tensors, and other ranks some of them as well.

    Args:
        replicated: names of the plain tensors that have the same values wherever they are offered. Rank 0's opinion
            counts; what it holds besides, it writes itself.
    """

    def __init__(self, replicated: Collection[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._replicated = replicated

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On rank 0.

        Raises:
            CheckpointError: a tensor of rank 0 would be in no rank's plan.
        """
        plans, metadata = super().create_global_plan(share_out(all_plans, self._replicated))
        missing = sorted(set(self.state_dict) - set(metadata.state_dict_metadata))
        if missing:
            raise CheckpointError(f"No rank would save {missing[0]!r} and {len(missing) - 1} others; nothing was saved")
        return plans, metadata


def share_out(plans: list[SavePlan], replicated: Collection[str]) -> list[SavePlan]:
    """Leave each item in one rank's plan: the largest first, each to the rank with the fewest bytes that offers it.

    Which of the offers are the same item rank 0 decides: one of another shape or dtype is ignored, and so is a plain
    tensor that rank 0 does not have.
    """
    offers: dict[MetadataIndex, list[int]] = {}
    first: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            index = item.index
            if index not in first and (rank == 0 or item.type == WriteItemType.SHARD):
                first[index], offers[index] = item, [rank]
            elif (
                index in first
                and first[index].tensor_data == item.tensor_data
                and (item.type == WriteItemType.SHARD or index.fqn in replicated)
            ):
                offers[index].append(rank)
    loads = [0] * len(plans)
    keepers: dict[MetadataIndex, int] = {}
    # What only one rank has comes first: the others are to make up for it.
    for index in sorted(offers, key=lambda index: (len(offers[index]) > 1, -_nbytes(first[index]))):
        keepers[index] = min(offers[index], key=loads.__getitem__)
        loads[keepers[index]] += _nbytes(first[index])
    return [
        dataclasses.replace(plan, items=[item for item in plan.items if keepers.get(item.index) == rank])
        for rank, plan in enumerate(plans)
    ]


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
