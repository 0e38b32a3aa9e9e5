"""A Python object as a flat state dict of tensors and back, object for object as ``torch.save`` and ``torch.load`` do.

`torch.distributed.checkpoint` stores a nested dict only if it consists of string keys and tensors; of anything else it
keeps less than was there (int keys become strings, tuples lists, aliases copies). Here the tensors alone are given to
it, each as an item of its own under its usual name, ``optimizer_states.0.state.3.exp_avg``. Everything else is one
more item, the *skeleton*: what ``torch.save`` writes of the object when each of those tensors is an empty one in its
place, and a table that says what belongs there. ``torch.load`` reads it, so ``weights_only`` and ``map_location`` mean
what they mean there; then the empty tensors are given memory, and the items are loaded into it.

Items are the plain tensors that are reached through dicts, lists and tuples, and DTensors there. Tensors inside other
objects, and sparse, quantized and other special ones, stay in the skeleton with their bytes: the code that rebuilds
such an object may look at them. Tensors that share memory share it again after loading, and the memory is stored once.
"""

from __future__ import annotations

import io
import itertools
import pickle
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.types

from azure_torch_ckpt.dcp.payload import is_plain, readable
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsupportedCheckpointError
from azure_torch_ckpt.objects.geometry import Geometry, carve, needed

__all__ = ["SKELETON", "MapLocation", "Packed", "Slot", "Unpacked", "pack", "unpack"]

MapLocation: TypeAlias = (
    Callable[[torch.types.Storage, str], torch.types.Storage] | torch.device | str | dict[str, str] | None
)

SKELETON = "azure_torch_ckpt.skeleton"
"""Name of the skeleton's item: one dimension, uint8."""

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Packed:
    """An object taken apart.

    Attributes:
        tensors: the items, by name, in the memory of the object's own tensors (`Geometry.stored` tells where one is not
            just the tensor itself).
        skeleton: everything else.
    """

    tensors: dict[str, torch.Tensor]
    skeleton: torch.Tensor

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is given to torch.distributed.checkpoint (with ``flatten_state_dict=False``)."""
        return {**self.tensors, SKELETON: self.skeleton}


@dataclass(slots=True)
class Slot:
    """Where an item belongs in an object that `unpack` read.

    Attributes:
        tensor: what the object holds there: an empty tensor until `Unpacked.allocate` gives it memory.
        geometry: what it becomes.
        storage: slots with the same number share memory.
        item: name of the item that has its values; None if they come with the item of a tensor around it.
    """

    tensor: torch.Tensor
    geometry: Geometry
    storage: int
    item: str | None


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An object whose tensors are still empty.

    Attributes:
        value: the object.
        slots: its tensors by name, those of items and those without one of their own.
    """

    value: Any
    slots: dict[str, Slot]

    def allocate(self) -> dict[str, torch.Tensor]:
        """Give all tensors memory, on the device that ``map_location`` said.

        Returns:
            The items to load, by name, as tensors in that memory: once values are loaded into them, `value` is whole.

        Raises:
            CorruptCheckpointError: the skeleton asks for memory that no item fills.
        """
        together: dict[tuple[int, torch.device], list[Slot]] = {}
        for slot in self.slots.values():
            together.setdefault((slot.storage, slot.tensor.device), []).append(slot)
        items: dict[str, torch.Tensor] = {}
        for (_, device), slots in together.items():
            stored = {slot.item: slot.geometry.stored() for slot in slots if slot.item is not None}
            filled = max((geometry.end for geometry in stored.values()), default=0)
            if any(slot.geometry.end > filled for slot in slots):
                raise CorruptCheckpointError("The skeleton has a tensor without an item. Use another checkpoint")
            tensors = carve([*(slot.geometry for slot in slots), *stored.values()], device)
            for slot, tensor in zip(slots, tensors, strict=False):
                slot.tensor.data = tensor
            items.update(zip(stored, tensors[len(slots) :], strict=True))
        return items


def pack(value: Any) -> Packed:
    """Take an object apart. It, and the tensors, must not change until the result has been saved or copied.

    Raises:
        Whatever ``torch.save`` raises for an object that cannot be pickled.
    """
    packing = _Packing(value)
    stream = io.BytesIO()
    torch.save((_FORMAT, value, packing.table), stream, pickle_module=_pickle_module(packing))
    return Packed(packing.items, torch.frombuffer(stream.getbuffer(), dtype=torch.uint8))


def unpack(
    skeleton: torch.Tensor, map_location: MapLocation = None, weights_only: bool | None = None, what: str = "it"
) -> Unpacked:
    """Read a skeleton.

    Args:
        skeleton: one dimension, uint8, on the CPU.
        map_location: as for ``torch.load``, which decides the devices of all tensors.
        weights_only: as for ``torch.load``. False runs code that the checkpoint names: only for one that you trust.
        what: what to call the checkpoint in an error.

    Raises:
        UnsupportedCheckpointError: with ``weights_only``, an object is of a class that is not known to be safe; or the
            skeleton is of a form that this version does not know.
        CorruptCheckpointError: it is no skeleton.
        Whatever ``torch.load`` raises for a class that is gone or a device that is not there.
    """
    try:
        loaded = torch.load(io.BytesIO(readable(skeleton)), map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise UnsupportedCheckpointError(
            f"{what} holds more than tensors and plain values, and weights_only is on. If you trust the checkpoint, "
            "load it with weights_only=False, or name its classes with torch.serialization.add_safe_globals first "
            f"({_first_line(error)})"
        ) from error
    if not isinstance(loaded, tuple) or len(loaded) != 3:
        raise CorruptCheckpointError(f"The skeleton of {what} is none. Use another checkpoint")
    version, value, table = loaded
    if version != _FORMAT:
        raise UnsupportedCheckpointError(
            f"The skeleton of {what} has the form {version!r}, and this version knows {_FORMAT}. Upgrade "
            "azure-torch-ckpt"
        )
    slots = {}
    try:
        for name, (tensor, storage, offset, size, stride, item) in table.items():
            slots[name] = Slot(tensor, Geometry(tensor.dtype, offset, tuple(size), tuple(stride)), storage, item)
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"The skeleton of {what} is damaged: {error}. Use another checkpoint") from error
    return Unpacked(value, slots)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "Unsupported" in line), lines[0] if lines else type(error).__name__)


@dataclass(frozen=True, slots=True)
class _Met:
    """A tensor that the pickler has come by and that is to be an item, or to share an item's memory."""

    name: str
    tensor: torch.Tensor
    storage: int
    geometry: Geometry


class _Table:
    """Stands in the pickle where the table of slots goes."""


class _Packing:
    """What one `pack` knows while torch.save writes the object."""

    def __init__(self, value: Any) -> None:
        self.table = _Table()
        self.items: dict[str, torch.Tensor] = {}
        self._named: dict[int, tuple[str, torch.Tensor]] = {}  # by id; holding the tensor keeps the id its own
        self._names = {SKELETON}
        self._storages: dict[tuple[torch.device, int], int] = {}
        self._numbers = itertools.count()
        self._met: list[_Met] = []
        self._empty: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        for name, tensor in _tensors(value):
            if id(tensor) not in self._named and (_is_sharded(tensor) or is_plain(tensor)):
                self._named[id(tensor)] = (self._unique(name), tensor)
                if not _is_sharded(tensor):
                    self._storage_of(tensor)

    def reduce(self, thing: Any) -> Any:
        """How to pickle `thing`, as `pickle.Pickler.reducer_override` says it."""
        if thing is self.table:
            # An OrderedDict: its content is asked for only now, and torch.load knows it with weights_only too.
            return OrderedDict, (), None, None, self._rows()
        if not isinstance(thing, torch.Tensor):
            return NotImplemented
        if id(thing) in self._named:
            name, _ = self._named[id(thing)]
        elif is_plain(thing) and self._is_shared(thing):
            name = self._unique("shared.0")
        else:
            return NotImplemented
        if _is_sharded(thing):
            met = _Met(name, thing, next(self._numbers), _geometry_of_whole(thing))
        else:
            met = _Met(name, thing, self._storage_of(thing), Geometry.of(thing))
        self._met.append(met)
        return self._placeholder(thing).__reduce_ex__(2)

    def _rows(self) -> Iterator[tuple[str, list[Any]]]:
        """The table's rows; only now it is known which tensors there are, and which of them must be stored."""
        together: dict[int, list[_Met]] = {}
        for met in self._met:
            together.setdefault(met.storage, []).append(met)
        item_of: dict[tuple[int, Geometry], str] = {}
        for storage, group in together.items():
            for position in needed([met.geometry for met in group]):
                item_of[storage, group[position].geometry] = group[position].name
        for met in self._met:
            item = item_of.get((met.storage, met.geometry))
            if item == met.name:
                self.items[item] = met.tensor if _is_sharded(met.tensor) else _stored(met)
            geometry = met.geometry
            yield met.name, [met.tensor, met.storage, geometry.offset, [*geometry.size], [*geometry.stride], item]

    def _placeholder(self, tensor: torch.Tensor) -> torch.Tensor:
        """An empty tensor of the same dtype, device and class, with the same attributes."""
        kind = (tensor.dtype, tensor.device)
        if kind not in self._empty:  # one storage for all of a kind: torch.save writes a record for each
            self._empty[kind] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        empty = self._empty[kind].detach()
        if isinstance(tensor, torch.nn.Parameter):
            empty = torch.nn.Parameter(empty, tensor.requires_grad)
        elif tensor.requires_grad:
            empty.requires_grad_()
        if not _is_sharded(tensor):
            empty.__dict__.update(tensor.__dict__)
        return empty

    def _storage_of(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage. One without bytes shares nothing."""
        address = tensor.untyped_storage().data_ptr()
        if address == 0:
            return next(self._numbers)
        key = (tensor.device, address)
        if key not in self._storages:
            self._storages[key] = next(self._numbers)
        return self._storages[key]

    def _is_shared(self, tensor: torch.Tensor) -> bool:
        return (tensor.device, tensor.untyped_storage().data_ptr()) in self._storages

    def _unique(self, name: str) -> str:
        if name in self._names:
            name = next(other for n in itertools.count(1) if (other := f"{name}~{n}") not in self._names)
        self._names.add(name)
        return name


def _pickle_module(packing: _Packing) -> Any:
    """What torch.save takes for the module ``pickle``."""
    # torch makes a subclass for every save, and a class is garbage that lies about until the collector comes by.
    # It must not hold the tensors so long.
    weakly = weakref.ref(packing)

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing: Any) -> Any:
            packing = weakly()
            return NotImplemented if packing is None else packing.reduce(thing)

    return types.SimpleNamespace(__name__="pickle", Pickler=Pickler)


def _tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that are reached through dicts, lists and tuples, in order, each with its path."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, thing = stack.pop()
        if isinstance(thing, torch.Tensor):
            yield path or "tensor", thing
            continue
        if not isinstance(thing, (dict, list, tuple)) or id(thing) in seen:
            continue
        seen.add(id(thing))
        entries = list(thing.items() if isinstance(thing, dict) else enumerate(thing))
        named = [(_step(key, number), part) for number, (key, part) in enumerate(entries)]
        stack += [(f"{path}.{step}" if path else step, part) for step, part in reversed(named)]


def _step(key: Any, number: int) -> str:
    """A key as part of a name: as torch's own names have it where it is an ordinary one, else by its position."""
    return str(key) if isinstance(key, (str, int, float)) else str(number)


def _is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Where there is one its module has been imported; importing it takes seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _geometry_of_whole(tensor: torch.Tensor) -> Geometry:
    """Of the tensor that a DTensor's shards make up, contiguous."""
    return Geometry.of(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def _stored(met: _Met) -> torch.Tensor:
    stored = met.geometry.stored()
    offset = stored.offset // stored.dtype.itemsize
    return met.tensor.detach().as_strided(stored.size, stored.stride, offset)
