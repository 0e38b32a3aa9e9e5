"""Inert stand-ins for what a ``.metadata`` names and this package does not know: classes of planners and trainers.

Trainers keep their own objects in torch's ``Metadata``: their plans as an attribute, a subclass of ``Metadata`` itself.
No load needs those. So a class that is not known is represented by a :class:`ForeignClass` and each of its instances by
a :class:`Foreign`, which remember a name and do nothing. :func:`settle` removes those that no load uses, and names one
where a load would use it.

A name is still never looked up in a module. A name is acceptable here if it has the form of a class name and is not
one of Python's standard library, except for plain values. That does not make data safe: a stand-in is as inert for a
hostile class as for any other. Names of functions remain an error, which `Refusals` raises: hostile data is reported.
"""

from __future__ import annotations

import dataclasses
import pickletools
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from azure_torch_ckpt._internal.torch_private import StorageInfo
from azure_torch_ckpt.dcp.metadata.vocabulary import STATE_CLASSES, Known, is_newer_torch, quote
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError

__all__ = ["Foreign", "ForeignClass", "Refusals", "known_base", "may_be_foreign", "settle"]

_CLASS_NAME = re.compile(r"_*[A-Z]\w*(?:\._*[A-Z]\w*)*")

# Classes of the standard library whose instances are plain values; and of torch and NumPy what does not look like a
# class, and is in the pickles of devices, tensors, arrays and scalars.
_VALUES: frozenset[tuple[str, str]] = frozenset(
    (module, name)
    for modules, names in {
        "builtins __builtin__": "bool bytearray bytes complex dict float frozenset int list object range set slice str "
        "tuple xrange",
        "collections": "Counter UserDict UserList defaultdict deque",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "uuid": "SafeUUID UUID",
        "types": "SimpleNamespace",
        "argparse": "Namespace",
        "torch": "device",
        "torch._utils": "_rebuild_parameter _rebuild_tensor_v2",
        "torch.storage": "_load_from_bytes",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric numpy._core.numeric": "_frombuffer",
    }.items()
    for module in modules.split()
    for name in names.split()
)
_VALUE_TYPES = frozenset({str, int, float, bytes})

# The fields that show from which of torch's classes the class of an instance was derived.
_SIGNATURES: dict[type[Any], frozenset[str]] = {
    Metadata: frozenset({"state_dict_metadata", "planner_data", "storage_data"}),
    MetadataIndex: frozenset({"fqn", "index"}),
    TensorStorageMetadata: frozenset({"properties", "size", "chunks"}),
    ChunkStorageMetadata: frozenset({"offsets", "sizes"}),
    StorageMeta: frozenset({"checkpoint_id", "save_id"}),
    StorageInfo: frozenset({"relative_path", "offset", "length"}),
}
_FIELDS = {cls: tuple(field.name for field in dataclasses.fields(cls)) for cls in STATE_CLASSES}


@dataclasses.dataclass(frozen=True, slots=True)
class ForeignClass:
    """Stands for a class that is not known."""

    module: str
    name: str

    @property
    def is_newer(self) -> bool:
        """Whether a newer torch has it; then the meaning of its instances is unknown."""
        return is_newer_torch(self.module, self.name)

    def new(self, args: tuple[Any, ...]) -> Any:
        """Make what stands for ``cls.__new__(cls, *args)``.

        An instance of a subclass of str, int, float or bytes is made of its value; it reads as that value.
        """
        if len(args) == 1 and type(args[0]) in _VALUE_TYPES:
            return args[0]
        return Foreign(self, bare=not args)

    def call(self, args: tuple[Any, ...]) -> Foreign:
        """Make what stands for ``cls(*args)``, which is also how a member of an enum is pickled: by its value."""
        return Foreign(self, value=args[0] if len(args) == 1 and type(args[0]) in _VALUE_TYPES else None)

    def member(self, name: str) -> ForeignClass | Foreign:
        """Make what stands for ``getattr(cls, name)``, by which picklers name inner classes and members of enums."""
        inner = f"{self.name}.{name}"
        return ForeignClass(self.module, inner) if may_be_foreign(self.module, inner) else Foreign(self)


class Foreign:
    """Stands for an instance of a class that is not known. It keeps none of its state.

    Once its state shows that its class was derived from one of torch's, it becomes an instance of that one.

    Attributes:
        value: of what may be a member of an enum.
        bare: it was made without arguments, and got no state.
    """

    made_of: ForeignClass
    value: Any
    bare: bool

    def __init__(self, made_of: ForeignClass, *, value: Any = None, bare: bool = False) -> None:
        self.made_of = made_of
        self.value = value
        self.bare = bare

    def become(self, cls: type[Any]) -> None:
        """Become an instance of `cls` without state."""
        self.__dict__.clear()
        self.__class__ = cls

    def __repr__(self) -> str:
        return f"an instance of {quote(f'{self.made_of.module}.{self.made_of.name}')}"


def may_be_foreign(module: str, name: str) -> bool:
    """Whether an unknown name may be a class of a planner or a trainer, or a plain value."""
    if (module, name) in _VALUES:
        return True
    return module.partition(".")[0] not in _STANDARD and _CLASS_NAME.fullmatch(name) is not None


_STANDARD = sys.stdlib_module_names | {"", "__builtin__"}


def known_base(state: Any) -> tuple[type[Any], Any] | None:
    """Find the class of torch that a class with such a state was derived from, and the state as that one takes it."""
    if type(state) is tuple:
        if len(state) == 2:  # attributes, and the values of slots, which torch's classes have none of
            return known_base(state[0]) if type(state[0]) is dict else None
        is_properties = len(state) >= 5 and isinstance(state[0], torch.dtype)
        return (TensorProperties, state) if is_properties else None
    if type(state) is dict:
        for cls, signature in _SIGNATURES.items():
            if signature <= state.keys():
                return cls, state
    return None


def settle(metadata: Metadata, given: Mapping[int, list[Any]]) -> ForeignClass | None:
    """Remove from `metadata` what is foreign and not needed by a load; return a class whose instance a load would use.

    Args:
        given: what was put into instances of classes that the user registered, by the id of the instance.
    """
    seen: set[int] = set()
    state = vars(metadata)
    for name in state.keys() - set(_FIELDS[Metadata]):
        if _foreign_in(state[name], given, set()) is not None:
            del state[name]
    for name in ("version", "storage_meta"):
        if type(state.get(name)) is Foreign:
            state[name] = None
    if isinstance(meta := state.get("storage_meta"), StorageMeta):
        for name, value in vars(meta).items():
            if _foreign_in(value, given, set()) is not None:
                meta.__dict__[name] = None
    for name in ("state_dict_metadata", "storage_data"):
        mapping: Any = state.get(name)
        if (found := _class_of(mapping)) is not None:
            return found
        for key, value in mapping.items() if type(mapping) in (dict, OrderedDict) else ():
            if name == "state_dict_metadata" and type(value) is Foreign and value.bare and not value.made_of.is_newer:
                value.become(BytesStorageMetadata)  # it has no state that would show its base
            elif (found := _class_of(key) or _foreign_in(value, given, seen)) is not None:
                return found
    return _settle_paths(state, given, seen)


def _settle_paths(state: dict[str, Any], given: Mapping[int, list[Any]], seen: set[int]) -> ForeignClass | None:
    data = state.get("planner_data")
    if type(data) is not dict:
        return _foreign_in(data, given, seen)
    for key, path in data.items():
        # A key of the state dict that is a member of an enum of strings is its string.
        if type(path) is tuple and any(type(step) is Foreign and step.value is not None for step in path):
            data[key] = path = tuple(step.value if type(step) is Foreign else step for step in path)
        found = _class_of(key) or _foreign_in(path, given, seen)
        if found is not None:
            return found
    return None


def _class_of(value: Any) -> ForeignClass | None:
    if type(value) is Foreign:
        return value.made_of
    return value if type(value) is ForeignClass else None


def _foreign_in(value: Any, given: Mapping[int, list[Any]], seen: set[int]) -> ForeignClass | None:
    """Find the first foreign object in `value`, without recursion, looking into each container once."""
    left = [value]
    while left:
        here = left.pop()
        cls = type(here)
        if cls is str or cls is int:
            continue
        if (found := _class_of(here)) is not None:
            return found
        inside: Iterable[Any] = ()
        if cls in (tuple, list, set, frozenset):
            inside = here
        elif cls is dict or cls is OrderedDict:
            inside = (*here, *here.values())
        elif cls in STATE_CLASSES:
            inside = [value for name, value in vars(here).items() if name in _FIELDS[cls]]  # loads use no others
        elif id(here) in given:
            inside = given[id(here)]
        else:
            continue
        if id(here) not in seen:
            seen.add(id(here))
            left.extend(inside)
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Refusals:
    """Raises the errors for one pickle of `length` bytes, which `where` names in messages."""

    where: str
    length: int

    def corrupt(self, pos: int, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise CorruptCheckpointError(
            f"{self.where} is not readable as checkpoint metadata: {reason[:300]} (at byte {pos} of "
            f"{self.length}). It is cut short, damaged or not a .metadata; restore it or use another checkpoint."
        ) from cause

    def refuse_opcode(self, op: int, pos: int) -> NoReturn:
        name = next((known.name for known in pickletools.opcodes if ord(known.code) == op), None)
        if name is None:
            self.corrupt(pos, f"byte 0x{op:02x} is not a pickle opcode")
        raise UnsafeMetadataError(
            f"{self.where} uses the pickle opcode {name} at byte {pos}, which metadata never needs. It is "
            "damaged or was made to do harm; nothing of it was run. Use another checkpoint."
        )

    def refuse_use(self, target: object, verb: str) -> NoReturn:
        what = target.name if type(target) is Known else f"an object of type {type(target).__name__}"
        raise UnsafeMetadataError(
            f"{self.where} {verb} {what} in a way that metadata never does. It is damaged or was made to do harm; "
            "that was not done. Use another checkpoint."
        )

    def refuse_class(self, found: ForeignClass) -> NoReturn:
        name = f"{found.module}.{found.name}"
        if found.is_newer:
            self.refuse_newer(name)
        self.refuse_name(name)

    def refuse_newer(self, name: str) -> NoReturn:
        raise UnsupportedCheckpointError(
            f"{self.where} names {quote(name)}, which torch {torch.__version__} does not have: it was written by a "
            "newer torch. Upgrade torch."
        )

    def refuse_name(self, name: str) -> NoReturn:
        raise UnsafeMetadataError(
            f"{self.where} names {quote(name)}, which is not part of a checkpoint's metadata; to load it would run "
            "code that the writer of the blob has chosen. It was not run. If your own planner put it there and you "
            "trust the checkpoint, register it with torch.serialization.add_safe_globals before you load (names under "
            "torch, os and sys cannot be registered); otherwise use another checkpoint."
        )
