"""`AzureSavePlanner`: torch's planner for saves of many ranks, with plans in columns."""

from __future__ import annotations

import dataclasses
import math
import threading
from array import array
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.dcp.metadata.columns import Chunks, Entry, Layout, column, count_items, to_bytes
from azure_torch_ckpt.dcp.metadata.views import ColumnMetadata
from azure_torch_ckpt.dcp.plan_columns import ChosenItems, LocalItems, PlannedItems, planned_items
from azure_torch_ckpt.dcp.plan_paths import PackedPaths
from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk, are_disjoint
from azure_torch_ckpt.errors import CheckpointError

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
            self.plan = SavePlan(LocalItems.of(items))
            if not self.flatten_state_dict:
                return self.plan
            return dataclasses.replace(self.plan, planner_data=PackedPaths.of(self.mappings))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        with CollectorPause():
            columns = [planned_items(plan.items) for plan in all_plans]
            decision = None if None in columns else _decide(cast("list[PlannedItems]", columns), self)
            if decision is None:
                plain = [
                    dataclasses.replace(plan, items=list(plan.items), planner_data=_paths(plan.planner_data))
                    for plan in all_plans
                ]
                return super().create_global_plan(plain)
            plans = [
                dataclasses.replace(plan, items=cast("list[WriteItem]", items.with_hints(hints)), planner_data=None)
                for plan, items, hints in zip(
                    all_plans, cast("list[PlannedItems]", columns), decision.hints, strict=True
                )
            ]
            self.global_plan = plans
            self.metadata = _metadata(decision.entries)
            if self.flatten_state_dict:
                self.metadata.planner_data = dict(ChainMap(*_distinct_paths(all_plans)))
            return plans, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        chosen: Any = new_plan.items
        if isinstance(chosen, ChosenItems):
            chosen = chosen.choose(self.plan.items)
        elif isinstance(chosen, PlannedItems):  # without a process group, nothing was sent
            chosen = list(chosen)
        self.plan = dataclasses.replace(new_plan, items=chosen)
        return self.plan


def _paths(planner_data: Any) -> Any:
    # A subclass may have put something else there.
    return planner_data.unpacked() if isinstance(planner_data, PackedPaths) else planner_data


def _distinct_paths(plans: list[SavePlan]) -> list[Any]:
    seen: set[PackedPaths] = set()
    found = []
    for data in (plan.planner_data for plan in plans):
        if isinstance(data, PackedPaths):
            if data in seen:
                continue
            seen.add(data)
        found.append(_paths(data))
    return found


@dataclass(frozen=True, slots=True)
class _Decision:
    """The global plan: what the metadata says, and `ChosenItems` of each rank."""

    key: tuple[Any, ...]
    entries: list[Entry]
    hints: list[bytes]


_lock = threading.Lock()
_latest: list[_Decision] = []  # one for a model and one for its optimizer, if they are saved apart
_KEPT = 2


def _decide(plans: list[PlannedItems], planner: AzureSavePlanner) -> _Decision | None:
    """Make the global plan, or take that of equal plans before. None: torch's planner must do it."""
    key = planner.dedup_save_to_lowest_rank, tuple(plan.key for plan in plans)
    with _lock:
        for at, known in enumerate(_latest):
            if known.key == key:
                _latest.insert(0, _latest.pop(at))
                return known
    joined = _join(plans)
    if joined is None:
        return None
    decision = _Decision(key, *_assign(joined, len(plans), planner.dedup_save_to_lowest_rank))
    with _lock:
        _latest.insert(0, decision)
        del _latest[_KEPT:]
    return decision


@dataclass(slots=True)
class _Joined:
    """All items of all ranks as columns; `offsets` and `sizes` have a column for each dimension of the largest tensor.

    Attributes:
        entries: of the metadata, without layouts.
        ranks: which rank has the item, int64.
        owners: the position of its entry, int64.
    """

    entries: list[Entry]
    ranks: torch.Tensor
    owners: torch.Tensor
    offsets: torch.Tensor
    sizes: torch.Tensor


def _join(plans: list[PlannedItems]) -> _Joined | None:
    """Put the items of all ranks together; None if ranks have different tensors of one name."""
    entries: list[Entry] = []
    positions: dict[str, int] = {}
    of_structure: dict[tuple[bytes, bytes], torch.Tensor] = {}
    for plan in plans:
        structure_key = plan.key[0]
        if structure_key in of_structure:
            continue
        structure = plan.structure
        numbers = []
        for name, properties, size in zip(structure.names, structure.properties, structure.sizes, strict=True):
            position = positions.setdefault(name, len(entries))
            if position == len(entries):
                entries.append(Entry(name, properties, size))
            known = entries[position]
            dtypes = [None if one is None else one.dtype for one in (known.properties, properties)]
            if known.size != size or dtypes[0] != dtypes[1]:
                return None
            numbers.append(position)
        of_structure[structure_key] = column(numbers)
    most = max((len(entry.size) for entry in entries if entry.size is not None), default=0)
    parts = [
        _of_structure([(rank, plan) for rank, plan in enumerate(plans) if plan.key[0] == structure], owners, most)
        for structure, owners in of_structure.items()
    ]
    ranks, owners, offsets, sizes = map(torch.cat, zip(*parts, strict=True))
    if bool((ranks[1:] < ranks[:-1]).any()):
        by_rank = torch.argsort(ranks, stable=True)
        ranks, owners, offsets, sizes = (part[by_rank] for part in (ranks, owners, offsets, sizes))
    return _Joined(entries, ranks, owners, offsets, sizes)


def _of_structure(
    plans: list[tuple[int, PlannedItems]], owners: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The columns of `_Joined` for plans of one structure, as they follow each other."""
    structure = plans[0][1].structure
    cuts = torch.stack([plan.cuts() for _, plan in plans])
    slots = torch.nonzero((torch.arange(most, device="cpu") < structure.dims[:, None]).flatten()).flatten()
    made = []
    for at, missing in ((structure.offsets_at, 0), (structure.sizes_at, 1)):
        part = torch.full((len(plans), len(owners) * most), missing, dtype=torch.int64, device="cpu")
        part[:, slots] = cuts[:, at]
        made.append(part.reshape(len(plans) * len(owners), most))
    ranks = torch.repeat_interleave(column(rank for rank, _ in plans), len(owners))
    return ranks, owners.repeat(len(plans)), made[0], made[1]


def _assign(joined: _Joined, ranks: int, to_lowest: bool) -> tuple[list[Entry], list[bytes]]:
    """Find the distinct chunks of each tensor, check them, and choose a rank for each.

    Returns:
        The entries, and `ChosenItems` of each rank.
    """
    order = _sorted(joined)
    owners, offsets, sizes = joined.owners[order], joined.offsets[order], joined.sizes[order]
    same = (owners[1:] == owners[:-1]) & (offsets[1:] == offsets[:-1]).all(dim=1)
    odd = torch.nonzero(same & (sizes[1:] != sizes[:-1]).any(dim=1)).flatten()
    if len(odd):
        name = joined.entries[int(owners[odd[0]])].name
        raise CheckpointError(
            f"Two ranks have shards of {name!r} that begin at the same place and differ in size. Nothing was saved; "
            "check how the tensor is sharded"
        )
    first = torch.cat((torch.ones(min(len(order), 1), dtype=torch.bool, device="cpu"), ~same))
    chunk = torch.cumsum(first, dim=0) - 1  # of each item in `order`, the number of its chunk
    starts = torch.nonzero(first).flatten()
    chunk_owners = owners[starts]
    counts = torch.bincount(chunk_owners, minlength=len(joined.entries))
    ends = torch.cumsum(counts, dim=0)
    entries = _entries(joined.entries, offsets[starts], sizes[starts], ends.tolist(), ranks > 1)
    itemsizes = column(0 if entry.properties is None else entry.properties.dtype.itemsize for entry in joined.entries)
    nbytes = sizes[starts].prod(dim=1) * itemsizes[chunk_owners]
    writer = _writers(joined.ranks[order], chunk, starts, nbytes, ranks, to_lowest)
    hints = torch.full((len(order),), -1, dtype=torch.int64, device="cpu")
    hints[order] = torch.where(
        joined.ranks[order] == writer[chunk], chunk - (ends - counts)[owners], torch.tensor(-1, device="cpu")
    )
    of_rank = torch.split(hints, torch.bincount(joined.ranks, minlength=ranks).tolist())
    return entries, [ChosenItems.of(part) for part in of_rank]


def _sorted(joined: _Joined) -> torch.Tensor:
    """The items in the order of their entries, of one entry by their offsets, of one chunk by their ranks."""
    order = torch.argsort(joined.owners, stable=True)
    owners, offsets = joined.owners[order], joined.offsets[order]
    if not len(order) or _is_ascending(owners, offsets):
        return order  # ranks come in the order of their shards, as they mostly do
    order = torch.arange(len(order), device="cpu")
    for dim in reversed(range(joined.offsets.shape[1])):
        order = order[torch.argsort(joined.offsets[order, dim], stable=True)]
    return order[torch.argsort(joined.owners[order], stable=True)]


def _is_ascending(owners: torch.Tensor, offsets: torch.Tensor) -> bool:
    """Whether, of two items of one entry, the second one has not the lower offsets."""
    above = owners[1:] > owners[:-1]
    for dim in range(offsets.shape[1]):
        equal = ~above
        if bool((equal & (offsets[1:, dim] < offsets[:-1, dim])).any()):
            return False
        above = above | (offsets[1:, dim] > offsets[:-1, dim])
    return True


def _entries(
    entries: Sequence[Entry], offsets: torch.Tensor, sizes: torch.Tensor, ends: list[int], must_fill: bool
) -> list[Entry]:
    layouts: dict[Any, Layout] = {}
    sound: set[tuple[int, torch.Size]] = set()
    made = []
    start = 0
    for entry, end in zip(entries, ends, strict=True):
        if entry.size is not None:
            dims = len(entry.size)
            cut = Layout(offsets[start:end, :dims].contiguous(), sizes[start:end, :dims].contiguous())
            layout = layouts.setdefault(cut.key, cut)
            if (id(layout), entry.size) not in sound:
                _check(entry, layout, must_fill)
                sound.add((id(layout), entry.size))
            made.append(dataclasses.replace(entry, layout=layout))
        else:
            made.append(entry)
        start = end
    count_items(made)
    return made


def _check(entry: Entry, layout: Layout, must_fill: bool) -> None:
    """Raise `CheckpointError` unless the chunks make up a tensor, or of one rank at least lie inside of it."""
    assert entry.size is not None
    if not layout.is_inside(entry.size):
        raise CheckpointError(
            f"A rank has a chunk of {entry.name!r} that lies outside of the tensor, whose size is {tuple(entry.size)}. "
            "Nothing was saved; check how the tensor is sharded"
        )
    if layout.is_whole(entry.size):
        return
    chunks = [TensorChunk(tuple(start), tuple(size)) for start, size in zip(*layout.rows, strict=True)]
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    volume = sum(math.prod(chunk.sizes) for chunk in filled)
    if (must_fill and volume != math.prod(entry.size)) or not are_disjoint(filled):
        raise CheckpointError(
            f"The shards of {entry.name!r} have {volume} elements where the tensor has {math.prod(entry.size)}, or "
            "have some twice. Nothing was saved; let all ranks that have a shard of it take part"
        )


def _writers(
    ranks: torch.Tensor, chunk: torch.Tensor, starts: torch.Tensor, nbytes: torch.Tensor, count: int, to_lowest: bool
) -> torch.Tensor:
    """Choose a rank for each chunk: of those that have it, the one with the fewest bytes; large chunks come first."""
    writer = ranks[starts]  # the lowest
    copies = torch.bincount(chunk, minlength=len(starts))
    if to_lowest or not bool((copies > 1).any()):
        return writer
    alone = copies == 1
    load = torch.bincount(writer[alone], weights=nbytes[alone].to(torch.float64), minlength=count).tolist()
    shared = torch.nonzero(~alone).flatten()
    shared = shared[torch.argsort(nbytes[shared], descending=True, stable=True)]
    having = array("q", to_bytes(ranks))
    chosen = array("q")
    for start, copied, size in zip(*(part[shared].tolist() for part in (starts, copies, nbytes)), strict=True):
        best = min(having[start : start + copied], key=load.__getitem__)
        chosen.append(best)
        load[best] += max(size, 1)
    writer[shared] = column(chosen)
    return writer


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
