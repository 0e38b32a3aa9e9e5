"""Saves and loads packed objects on all ranks of the default process group, in the layout of `objects.storage`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import empty as empty_dtensor

from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.tensors.copies import copy_elements, copyable
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.objects.codec import Slot, Unpacked, pack, unpack
from azure_torch_ckpt.objects.collective import together
from azure_torch_ckpt.objects.sharing_planner import SharingPlanner
from azure_torch_ckpt.objects.single_process import check_items, read_items, read_skeleton

__all__ = ["Place", "load_sharded", "save_sharded"]

# What is smaller every rank reads for itself: a broadcast takes longer than a few more bytes in a request.
_WORTH_A_BROADCAST = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """An entry of a loaded dict that is to be a DTensor.

    Attributes:
        like: it becomes one on the same mesh, with the same placements.
        other_shapes: what becomes of one with another shape than `like`: a DTensor with all of it on every rank, or
            (False) the plain tensor that it is anyway.
    """

    holder: dict[Any, Any]
    key: Any
    like: DTensor
    other_shapes: bool = False


def save_sharded(value: Any, writer: AzureBlobWriter) -> None:
    """Save an object of which every rank has a copy. All ranks call it.

    What is saved is what rank 0 has; of a DTensor each rank saves its shard. Plain tensors of other ranks that are
    proven equal to rank 0's (see `SharingPlanner`) are shared out among them.

    Raises:
        Those of `AzureBlobWriter` and `pack`; on all ranks the same.
    """
    packed = together(lambda: pack(value))
    state_dict = packed.state_dict() if dist.get_rank() == 0 else packed.tensors
    try:
        dcp.save(state_dict, storage_writer=writer, planner=SharingPlanner(dist.get_world_size()))
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None


def load_sharded(
    reader: AzureBlobReader,
    device: torch.device,
    places: Callable[[Any], Iterable[Place]] = lambda value: (),
    *,
    without: tuple[str, ...] = (),
    weights_only: bool | None = None,
) -> Any:
    """Load what `save_sharded`, `save_object` or the Lightning plugin saved. All ranks call it.

    Of what becomes a DTensor every rank reads what it holds. Large plain tensors are read by one rank each, and sent
    to the others; they are on the CPU then.

    Args:
        device: where this rank's tensors must be for a broadcast in the process group.
        places: told the object, whose tensors are still empty, says which of them become DTensors.
        without: entries of the object, a dict, that are not wanted.
        weights_only: as for ``torch.load``.

    Raises:
        Those of `AzureBlobReader` and `unpack`, on all ranks.
        CheckpointReplacedError: the ranks have found different checkpoints at the URL.
    """

    def look() -> tuple[Metadata, Unpacked, LoadPlan]:
        metadata = reader.read_metadata()

        def fetch(early: Unpacked) -> None:
            check_items(early, metadata, reader.checkpoint_id)
            read_items(reader, metadata, early.allocate())

        unpacked = unpack(read_skeleton(reader, metadata), "cpu", weights_only, reader.checkpoint_id, fetch)
        _forget(unpacked, without)
        check_items(unpacked, metadata, reader.checkpoint_id)
        return metadata, unpacked, reader.prepare_local_plan(LoadPlan([]))

    metadata, unpacked, seen = together(look)
    everybody: list[LoadPlan] = [seen] * dist.get_world_size()
    dist.all_gather_object(everybody, seen)
    reader.prepare_global_plan(everybody)  # raises where they differ, and so on all ranks

    def read() -> dict[str, torch.Tensor]:
        sharded, plain = _targets(unpacked, places(unpacked.value))
        owners = _owners(plain)
        mine = {name: tensor for name, tensor in plain.items() if owners.get(name, dist.get_rank()) == dist.get_rank()}
        for items in _rounds([*sharded, *mine.items()]):
            read_items(reader, metadata, items)
        return plain

    plain = together(read)
    for name, owner in _owners(plain).items():
        _broadcast(plain[name], owner, device)
    return unpacked.value


def _forget(unpacked: Unpacked, entries: tuple[str, ...]) -> None:
    for entry in entries:
        unpacked.value.pop(entry, None)
    gone = {name for name in unpacked.slots if name.partition(".")[0] in entries}
    wanted = {slot.storage for name, slot in unpacked.slots.items() if name not in gone}
    for name in gone:
        if unpacked.slots[name].storage not in wanted:
            del unpacked.slots[name]


def _targets(unpacked: Unpacked, places: Iterable[Place]) -> tuple[list[tuple[str, DTensor]], dict[str, torch.Tensor]]:
    """Memory for everything: DTensors with the names of their items, and the plain items."""
    at: dict[int, list[Place]] = {}
    for place in places:
        at.setdefault(id(place.holder[place.key]), []).append(place)
    by_storage: dict[int, list[Slot]] = {}
    for slot in unpacked.slots.values():
        by_storage.setdefault(slot.storage, []).append(slot)
    sharded: list[tuple[str, DTensor]] = []
    done: set[int] = set()
    for storage, slots in by_storage.items():
        # Where a tensor is but a part of an item, or repeats its elements, the plain tensors are made first.
        if not all(_is_item(slot) and _fitting(slot, at.get(id(slot.tensor), ())) for slot in slots):
            continue
        done.add(storage)
        for slot in slots:
            for place in at[id(slot.tensor)]:
                tensor = _new_dtensor(slot, place)
                place.holder[place.key] = tensor
                assert slot.item is not None
                sharded.append((slot.item, tensor))
    rest = {name: slot for name, slot in unpacked.slots.items() if slot.storage not in done}
    return sharded, Unpacked(unpacked.value, rest).allocate()


def _is_item(slot: Slot) -> bool:
    return slot.item is not None and slot.geometry.stored().size == slot.geometry.size


def _fitting(slot: Slot, places: Iterable[Place]) -> bool:
    """Whether all the places take a DTensor of this shape, and there is one."""
    size = slot.geometry.size
    fits = [torch.Size(size) == place.like.shape or (place.other_shapes and len(size) > 0) for place in places]
    return bool(fits) and all(fits)


def _new_dtensor(slot: Slot, place: Place) -> DTensor:
    size, dtype = slot.geometry.size, slot.geometry.dtype
    if torch.Size(size) == place.like.shape:
        return cast(DTensor, torch.empty_like(place.like.detach(), dtype=dtype))
    mesh = place.like.device_mesh
    whole: DTensor = empty_dtensor(*size, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    return whole


def _rounds(items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The items as dicts: more than one where a name occurs more than once, as those of tied weights do."""
    left = list(items)
    while left:
        taken = dict(reversed(left))  # the first of each name
        yield taken
        left = [(name, tensor) for name, tensor in left if taken[name] is not tensor]


def _owners(plain: dict[str, torch.Tensor]) -> dict[str, int]:
    """Which rank reads an item for all, of the large ones."""
    loads = [0] * dist.get_world_size()
    owners = {}
    for name in sorted(plain, key=lambda name: -plain[name].nbytes):
        if len(loads) > 1 and plain[name].nbytes >= _WORTH_A_BROADCAST:
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += plain[name].nbytes
    return owners


def _broadcast(tensor: torch.Tensor, owner: int, device: torch.device) -> None:
    sent = copyable(tensor).to(device).contiguous()
    # As bytes, for a process group does not know every dtype.
    dist.broadcast(sent.reshape(-1).view(torch.uint8), owner)
    if sent is not tensor and dist.get_rank() != owner:
        copy_elements(sent, copyable(tensor), "A tensor")
