"""The global plan of a save: which chunks each tensor has, whether they make it up, and which rank writes which.

All items of all ranks are columns of numbers, and are sorted, compared and counted as such.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from azure_torch_ckpt.dcp.metadata.columns import Entry, Layout, column, count_items, to_bytes
from azure_torch_ckpt.dcp.plan_columns import ChosenItems, PlannedItems
from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk, are_disjoint
from azure_torch_ckpt.errors import CheckpointError

__all__ = ["GlobalPlan", "decide"]


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """What all ranks save.

    Attributes:
        entries: what the metadata says.
        hints: `ChosenItems` of each rank.
    """

    key: tuple[Any, ...]
    entries: list[Entry]
    hints: list[bytes]


_lock = threading.Lock()
_latest: list[GlobalPlan] = []  # one for a model and one for its optimizer, if they are saved apart
_KEPT = 2


def decide(plans: list[PlannedItems], to_lowest: bool) -> GlobalPlan | None:
    """Make the global plan, or take that of equal plans before.

    Args:
        plans: of several ranks. One alone may save a part of a tensor.
        to_lowest: the lowest of the ranks that have a chunk writes it.

    Returns:
        None if ranks have different tensors of one name.

    Raises:
        CheckpointError: the chunks of a tensor do not make it up, or overlap.
    """
    key = to_lowest, tuple(plan.key for plan in plans)
    with _lock:
        for at, known in enumerate(_latest):
            if known.key == key:
                _latest.insert(0, _latest.pop(at))
                return known
    joined = _join(plans)
    if joined is None:
        return None
    lengths = [len(plan.structure.names) for plan in plans]
    made = GlobalPlan(key, *_assign(joined, lengths, to_lowest))
    with _lock:
        _latest.insert(0, made)
        del _latest[_KEPT:]
    return made


@dataclass(slots=True)
class _Joined:
    """All items of all ranks as columns; `offsets` and `sizes` have a column for each dimension of the largest tensor.

    Attributes:
        entries: of the metadata, without layouts.
        ranks: which rank has the item, int64.
        owners: the position of its entry, int64.
        places: of each item, its place among all items of all ranks, of which there are `total`; some may be left out.
        contents: as `PlannedItems.contents`.
    """

    entries: list[Entry]
    ranks: torch.Tensor
    owners: torch.Tensor
    offsets: torch.Tensor
    sizes: torch.Tensor
    places: torch.Tensor
    contents: tuple[torch.Tensor, torch.Tensor] | None


def _join(plans: list[PlannedItems]) -> _Joined | None:
    """Put the items of all ranks together; None if ranks have different tensors of one name."""
    entries: list[Entry] = []
    positions: dict[str, int] = {}
    of_structure: dict[tuple[bytes, bytes], tuple[torch.Tensor, torch.Tensor]] = {}
    must_agree = plans[0].contents() is None
    for plan in plans:
        structure_key = plan.key[0]
        if structure_key in of_structure:
            continue
        structure = plan.structure
        numbers, equal = [], []
        for name, properties, size in zip(structure.names, structure.properties, structure.sizes, strict=True):
            position = positions.setdefault(name, len(entries))
            if position == len(entries):
                entries.append(Entry(name, properties, size))
            known = entries[position]
            dtypes = [None if one is None else one.dtype for one in (known.properties, properties)]
            equal.append(known.size == size and dtypes[0] == dtypes[1])
            if must_agree and not equal[-1]:
                return None
            numbers.append(position)
        of_structure[structure_key] = column(numbers), column(equal) > 0
    most = max((len(entry.size) for entry in entries if entry.size is not None), default=0)
    parts = [
        _of_structure(
            [(rank, plan) for rank, plan in enumerate(plans) if plan.key[0] == structure], owners, agrees, most
        )
        for structure, (owners, agrees) in of_structure.items()
    ]
    ranks, owners, offsets, sizes, is_shard, agrees = map(torch.cat, zip(*parts, strict=True))
    if bool((ranks[1:] < ranks[:-1]).any()):
        by_rank = torch.argsort(ranks, stable=True)
        ranks, owners, offsets, sizes = (part[by_rank] for part in (ranks, owners, offsets, sizes))
        is_shard, agrees = is_shard[by_rank], agrees[by_rank]
    joined = _Joined(entries, ranks, owners, offsets, sizes, torch.arange(len(ranks), device="cpu"), None)
    return joined if must_agree else _led_by_first(joined, plans, is_shard, agrees)


def _led_by_first(joined: _Joined, plans: list[PlannedItems], is_shard: torch.Tensor, agrees: torch.Tensor) -> _Joined:
    """Leave out plain tensors and objects that rank 0 does not have, or has in another shape; add contents."""
    contents = [found for plan in plans if (found := plan.contents()) is not None]
    known, crcs = (torch.cat(part) for part in zip(*contents, strict=True))
    led = torch.zeros(len(joined.entries), dtype=torch.bool, device="cpu")
    led[joined.owners[joined.ranks == 0]] = True
    kept = torch.nonzero((is_shard | led[joined.owners]) & agrees).flatten()
    return _Joined(
        joined.entries,
        joined.ranks[kept],
        joined.owners[kept],
        joined.offsets[kept],
        joined.sizes[kept],
        kept,
        (known[kept], crcs[kept]),
    )


def _of_structure(
    plans: list[tuple[int, PlannedItems]], owners: torch.Tensor, agrees: torch.Tensor, most: int
) -> tuple[torch.Tensor, ...]:
    """The columns of `_Joined` for plans of one structure, as they follow each other."""
    structure = plans[0][1].structure
    cuts = torch.stack([plan.cuts() for _, plan in plans])
    slots = torch.nonzero((torch.arange(most, device="cpu") < structure.dims[:, None]).flatten()).flatten()
    made = []
    for at, missing in ((structure.offsets_at, 0), (structure.sizes_at, 1)):
        part = torch.full((len(plans), len(owners) * most), missing, dtype=torch.int64, device="cpu")
        part[:, slots] = cuts[:, at]
        made.append(part.reshape(len(plans) * len(owners), most))
    ranks = column(rank for rank, _ in plans)[:, None].expand(-1, len(owners)).flatten()
    of_items = (part.repeat(len(plans)) for part in (owners, structure.is_shard, agrees))
    owners, is_shard, agrees = of_items
    return ranks, owners, made[0], made[1], is_shard, agrees


def _assign(joined: _Joined, lengths: list[int], to_lowest: bool) -> tuple[list[Entry], list[bytes]]:
    """Find the distinct chunks of each tensor, check them, and choose a rank for each.

    Args:
        lengths: how many items each rank's plan has.

    Returns:
        The entries, and `ChosenItems` of each rank.
    """
    ranks = len(lengths)
    order = _sorted(joined)
    owners, offsets, sizes = joined.owners[order], joined.offsets[order], joined.sizes[order]
    same = (owners[1:] == owners[:-1]) & (offsets[1:] == offsets[:-1]).all(dim=1)
    odd = torch.nonzero(same & (sizes[1:] != sizes[:-1]).any(dim=1)).flatten()
    if len(odd) and joined.contents is None:
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
    entries = _entries(joined.entries, offsets[starts], sizes[starts], ends.tolist())
    itemsizes = column(0 if entry.properties is None else entry.properties.dtype.itemsize for entry in joined.entries)
    nbytes = sizes[starts].prod(dim=1) * itemsizes[chunk_owners]
    fits = torch.ones(len(order), dtype=torch.bool, device="cpu")
    if joined.contents is not None:
        known, crcs = (part[order] for part in joined.contents)
        lowest = starts[chunk]
        fits = known & known[lowest] & (crcs == crcs[lowest]) & (sizes == sizes[lowest]).all(dim=1)
        fits[starts] = True
    writer = _writers(joined.ranks[order[fits]], chunk[fits], nbytes, ranks, to_lowest)
    hints = torch.full((sum(lengths),), -1, dtype=torch.int64, device="cpu")
    writes = joined.ranks[order] == writer[chunk]
    hints[joined.places[order[writes]]] = (chunk - (ends - counts)[owners])[writes]
    return entries, [ChosenItems.of(part) for part in torch.split(hints, lengths)]


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


def _entries(entries: Sequence[Entry], offsets: torch.Tensor, sizes: torch.Tensor, ends: list[int]) -> list[Entry]:
    layouts: dict[Any, Layout] = {}
    sound: set[tuple[int, torch.Size]] = set()
    made = []
    start = 0
    for entry, end in zip(entries, ends, strict=True):
        if start == end:
            continue  # it was left out
        if entry.size is not None:
            dims = len(entry.size)
            cut = Layout(offsets[start:end, :dims].contiguous(), sizes[start:end, :dims].contiguous())
            layout = layouts.setdefault(cut.key, cut)
            if (id(layout), entry.size) not in sound:
                _check(entry, layout)
                sound.add((id(layout), entry.size))
            made.append(dataclasses.replace(entry, layout=layout))
        else:
            made.append(entry)
        start = end
    count_items(made)
    return made


def _check(entry: Entry, layout: Layout) -> None:
    """Raise `CheckpointError` unless the chunks make up a tensor."""
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
    if volume != math.prod(entry.size) or not are_disjoint(filled):
        raise CheckpointError(
            f"The shards of {entry.name!r} have {volume} elements where the tensor has {math.prod(entry.size)}, or "
            "have some twice. Nothing was saved; let all ranks that have a shard of it take part"
        )


def _writers(
    ranks: torch.Tensor, chunk: torch.Tensor, nbytes: torch.Tensor, count: int, to_lowest: bool
) -> torch.Tensor:
    """Choose a rank for each chunk: of those that have it, the one with the fewest bytes; large chunks come first.

    Args:
        ranks, chunk: of each copy of a chunk, the rank that has it and the number of the chunk, in ascending order.
        nbytes: of each chunk.
        count: of ranks.
    """
    copies = torch.bincount(chunk, minlength=len(nbytes))
    starts = torch.cumsum(copies, dim=0) - copies
    writer = ranks[starts]  # the lowest
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
