"""`DedupSavePlanner`: a tensor that several ranks hold is written once, and every rank writes about as many bytes."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.workers import Workers
from azure_torch_ckpt.dcp.tensors.memory import is_plain
from azure_torch_ckpt.dcp.tensors.views import tensor_views
from azure_torch_ckpt.errors import CheckpointError

__all__ = ["DedupSavePlanner", "dedup_save_plans"]

# A thread computes 5 to 15 GB/s, and the ranks of a machine all do this at once.
_THREADS = 4
# Tensors up to this size take less time than a thread needs to start on them.
_SMALL = 256 * 1024
_VIEW_SIZE = 32 * 1024 * 1024


class DedupSavePlanner(DefaultSavePlanner):
    """A planner for flat state dicts: rank 0 has all plain tensors, and the other ranks have some of them as well.

    The checkpoint has rank 0's tensors. Another rank writes a tensor in rank 0's place if it has the same bytes, which
    equal CRC64s prove: neither DDP nor an optimizer knows whether a tensor is equal on all ranks. DDP may ignore it, it
    may be averaged now and then (local SGD), or a hook may have changed it.

    If several ranks hold a chunk of a DTensor, the checkpoint has that of the lowest of them.

    Args:
        ranks: how many ranks take part. A single rank computes no checksums.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._ranks = ranks

    def create_local_plan(self) -> SavePlan:
        """The plan of this rank; its `planner_data` has the CRC64 of each item that another rank may hold as well."""
        plan = super().create_local_plan()
        return dataclasses.replace(plan, planner_data=self._checksums(plan.items) if self._ranks > 1 else None)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans of all ranks without duplicates, and the metadata. Rank 0 calls it.

        Raises:
            CheckpointError: a tensor of rank 0 would be in no rank's plan.
        """
        plans, metadata = super().create_global_plan(dedup_save_plans(all_plans))
        missing = sorted(set(self.state_dict) - set(metadata.state_dict_metadata))
        if missing:
            raise CheckpointError(f"No rank would save {missing[0]!r} and {len(missing) - 1} others; nothing was saved")
        return plans, metadata

    def _checksums(self, items: list[WriteItem]) -> list[int | None]:
        """The CRC64 of each item; None if no other rank can hold it, or if it has no bytes to compare."""
        checksums: list[int | None] = [None] * len(items)

        def compute(position: int, tensor: torch.Tensor) -> None:
            crc = 0
            for view in tensor_views(tensor, _VIEW_SIZE):
                crc = crc64(view, crc)
            checksums[position] = crc

        with Workers(_THREADS, "checksums") as workers:
            for position, item in enumerate(items):
                if not _may_be_replicated(self.state_dict[item.index.fqn]):
                    continue
                tensor = self.resolve_data(item)
                if not isinstance(tensor, torch.Tensor) or not is_plain(tensor):
                    continue
                if tensor.nbytes <= _SMALL and tensor.device.type == "cpu":
                    compute(position, tensor)
                else:
                    workers.submit(lambda position=position, tensor=tensor: compute(position, tensor))  # type: ignore[misc]
            workers.finish()
        return checksums


def dedup_save_plans(plans: list[SavePlan]) -> list[SavePlan]:
    """Leave each item in one rank's plan: the largest first, each with the rank that has the fewest bytes so far.

    The item of a plain tensor is rank 0's, and that of a chunk of a DTensor is the lowest rank's that has the chunk.
    Other ranks can write it if theirs has the same shape, dtype and checksum.
    """
    holders: dict[MetadataIndex, list[int]] = {}
    first: dict[MetadataIndex, tuple[WriteItem, int | None]] = {}
    for rank, plan in enumerate(plans):
        checksums = plan.planner_data or [None] * len(plan.items)
        for item, crc in zip(plan.items, checksums, strict=True):
            index = item.index
            if index not in first:
                if rank == 0 or item.type == WriteItemType.SHARD:
                    first[index], holders[index] = (item, crc), [rank]
                continue
            kept, kept_crc = first[index]
            if crc is not None and crc == kept_crc and kept.tensor_data == item.tensor_data:
                holders[index].append(rank)
    loads = [0] * len(plans)
    writers: dict[MetadataIndex, int] = {}
    # Items of a single rank come first, so that the other ranks balance them.
    for index in sorted(holders, key=lambda index: (len(holders[index]) > 1, -_nbytes(first[index][0]))):
        writers[index] = min(holders[index], key=loads.__getitem__)
        loads[writers[index]] += _nbytes(first[index][0])
    return [
        dataclasses.replace(
            plan, items=[item for item in plan.items if writers.get(item.index) == rank], planner_data=None
        )
        for rank, plan in enumerate(plans)
    ]


def _may_be_replicated(thing: object) -> bool:
    """Whether other ranks may hold this rank's part of a tensor: it is not sharded, or not over all ranks."""
    if not isinstance(thing, DTensor):
        return True
    mesh = thing.device_mesh
    return any(placement.is_replicate() and mesh.size(dim) > 1 for dim, placement in enumerate(thing.placements))


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
