"""Turns a Python object into a flat state dict of tensors and back, object for object as torch.save and torch.load do.

`torch.distributed.checkpoint` stores a nested dict only if it consists of string keys and tensors; of anything else it
keeps less than was there (int keys become strings, tuples lists, aliases copies). So it only gets the tensors, each as
an item under its usual name, ``optimizer_states.0.state.3.exp_avg``. Everything else is one more item, the *skeleton*:
what ``torch.save`` writes of the object with an empty placeholder for each of those tensors, and a table of the
placeholders. ``torch.load`` reads the skeleton, so ``weights_only`` and ``map_location`` have their usual meaning.
Then the placeholders get memory, and the items are loaded into it.

Plain tensors and DTensors in dicts, lists and tuples become items. Tensors in other objects, and sparse, quantized and
other special tensors, stay in the skeleton with their bytes. Tensors that share memory share it again after loading,
and the memory is stored once.

The code that rebuilds an object may look at the object's tensors, to check a shape or to take a copy. So items that are
inside of objects as well (in a named tuple, or in a model among the hyperparameters) are loaded *early*: the skeleton
has a table of them before the object, and reading that table calls `fill_early`, which fills them before ``torch.load``
continues.

A skeleton is short, because ``torch.load`` reads it with an unpickler that is written in Python, opcode by opcode.
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
from azure_torch_ckpt.dcp.tensors.regions import row_major
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsupportedCheckpointError
from azure_torch_ckpt.objects.geometry import Geometry, carve, positions_to_store
from azure_torch_ckpt.objects.tensor_walk import TensorWalk, is_sharded, tensors_in

__all__ = [
    "SKELETON",
    "Fetch",
    "MapLocation",
    "Packed",
    "Placeholder",
    "Unpacked",
    "blank",
    "fill_early",
    "pack",
    "unpack",
]

MapLocation: TypeAlias = (
    Callable[[torch.types.Storage, str], torch.types.Storage] | torch.device | str | dict[str, str] | None
)

SKELETON = "azure_torch_ckpt.skeleton"
"""Name of the skeleton's item: one dimension, uint8."""

_FORMAT = 2
_FIRST_FORMAT = 1  # still read


@dataclass(frozen=True, slots=True)
class Packed:
    """What `pack` makes of an object.

    Attributes:
        tensors: the items, by name, in the memory of the object's own tensors. `Geometry.stored` says for which tensors
            the item is not the tensor itself.
        skeleton: everything else; one dimension, uint8.
    """

    tensors: dict[str, torch.Tensor]
    skeleton: torch.Tensor

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state dict for torch.distributed.checkpoint (with ``flatten_state_dict=False``)."""
        return {**self.tensors, SKELETON: self.skeleton}


@dataclass(slots=True)
class Placeholder:
    """An empty tensor in an object that `unpack` read.

    Attributes:
        tensor: the tensor in the object, empty until `Unpacked.allocate` gives it memory.
        geometry: what the tensor becomes.
        storage: placeholders with the same number share memory.
        item: name of the item with the tensor's values; None if they come with the item of another tensor around it.
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
        placeholders: its empty tensors, by name.
    """

    value: Any
    placeholders: dict[str, Placeholder]

    @property
    def slots(self) -> dict[str, Placeholder]:
        """The earlier name of `placeholders`."""
        return self.placeholders

    def allocate(self) -> dict[str, torch.Tensor]:
        """Give all tensors memory, on the devices that ``map_location`` chose.

        Returns:
            The items to load, by name, as tensors in that memory: once their values are loaded, `value` is complete.
            On the device "meta" there is nothing to load.

        Raises:
            CorruptCheckpointError: the skeleton asks for memory that no item fills.
        """
        by_storage: dict[tuple[int, torch.device], list[Placeholder]] = {}
        for placeholder in self.placeholders.values():
            by_storage.setdefault((placeholder.storage, placeholder.tensor.device), []).append(placeholder)
        items: dict[str, torch.Tensor] = {}
        for (_, device), placeholders in by_storage.items():
            first = placeholders[0]
            if len(placeholders) == 1 and first.item is not None and first.geometry.is_contiguous:
                tensors = [torch.empty(first.geometry.size, dtype=first.geometry.dtype, device=device)]
                stored = {first.item: tensors[0]}
            else:
                tensors, stored = _allocate_shared(placeholders, device)
            for placeholder, tensor in zip(placeholders, tensors, strict=True):
                placeholder.tensor.data = tensor
            if device.type != "meta":
                items.update(stored)
        return items


def _allocate_shared(
    placeholders: list[Placeholder], device: torch.device
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """New tensors for placeholders that share memory, and the items with their values."""
    stored = {one.item: one.geometry.stored() for one in placeholders if one.item is not None}
    filled = max((geometry.end for geometry in stored.values()), default=0)
    if any(one.geometry.end > filled for one in placeholders):
        raise CorruptCheckpointError("The skeleton has a tensor without an item. Use another checkpoint")
    tensors = carve([*(one.geometry for one in placeholders), *stored.values()], device)
    return tensors[: len(placeholders)], dict(zip(stored, tensors[len(placeholders) :], strict=True))


Fetch: TypeAlias = Callable[[Unpacked], None]
"""Allocates the placeholders of an `Unpacked` without a value, and loads their items."""

_reading: ContextVar[tuple[str, Fetch | None]] = ContextVar("reading", default=("the checkpoint", None))


def pack(value: Any) -> Packed:
    """Split an object into items and a skeleton. The object must not change until the result was saved or copied.

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
    what: str = "the checkpoint",
    fetch: Fetch | None = None,
) -> Unpacked:
    """Read a skeleton into an object whose tensors are still empty.

    Args:
        skeleton: one dimension, uint8, on the CPU.
        map_location: as for ``torch.load``; decides the devices of all tensors.
        weights_only: as for ``torch.load``. False runs code that the checkpoint names: use it only for a checkpoint
            that you trust.
        what: name of the checkpoint in errors.
        fetch: called before this returns, for tensors that must have their values before the objects around them are
            rebuilt. Not every skeleton has such tensors.

    Raises:
        UnsupportedCheckpointError: with ``weights_only``, an object is of a class that is not known to be safe; or this
            version does not know the skeleton's format.
        CorruptCheckpointError: this is not a skeleton.
        Whatever ``torch.load`` raises for a missing class or device, and whatever `fetch` raises.
    """
    outer = _reading.set((what, fetch))
    try:
        with CollectorPause():
            loaded = torch.load(io.BytesIO(readable(skeleton)), map_location=map_location, weights_only=weights_only)
            return Unpacked(*_value_and_placeholders(loaded, what))
    except pickle.UnpicklingError as error:
        raise UnsupportedCheckpointError(
            f"{what} holds more than tensors and plain values{_unsafe_classes(skeleton)}, and weights_only is on. If "
            "you trust the checkpoint, load it with weights_only=False, or name its classes with "
            "torch.serialization.add_safe_globals first"
        ) from error
    finally:
        _reading.reset(outer)


def _unsafe_classes(skeleton: torch.Tensor) -> str:
    """The names of the classes that ``weights_only`` refuses, for an error; empty if torch cannot list them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(readable(skeleton)))
    except (EOFError, pickle.UnpicklingError):  # a pickle with an instruction that weights_only does not know
        names = []
    return f" ({', '.join(sorted(names))})" if names else ""


def _value_and_placeholders(loaded: Any, what: str) -> tuple[Any, dict[str, Placeholder]]:
    if not isinstance(loaded, tuple) or len(loaded) < 3:
        raise CorruptCheckpointError(
            f"The skeleton of {what} is not a tuple of a value and a table. Use another checkpoint"
        )
    if (loaded[0], len(loaded)) == (_FIRST_FORMAT, 3):
        _, value, table = loaded
        return value, _placeholders(_rows_of_first_format(table), what)
    if (loaded[0], len(loaded)) != (_FORMAT, 5):
        raise UnsupportedCheckpointError(
            f"The skeleton of {what} has format {loaded[0]!r}; this version knows {_FIRST_FORMAT} and {_FORMAT}. "
            "Upgrade azure-torch-ckpt"
        )
    _, _, value, tensors, rows = loaded
    return value, _placeholders(_rows(tensors, rows), what)


def blank(kind: torch.Tensor, requires_grad: bool = False, is_parameter: bool = False) -> torch.Tensor:
    """A new empty tensor of the dtype and device of `kind`. Skeletons name this function; ``torch.load`` calls it."""
    empty = kind.detach()
    if is_parameter:
        return torch.nn.Parameter(empty, requires_grad)
    return empty.requires_grad_() if requires_grad else empty


def fill_early(tensors: list[torch.Tensor], rows: str) -> None:
    """Give these tensors their values now. Skeletons name this function; ``torch.load`` calls it within `unpack`."""
    what, fetch = _reading.get()
    if fetch is None:
        raise UnsupportedCheckpointError(
            "This is only the skeleton of a checkpoint, without its tensors. Load the checkpoint with "
            "azure_torch_ckpt.lightning"
        )
    fetch(Unpacked(None, _placeholders(_rows(tensors, rows), what)))


# Both are safe: `blank` makes empty tensors, and `fill_early` only does what the running `unpack` asks for.
torch.serialization.add_safe_globals([blank, fill_early])

# Name, tensor, storage, offset, size, stride, item.
_Row: TypeAlias = tuple[str, torch.Tensor, int, int, Sequence[int], Sequence[int], str | None]


def _rows(tensors: list[torch.Tensor], rows: str) -> Iterator[_Row]:
    """The rows that `_Table` has written."""
    for tensor, (name, storage, offset, size, stride, item) in zip(tensors, json.loads(rows), strict=True):
        stride = row_major(size) if stride is None else stride
        yield name, tensor, storage, offset, size, stride, name if item is True else item


def _rows_of_first_format(table: dict[str, list[Any]]) -> Iterator[_Row]:
    for name, (tensor, storage, offset, size, stride, item) in table.items():
        yield name, tensor, storage, offset, size, stride, item


def _placeholders(rows: Iterator[_Row], what: str) -> dict[str, Placeholder]:
    try:
        return {
            name: Placeholder(tensor, Geometry(tensor.dtype, offset, tuple(size), tuple(stride)), storage, item)
            for name, tensor, storage, offset, size, stride, item in rows
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"The skeleton of {what} is damaged: {error}. Use another checkpoint") from error


@dataclass(frozen=True, slots=True)
class _NamedTensor:
    """A tensor that becomes an item, or shares an item's memory."""

    name: str
    tensor: torch.Tensor
    storage: int
    geometry: Geometry


class _Table:
    """The part of a skeleton that describes some tensors: the tensors, and a row for each as JSON."""

    def __init__(self, tensors: list[torch.Tensor], rows: list[list[Any]]) -> None:
        self.tensors = tensors
        self.rows = json.dumps(rows, separators=(",", ":"))


class _Packing:
    """The state of one `pack` while torch.save writes the object."""

    def __init__(self, value: Any) -> None:
        self.items: dict[str, torch.Tensor] = {}
        self._named: dict[int, _NamedTensor] = {}  # by id; holding the tensor keeps the id its own
        self._names = {SKELETON}
        self._storages: dict[tuple[torch.device, int], int] = {}
        self._numbers = itertools.count()
        self._empty: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        walk = TensorWalk(value)
        within_objects = tensors_in(walk.objects)
        pickled = {id(tensor) for tensor in within_objects}
        for name, tensor, within_object in walk.tensors:
            # An object need not pickle what it holds.
            if id(tensor) not in self._named and (not within_object or id(tensor) in pickled):
                self._name(name, tensor, id(tensor) in walk.plain)
        early = {named.storage for tensor in within_objects if (named := self._shared(tensor))}
        by_storage: dict[int, list[_NamedTensor]] = {}
        for named in self._named.values():
            by_storage.setdefault(named.storage, []).append(named)
        self.early = self._table(group for storage, group in by_storage.items() if storage in early) if early else None
        self.late = self._table(group for storage, group in by_storage.items() if storage not in early)

    def reduce(self, thing: Any) -> Any:
        """How to pickle `thing`: a result for `pickle.Pickler.reducer_override`."""
        if isinstance(thing, torch.Tensor):
            return self._placeholder(thing) if id(thing) in self._named else NotImplemented
        if thing is self.early and self.early is not None:
            return fill_early, (self.early.tensors, self.early.rows)
        return NotImplemented

    def _table(self, groups: Iterable[list[_NamedTensor]]) -> _Table:
        """The table of the tensors of some storages. The tensors that must be stored become items."""
        tensors = []
        rows = []
        for group in groups:
            if len(group) == 1:
                (named,) = group
                item_of = {named.geometry: named.name}
            else:
                item_of = {
                    group[at].geometry: group[at].name for at in positions_to_store([named.geometry for named in group])
                }
            for named in group:
                geometry = named.geometry
                item = item_of.get(geometry)
                if item == named.name:
                    self.items[item] = _stored(named)
                stride = None if geometry.is_contiguous else geometry.stride
                tensors.append(named.tensor)
                rows.append(
                    [named.name, named.storage, geometry.offset, geometry.size, stride, item == named.name or item]
                )
        return _Table(tensors, rows)

    def _name(self, name: str, tensor: torch.Tensor, plain: bool) -> _NamedTensor | None:
        """Make the tensor an item, if it can be one."""
        if plain:
            named = _NamedTensor(self._unique(name), tensor, self._storage_of(tensor), Geometry.of(tensor))
        elif is_sharded(tensor):
            named = _NamedTensor(self._unique(name), tensor, next(self._numbers), _geometry_of_whole(tensor))
        else:
            return None
        self._named[id(tensor)] = named
        return named

    def _shared(self, tensor: torch.Tensor) -> _NamedTensor | None:
        """The tensor as an item, if it is an item or lies in the memory of one."""
        named = self._named.get(id(tensor))
        if named is None and not is_sharded(tensor) and is_plain(tensor) and self._is_shared(tensor):
            named = self._name("shared.0", tensor, True)
        return named

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
        """The number of a tensor's storage. A storage without bytes gets a number of its own."""
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
    """A stand-in for the module ``pickle``, for torch.save."""
    # torch makes a subclass for every save, and only the garbage collector frees a class, which may be much later.
    # The class must not hold the tensors until then.
    weakly = weakref.ref(packing)

    class SkeletonPickler(pickle.Pickler):
        def reducer_override(self, thing: Any) -> Any:
            packing = weakly()
            return NotImplemented if packing is None else packing.reduce(thing)

    return types.SimpleNamespace(__name__="pickle", Pickler=SkeletonPickler)


def _geometry_of_whole(tensor: torch.Tensor) -> Geometry:
    """The geometry of the whole tensor, contiguous, that a DTensor's shards make up."""
    return Geometry.of(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def _stored(named: _NamedTensor) -> torch.Tensor:
    if is_sharded(named.tensor):
        return named.tensor
    if named.geometry.is_contiguous:
        return named.tensor.detach()
    stored = named.geometry.stored()
    offset = stored.offset // stored.dtype.itemsize
    return named.tensor.detach().as_strided(stored.size, stored.stride, offset)
