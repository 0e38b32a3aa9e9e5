"""`AzureSavePlanner`: torch's planner for saves of many ranks, with plans in columns."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from typing import Any, cast

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.dcp.global_plan import decide
from azure_torch_ckpt.dcp.metadata.columns import Chunks, Entry
from azure_torch_ckpt.dcp.metadata.views import ColumnMetadata
from azure_torch_ckpt.dcp.plan_columns import ChosenItems, LocalItems, PlannedItems, planned_items
from azure_torch_ckpt.dcp.plan_paths import LocalPaths, PackedPaths

__all__ = ["AzureSavePlanner"]


class AzureSavePlanner(DefaultSavePlanner):
    """Plan a save as ``DefaultSavePlanner`` does, at a cost that many ranks can bear.

    Ranks send their plans to the coordinator as columns of numbers, and get back which of their items they write. The
    coordinator checks that the chunks of every tensor make it up, each element once, and keeps the result: if no rank's
    plan has changed at the next save, nothing is planned anew. A tensor that several ranks have is written by one of
    them, such that all write about as many bytes.

    It works with every storage writer. All ranks of a save must use it. For plans of subclasses that columns cannot
    hold, it does what torch's planner does.

    Args:
        flatten_state_dict, flatten_sharded_tensors, dedup_save_to_lowest_rank: as for ``DefaultSavePlanner``.

    Raises (while saving):
        CheckpointError: the chunks of a tensor do not make it up, or overlap. Nothing was written.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_save_to_lowest_rank: bool = False,
    ) -> None:
        super().__init__(
            flatten_state_dict, flatten_sharded_tensors, dedup_save_to_lowest_rank=dedup_save_to_lowest_rank
        )

    def create_local_plan(self) -> SavePlan:
        with CollectorPause():
            items = create_default_local_save_plan(self.state_dict, self.is_coordinator).items
            self.plan = SavePlan(LocalItems(items, self._contents(items)))
            if not self.flatten_state_dict:
                return self.plan
            return dataclasses.replace(self.plan, planner_data=LocalPaths(self.mappings))

    def _contents(self, items: list[WriteItem]) -> list[int | None] | None:
        """For a planner of copies that may differ: of each item the CRC64 of its bytes; None: no other copy will do.

        The checkpoint then has of each chunk the copy of the lowest rank that has it, and plain tensors and objects of
        the coordinator alone.
        """
        return None

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        with CollectorPause():
            # One rank alone has no one to agree with, and its plan was not sent.
            columns = [planned_items(plan.items) if len(all_plans) > 1 else None for plan in all_plans]
            decided = None
            if None not in columns:
                decided = decide(cast("list[PlannedItems]", columns), self.dedup_save_to_lowest_rank)
            if decided is None:
                plain = [
                    dataclasses.replace(plan, items=list(plan.items), planner_data=_paths(plan.planner_data))
                    for plan in all_plans
                ]
                return super().create_global_plan(plain)
            plans = [
                dataclasses.replace(plan, items=cast("list[WriteItem]", items.with_hints(hints)), planner_data=None)
                for plan, items, hints in zip(
                    all_plans, cast("list[PlannedItems]", columns), decided.hints, strict=True
                )
            ]
            self.global_plan = plans
            self.metadata = _metadata(decided.entries)
            if self.flatten_state_dict:
                # Equal on most ranks.
                distinct = {
                    plan.planner_data if isinstance(plan.planner_data, PackedPaths) else id(plan): plan.planner_data
                    for plan in all_plans
                }
                self.metadata.planner_data = dict(ChainMap(*map(_paths, distinct.values())))
            return plans, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        chosen: Any = new_plan.items
        if isinstance(chosen, ChosenItems):
            chosen = chosen.choose(self.plan.items)
        elif isinstance(chosen, PlannedItems):  # it was not sent
            chosen = list(chosen)
        self.plan = dataclasses.replace(new_plan, items=chosen)
        return self.plan


def _paths(planner_data: Any) -> Any:
    # A subclass may have put something else there.
    return planner_data.unpacked() if isinstance(planner_data, PackedPaths) else planner_data


def _metadata(entries: list[Entry]) -> ColumnMetadata:
    return ColumnMetadata(
        {
            entry.name: BytesStorageMetadata()
            if entry.layout is None or entry.properties is None or entry.size is None
            else TensorStorageMetadata(
                entry.properties, entry.size, cast("list[ChunkStorageMetadata]", Chunks(entry.layout))
            )
            for entry in entries
        }
    )
