"""Which rank writes what, of a state that ranks hold in part together: every byte once, and each about as many."""

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

__all__ = ["SharingPlanner", "share_out"]

# A thread computes 5 to 15 GB/s, and the ranks of a machine all do this at once.
_THREADS = 4
# What takes less time than handing it to a thread does.
_SMALL = 256 * 1024
_PIECE = 32 * 1024 * 1024


class SharingPlanner(DefaultSavePlanner):
    """A planner for flat state dicts of which rank 0 has all plain tensors, and other ranks some of them as well.

    Rank 0 decides what is saved. Another rank saves a tensor in its place if it has the same bytes, which the CRC64 of
    the tensor on both ranks proves: no bookkeeping of DDP or of an optimizer tells whether a tensor is equal on all
    ranks. It may be ignored by DDP, averaged now and then (local SGD), or changed by a hook.

    Of a DTensor that several ranks hold the same chunk of, the lowest of them decides.

    Args:
        ranks: how many ranks take part. A single one needs no checksums.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._ranks = ranks

    def create_local_plan(self) -> SavePlan:
        """The plan of this rank; its `planner_data` has the checksum of each item that another rank may have, too."""
        plan = super().create_local_plan()
        return dataclasses.replace(plan, planner_data=self._checksums(plan.items) if self._ranks > 1 else None)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On rank 0.

        Raises:
            CheckpointError: a tensor of rank 0 would be in no rank's plan.
        """
        plans, metadata = super().create_global_plan(share_out(all_plans))
        missing = sorted(set(self.state_dict) - set(metadata.state_dict_metadata))
        if missing:
            raise CheckpointError(f"No rank would save {missing[0]!r} and {len(missing) - 1} others; nothing was saved")
        return plans, metadata

    def _checksums(self, items: list[WriteItem]) -> list[int | None]:
        """The CRC64 of each item; None for one that no other rank has, or that has no bytes to compare."""
        found: list[int | None] = [None] * len(items)

        def look(position: int, tensor: torch.Tensor) -> None:
            crc = 0
            for piece in tensor_views(tensor, _PIECE):
                crc = crc64(piece, crc)
            found[position] = crc

        with Workers(_THREADS, "shares") as workers:
            for position, item in enumerate(items):
                if not _may_be_elsewhere(self.state_dict[item.index.fqn]):
                    continue
                tensor = self.resolve_data(item)
                if not isinstance(tensor, torch.Tensor) or not is_plain(tensor):
                    continue
                if tensor.nbytes <= _SMALL and tensor.device.type == "cpu":
                    look(position, tensor)
                else:
                    workers.submit(lambda position=position, tensor=tensor: look(position, tensor))  # type: ignore[misc]
            workers.finish()
        return found


def share_out(plans: list[SavePlan]) -> list[SavePlan]:
    """Leave each item in one rank's plan: the largest first, each to the rank with the fewest bytes that offers it.

    What a plain tensor is rank 0 says, and what a chunk of a DTensor is the first rank that has it. Another rank's
    offer counts if it has the same shape, dtype and checksum.
    """
    offers: dict[MetadataIndex, list[int]] = {}
    first: dict[MetadataIndex, tuple[WriteItem, int | None]] = {}
    for rank, plan in enumerate(plans):
        checksums = plan.planner_data or [None] * len(plan.items)
        for item, crc in zip(plan.items, checksums, strict=True):
            index = item.index
            if index not in first:
                if rank == 0 or item.type == WriteItemType.SHARD:
                    first[index], offers[index] = (item, crc), [rank]
                continue
            wanted, wanted_crc = first[index]
            if crc is not None and crc == wanted_crc and wanted.tensor_data == item.tensor_data:
                offers[index].append(rank)
    loads = [0] * len(plans)
    keepers: dict[MetadataIndex, int] = {}
    # What only one rank has comes first: the others are to make up for it.
    for index in sorted(offers, key=lambda index: (len(offers[index]) > 1, -_nbytes(first[index][0]))):
        keepers[index] = min(offers[index], key=loads.__getitem__)
        loads[keepers[index]] += _nbytes(first[index][0])
    return [
        dataclasses.replace(
            plan, items=[item for item in plan.items if keepers.get(item.index) == rank], planner_data=None
        )
        for rank, plan in enumerate(plans)
    ]


def _may_be_elsewhere(thing: object) -> bool:
    """Whether other ranks may hold what this rank holds of a tensor: one that is not sharded, or not over all ranks."""
    if not isinstance(thing, DTensor):
        return True
    mesh = thing.device_mesh
    return any(placement.is_replicate() and mesh.size(dim) > 1 for dim, placement in enumerate(thing.placements))


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
