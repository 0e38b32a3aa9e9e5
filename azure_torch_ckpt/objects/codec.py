"""A Python object as a flat state dict of tensors and back, object for object as ``torch.save`` and ``torch.load`` do.

`torch.distributed.checkpoint` stores a nested dict only if it consists of string keys and tensors; of anything else it
keeps less than was there (int keys become strings, tuples lists, aliases copies). Here the tensors alone are given to
it, each as an item of its own under its usual name, ``optimizer_states.0.state.3.exp_avg``. Everything else is one
more item, the *skeleton*: what ``torch.save`` writes of the object when each of those tensors is an empty one in its
place, and a table that says what belongs there. ``torch.load`` reads it, so ``weights_only`` and ``map_location`` mean
what they mean there; then the empty tensors are given memory, and the items are loaded into it.

Items are the plain tensors that are reached through dicts, lists and tuples, and DTensors there. Tensors inside other
objects, and sparse, quantized and other special ones, stay in the skeleton with their bytes. Tensors that share memory
share it again after loading, and the memory is stored once.

The code that rebuilds an object may look at its tensors: it checks a shape, or takes a copy. So items that an object
has in it (a named tuple's, or the weights of a model that is among the hyperparameters, too) are loaded *early*: in
front of the object, the skeleton has a table of them, and reading that calls `fill_early`, which fills them before
``torch.load`` goes on.

A skeleton is short: ``torch.load`` reads it with an unpickler that is written in Python, opcode by opcode.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.types

from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.dcp.tensors.memory import is_plain, readable
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsupportedCheckpointError
from azure_torch_ckpt.objects.geometry import Geometry, carve, contiguous, needed
from azure_torch_ckpt.objects.walk import Walk, is_sharded, tensors_in

__all__ = ["SKELETON", "Fetch", "MapLocation", "Packed", "Slot", "Unpacked", "blank", "fill_early", "pack", "unpack"]

MapLocation: TypeAlias = (
    Callable[[torch.types.Storage, str], torch.types.Storage] | torch.device | str | dict[str, str] | None
)

SKELETON = "azure_torch_ckpt.skeleton"
"""Name of the skeleton's item: one dimension, uint8."""

_FORMAT = 2
_FIRST_FORMAT = 1  # still read


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
            On the device "meta" there is nothing to load.

        Raises:
            CorruptCheckpointError: the skeleton asks for memory that no item fills.
        """
        together: dict[tuple[int, torch.device], list[Slot]] = {}
        for slot in self.slots.values():
            together.setdefault((slot.storage, slot.tensor.device), []).append(slot)
        items: dict[str, torch.Tensor] = {}
        for (_, device), slots in together.items():
            if len(slots) == 1 and slots[0].item is not None and slots[0].geometry.is_contiguous:
                geometry = slots[0].geometry
                tensors = [torch.empty(geometry.size, dtype=geometry.dtype, device=device)]
                stored = {slots[0].item: tensors[0]}
            else:
                tensors, stored = _laid_out(slots, device)
            for slot, tensor in zip(slots, tensors, strict=True):
                slot.tensor.data = tensor
            if device.type != "meta":
                items.update(stored)
        return items


def _laid_out(slots: list[Slot], device: torch.device) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """New tensors for slots that share memory, and the items that have their values."""
    stored = {slot.item: slot.geometry.stored() for slot in slots if slot.item is not None}
    filled = max((geometry.end for geometry in stored.values()), default=0)
    if any(slot.geometry.end > filled for slot in slots):
        raise CorruptCheckpointError("The skeleton has a tensor without an item. Use another checkpoint")
    tensors = carve([*(slot.geometry for slot in slots), *stored.values()], device)
    return tensors[: len(slots)], dict(zip(stored, tensors[len(slots) :], strict=True))


Fetch: TypeAlias = Callable[[Unpacked], None]
"""Allocates the slots of an `Unpacked` without a value, and loads their items."""

_reading: ContextVar[tuple[str, Fetch | None]] = ContextVar("reading", default=("it", None))


def pack(value: Any) -> Packed:
    """Take an object apart. It, and the tensors, must not change until the result has been saved or copied.

    Raises:
        Whatever ``torch.save`` raises for an object that cannot be pickled.
    """
    with CollectorPause():
        packing = _Packing(value)
        stream = io.BytesIO()
        content = (_FORMAT, packing.early, value, packing.late.tensors, packing.late.rows)
        torch.save(content, stream, pickle_module=_pickle_module(packing))
    return Packed(packing.items, torch.frombuffer(stream.getbuffer(), dtype=torch.uint8))


def unpack(
    skeleton: torch.Tensor,
    map_location: MapLocation = None,
    weights_only: bool | None = None,
    what: str = "it",
    fetch: Fetch | None = None,
) -> Unpacked:
    """Read a skeleton.

    Args:
        skeleton: one dimension, uint8, on the CPU.
        map_location: as for ``torch.load``, which decides the devices of all tensors.
        weights_only: as for ``torch.load``. False runs code that the checkpoint names: only for one that you trust.
        what: what to call the checkpoint in an error.
        fetch: called before this returns, for tensors that must have their values before the objects around them are
            rebuilt. Not every skeleton has such tensors.

    Raises:
        UnsupportedCheckpointError: with ``weights_only``, an object is of a class that is not known to be safe; or the
            skeleton is of a form that this version does not know.
        CorruptCheckpointError: it is no skeleton.
        Whatever ``torch.load`` raises for a class that is gone or a device that is not there, and what `fetch` raises.
    """
    outer = _reading.set((what, fetch))
    try:
        with CollectorPause():
            loaded = torch.load(io.BytesIO(readable(skeleton)), map_location=map_location, weights_only=weights_only)
            return Unpacked(*_value_and_slots(loaded, what))
    except pickle.UnpicklingError as error:
        raise UnsupportedCheckpointError(
            f"{what} holds more than tensors and plain values, and weights_only is on. If you trust the checkpoint, "
            "load it with weights_only=False, or name its classes with torch.serialization.add_safe_globals first "
            f"({_first_line(error)})"
        ) from error
    finally:
        _reading.reset(outer)


def _value_and_slots(loaded: Any, what: str) -> tuple[Any, dict[str, Slot]]:
    if not isinstance(loaded, tuple) or len(loaded) < 3:
        raise CorruptCheckpointError(f"The skeleton of {what} is none. Use another checkpoint")
    if (loaded[0], len(loaded)) == (_FIRST_FORMAT, 3):
        _, value, table = loaded
        return value, _slots(_rows_of_first_format(table), what)
    if (loaded[0], len(loaded)) != (_FORMAT, 5):
        raise UnsupportedCheckpointError(
            f"The skeleton of {what} has the form {loaded[0]!r}, and this version knows {_FIRST_FORMAT} and {_FORMAT}. "
            "Upgrade azure-torch-ckpt"
        )
    _, _, value, tensors, rows = loaded
    return value, _slots(_rows(tensors, rows), what)


def blank(kind: torch.Tensor, requires_grad: bool = False, is_parameter: bool = False) -> torch.Tensor:
    """Called by ``torch.load`` for a skeleton that names it: a new empty tensor of the dtype and device of `kind`."""
    empty = kind.detach()
    if is_parameter:
        return torch.nn.Parameter(empty, requires_grad)
    return empty.requires_grad_() if requires_grad else empty


def fill_early(tensors: list[torch.Tensor], rows: str) -> None:
    """Called by ``torch.load`` in the middle of a skeleton that names it: give these tensors their values now.

    Raises:
        UnsupportedCheckpointError: the skeleton is not read by `unpack`.
        Whatever the `Fetch` raises.
    """
    what, fetch = _reading.get()
    if fetch is None:
        raise UnsupportedCheckpointError(
            "This is the skeleton of a checkpoint, whose tensors lie elsewhere. Load the checkpoint with "
            "azure_torch_ckpt.lightning"
        )
    fetch(Unpacked(None, _slots(_rows(tensors, rows), what)))


# The one makes empty tensors, and the other does nothing but what the running `unpack` has told it.
torch.serialization.add_safe_globals([blank, fill_early])

# Name, tensor, storage, offset, size, stride, item.
_Row: TypeAlias = tuple[str, torch.Tensor, int, int, Sequence[int], Sequence[int], str | None]


def _rows(tensors: list[torch.Tensor], rows: str) -> Iterator[_Row]:
    """The rows that `_Table` has written."""
    for tensor, (name, storage, offset, size, stride, item) in zip(tensors, json.loads(rows), strict=True):
        stride = contiguous(size) if stride is None else stride
        yield name, tensor, storage, offset, size, stride, name if item is True else item


def _rows_of_first_format(table: dict[str, list[Any]]) -> Iterator[_Row]:
    for name, (tensor, storage, offset, size, stride, item) in table.items():
        yield name, tensor, storage, offset, size, stride, item


def _slots(rows: Iterator[_Row], what: str) -> dict[str, Slot]:
    try:
        return {
            name: Slot(tensor, Geometry(tensor.dtype, offset, tuple(size), tuple(stride)), storage, item)
            for name, tensor, storage, offset, size, stride, item in rows
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"The skeleton of {what} is damaged: {error}. Use another checkpoint") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "Unsupported" in line), lines[0] if lines else type(error).__name__)


@dataclass(frozen=True, slots=True)
class _Met:
    """A tensor that is to be an item, or to share an item's memory."""

    name: str
    tensor: torch.Tensor
    storage: int
    geometry: Geometry


class _Table:
    """What the skeleton says of some tensors: the tensors, and a row for each as JSON."""

    def __init__(self, tensors: list[torch.Tensor], rows: list[list[Any]]) -> None:
        self.tensors = tensors
        self.rows = json.dumps(rows, separators=(",", ":"))


class _Packing:
    """What one `pack` knows while torch.save writes the object."""

    def __init__(self, value: Any) -> None:
        self.items: dict[str, torch.Tensor] = {}
        self._named: dict[int, _Met] = {}  # by id; holding the tensor keeps the id its own
        self._names = {SKELETON}
        self._storages: dict[tuple[torch.device, int], int] = {}
        self._numbers = itertools.count()
        self._empty: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        walk = Walk(value)
        within_objects = tensors_in(walk.objects)
        pickled = {id(tensor) for tensor in within_objects}
        for name, tensor, within_object in walk.tensors:
            # An object need not pickle what it holds.
            if id(tensor) not in self._named and (not within_object or id(tensor) in pickled):
                self._name(name, tensor, id(tensor) in walk.plain)
        early = {met.storage for tensor in within_objects if (met := self._shared(tensor))}
        by_storage: dict[int, list[_Met]] = {}
        for met in self._named.values():
            by_storage.setdefault(met.storage, []).append(met)
        self.early = self._table(group for storage, group in by_storage.items() if storage in early) if early else None
        self.late = self._table(group for storage, group in by_storage.items() if storage not in early)

    def reduce(self, thing: Any) -> Any:
        """How to pickle `thing`, as `pickle.Pickler.reducer_override` says it."""
        if isinstance(thing, torch.Tensor):
            return self._placeholder(thing) if id(thing) in self._named else NotImplemented
        if thing is self.early and self.early is not None:
            return fill_early, (self.early.tensors, self.early.rows)
        return NotImplemented

    def _table(self, groups: Iterable[list[_Met]]) -> _Table:
        """The table of the tensors of some storages; what must be stored of them becomes items."""
        tensors = []
        rows = []
        for group in groups:
            if len(group) == 1:
                (met,) = group
                item_of = {met.geometry: met.name}
            else:
                item_of = {group[at].geometry: group[at].name for at in needed([met.geometry for met in group])}
            for met in group:
                geometry = met.geometry
                item = item_of.get(geometry)
                if item == met.name:
                    self.items[item] = _stored(met)
                stride = None if geometry.is_contiguous else geometry.stride
                tensors.append(met.tensor)
                rows.append([met.name, met.storage, geometry.offset, geometry.size, stride, item == met.name or item])
        return _Table(tensors, rows)

    def _name(self, name: str, tensor: torch.Tensor, plain: bool) -> _Met | None:
        """Make an item of the tensor, if it can be one."""
        if plain:
            met = _Met(self._unique(name), tensor, self._storage_of(tensor), Geometry.of(tensor))
        elif is_sharded(tensor):
            met = _Met(self._unique(name), tensor, next(self._numbers), _geometry_of_whole(tensor))
        else:
            return None
        self._named[id(tensor)] = met
        return met

    def _shared(self, tensor: torch.Tensor) -> _Met | None:
        """The tensor as an item, if it is one or has the memory of one."""
        met = self._named.get(id(tensor))
        if met is None and not is_sharded(tensor) and is_plain(tensor) and self._is_shared(tensor):
            met = self._name("shared.0", tensor, True)
        return met

    def _placeholder(self, tensor: torch.Tensor) -> Any:
        """How to pickle an empty tensor of the same dtype, device and class, with the same attributes."""
        kind = (tensor.dtype, tensor.device)
        empty = self._empty.get(kind)
        if empty is None:  # one for all of a kind: torch.save writes a record for each storage
            empty = self._empty[kind] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        attributes = None if is_sharded(tensor) else tensor.__dict__
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if not attributes:
            if not tensor.requires_grad and not is_parameter:
                return blank, (empty,)
            return blank, (empty, tensor.requires_grad, is_parameter)
        made = blank(empty, tensor.requires_grad, is_parameter)
        made.__dict__.update(attributes)
        return made.__reduce_ex__(2)

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


def _geometry_of_whole(tensor: torch.Tensor) -> Geometry:
    """Of the tensor that a DTensor's shards make up, contiguous."""
    return Geometry.of(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def _stored(met: _Met) -> torch.Tensor:
    if is_sharded(met.tensor):
        return met.tensor
    if met.geometry.is_contiguous:
        return met.tensor.detach()
    stored = met.geometry.stored()
    offset = stored.offset // stored.dtype.itemsize
    return met.tensor.detach().as_strided(stored.size, stored.stride, offset)
