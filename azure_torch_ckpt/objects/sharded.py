"""Saves and loads packed objects on all ranks of the default process group, in the form of `objects.single_process`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import empty as empty_dtensor

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.workers import Workers
from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.save_planner import AzureSavePlanner
from azure_torch_ckpt.dcp.tensors.copies import copy_elements, copyable
from azure_torch_ckpt.dcp.tensors.memory import is_plain, tensor_views
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.errors import AzureCheckpointError, CheckpointError
from azure_torch_ckpt.objects.codec import Placeholder, Unpacked, pack, unpack
from azure_torch_ckpt.objects.single_process import check_items, read_items, read_skeleton

__all__ = ["DTensorEntry", "DedupSavePlanner", "load_sharded", "run_on_all_ranks", "save_sharded"]

# Every rank reads smaller tensors itself: a broadcast takes longer than a few more bytes in a request.
_BROADCAST_SIZE = 1024 * 1024
# A thread computes checksums at 5 to 15 GB/s, and the ranks of a machine all do this at once.
_THREADS = 4
# Tensors up to this size take less time than a thread needs to start on them.
_SMALL = 256 * 1024
_VIEW_SIZE = 32 * 1024 * 1024

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, slots=True)
class DTensorEntry:
    """The entry `key` of a loaded dict that is to be a DTensor on the mesh and with the placements of `like`.

    Attributes:
        other_shapes: whether an entry with another shape than `like` becomes a replicated DTensor. Otherwise it stays a
            plain tensor.
    """

    holder: dict[Any, Any]
    key: Any
    like: DTensor
    other_shapes: bool = False


def run_on_all_ranks(work: Callable[[], _Result]) -> _Result:
    """Call `work` on every rank of the default process group; return its result on this rank.

    Raises:
        Whatever `work` raised on this rank; else, if it raised on others, the lowest one's as an AzureCheckpointError.
    """
    result: list[_Result] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        failure = error
    errors: list[AzureCheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if failure is None else _picklable(failure))
    if failure is not None:
        raise failure
    for error_of_rank in errors:
        if error_of_rank is not None:
            raise error_of_rank
    return result[0]


def _picklable(error: Exception) -> AzureCheckpointError:
    """The error itself, if all ranks can unpickle it; else one that quotes it."""
    if isinstance(error, AzureCheckpointError):
        return error
    return CheckpointError(f"Rank {dist.get_rank()} failed: {type(error).__name__}: {error}")


def save_sharded(value: Any, writer: AzureBlobWriter) -> None:
    """Save an object of which every rank has a copy. All ranks call it, and raise the same errors.

    The checkpoint has rank 0's object; of a DTensor, each rank saves its shard. Plain tensors that several ranks hold
    with the same bytes are distributed among these ranks (see `DedupSavePlanner`).
    """
    packed = run_on_all_ranks(lambda: pack(value))
    state_dict = packed.state_dict() if dist.get_rank() == 0 else packed.tensors
    try:
        dcp.save(state_dict, storage_writer=writer, planner=DedupSavePlanner(dist.get_world_size()))
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None


def load_sharded(
    reader: AzureBlobReader,
    device: torch.device,
    dtensors: Callable[[Any], Iterable[DTensorEntry]] = lambda value: (),
    *,
    without: tuple[str, ...] = (),
    weights_only: bool | None = None,
) -> Any:
    """Load an object that `save_sharded`, `save_object` or the Lightning plugin saved. All ranks call it.

    Of a DTensor, every rank reads its own shard. One rank reads each large plain tensor and sends it to the others.
    Plain tensors are loaded to the CPU.

    Args:
        device: where this rank's tensors must be for a broadcast in the process group.
        dtensors: called with the object while its tensors are empty; returns those that become DTensors.
        without: entries of the object, a dict, to leave out.
        weights_only: as for ``torch.load``.

    Raises:
        Those of `AzureBlobReader` and `unpack`, on all ranks.
        CheckpointReplacedError: the ranks read different checkpoints at the URL.
    """

    def read_skeleton_of_rank() -> tuple[Metadata, Unpacked, LoadPlan]:
        metadata = reader.read_metadata()

        def fetch(early: Unpacked) -> None:
            check_items(early, metadata, reader.checkpoint_id)
            read_items(reader, metadata, early.allocate())

        unpacked = unpack(read_skeleton(reader, metadata), "cpu", weights_only, reader.checkpoint_id, fetch)
        _drop_entries(unpacked, without)
        check_items(unpacked, metadata, reader.checkpoint_id)
        return metadata, unpacked, reader.prepare_local_plan(LoadPlan([]))

    metadata, unpacked, plan = run_on_all_ranks(read_skeleton_of_rank)
    plans: list[LoadPlan] = [plan] * dist.get_world_size()
    dist.all_gather_object(plans, plan)
    reader.prepare_global_plan(plans)  # raises on all ranks if the plans are of different checkpoints

    def read() -> dict[str, torch.Tensor]:
        sharded, plain = _allocate(unpacked, dtensors(unpacked.value))
        owners = _owners(plain)
        mine = {name: tensor for name, tensor in plain.items() if owners.get(name, dist.get_rank()) == dist.get_rank()}
        for items in _rounds([*sharded, *mine.items()]):
            read_items(reader, metadata, items)
        return plain

    plain = run_on_all_ranks(read)
    for name, owner in _owners(plain).items():
        _broadcast(plain[name], owner, device)
    return unpacked.value


def _drop_entries(unpacked: Unpacked, entries: tuple[str, ...]) -> None:
    for entry in entries:
        unpacked.value.pop(entry, None)
    dropped = {name for name in unpacked.placeholders if name.partition(".")[0] in entries}
    kept = {placeholder.storage for name, placeholder in unpacked.placeholders.items() if name not in dropped}
    for name in dropped:
        if unpacked.placeholders[name].storage not in kept:
            del unpacked.placeholders[name]


def _allocate(
    unpacked: Unpacked, entries: Iterable[DTensorEntry]
) -> tuple[list[tuple[str, DTensor]], dict[str, torch.Tensor]]:
    """Give all tensors memory. Returns the DTensors with the names of their items, and the plain items."""
    entries_of: dict[int, list[DTensorEntry]] = {}
    for entry in entries:
        entries_of.setdefault(id(entry.holder[entry.key]), []).append(entry)
    by_storage: dict[int, list[Placeholder]] = {}
    for placeholder in unpacked.placeholders.values():
        by_storage.setdefault(placeholder.storage, []).append(placeholder)
    sharded: list[tuple[str, DTensor]] = []
    done: set[int] = set()
    for storage, placeholders in by_storage.items():
        # A tensor that is a part of an item, or repeats its elements, is loaded as a plain tensor first.
        if not all(_is_item(one) and _can_be_sharded(one, entries_of.get(id(one.tensor), ())) for one in placeholders):
            continue
        done.add(storage)
        for placeholder in placeholders:
            for entry in entries_of[id(placeholder.tensor)]:
                tensor = _new_dtensor(placeholder, entry)
                entry.holder[entry.key] = tensor
                assert placeholder.item is not None
                sharded.append((placeholder.item, tensor))
    rest = {name: one for name, one in unpacked.placeholders.items() if one.storage not in done}
    return sharded, Unpacked(unpacked.value, rest).allocate()


def _is_item(placeholder: Placeholder) -> bool:
    return placeholder.item is not None and placeholder.geometry.stored().size == placeholder.geometry.size


def _can_be_sharded(placeholder: Placeholder, entries: Iterable[DTensorEntry]) -> bool:
    """Whether the tensor has entries, and all of them take a DTensor of its shape."""
    size = placeholder.geometry.size
    fits = [torch.Size(size) == entry.like.shape or (entry.other_shapes and len(size) > 0) for entry in entries]
    return bool(fits) and all(fits)


def _new_dtensor(placeholder: Placeholder, entry: DTensorEntry) -> DTensor:
    size, dtype = placeholder.geometry.size, placeholder.geometry.dtype
    if torch.Size(size) == entry.like.shape:
        return cast(DTensor, torch.empty_like(entry.like.detach(), dtype=dtype))
    mesh = entry.like.device_mesh
    replicated: DTensor = empty_dtensor(*size, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    return replicated


def _rounds(items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The items as dicts: more than one dict if a name occurs more than once, as the names of tied weights do."""
    remaining = list(items)
    while remaining:
        taken = dict(reversed(remaining))  # the first of each name
        yield taken
        remaining = [(name, tensor) for name, tensor in remaining if taken[name] is not tensor]


def _owners(plain: dict[str, torch.Tensor]) -> dict[str, int]:
    """Which rank reads an item for all ranks; of large items only."""
    loads = [0] * dist.get_world_size()
    owners = {}
    for name in sorted(plain, key=lambda name: -plain[name].nbytes):
        if len(loads) > 1 and plain[name].nbytes >= _BROADCAST_SIZE:
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += plain[name].nbytes
    return owners


def _broadcast(tensor: torch.Tensor, owner: int, device: torch.device) -> None:
    sent = copyable(tensor).to(device).contiguous()
    # As bytes, because a process group does not know every dtype.
    dist.broadcast(sent.reshape(-1).view(torch.uint8), owner)
    if sent is not tensor and dist.get_rank() != owner:
        copy_elements(sent, copyable(tensor), "A tensor")


class DedupSavePlanner(AzureSavePlanner):
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

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans of all ranks without duplicates, and the metadata. Rank 0 calls it."""
        plans, metadata = super().create_global_plan(all_plans)
        missing = sorted(set(self.state_dict) - set(metadata.state_dict_metadata))
        if missing:
            raise CheckpointError(f"No rank would save {missing[0]!r} and {len(missing) - 1} others; nothing was saved")
        return plans, metadata

    def _contents(self, items: list[WriteItem]) -> list[int | None] | None:
        return self._checksums(items) if self._ranks > 1 else None

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


def _may_be_replicated(thing: object) -> bool:
    """Whether other ranks may hold this rank's part of a tensor: it is not sharded, or not over all ranks."""
    if not isinstance(thing, DTensor):
        return True
    mesh = thing.device_mesh
    return any(placement.is_replicate() and mesh.size(dim) > 1 for dim, placement in enumerate(thing.placements))
