"""The names that a checkpoint's ``.metadata`` may use, and the pickle opcodes of plain values: what each stands for.

A name in the data is a key of the tables here and is never looked up in a module. Behind it stands a value (a dtype) or
a :class:`Known`: a class whose instances get state, or a constructor that checks its arguments.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

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

from azure_torch_ckpt._internal.torch_private import MemoryFormatEncoding, StorageInfo

__all__ = [
    "KNOWN",
    "NUMBERS",
    "PLAIN",
    "SIZED",
    "STATE_CLASSES",
    "TENSOR_PROPERTIES",
    "ForbiddenUse",
    "Known",
    "NewerTorch",
    "is_newer_torch",
    "opted_in",
    "quote",
    "set_any_state",
]

_MAX_DIMENSIONS = 1024  # of a tensor: most kernels of torch stop at 64, and so many are what hashing an index can cost
_CHECKPOINT = "torch.distributed.checkpoint"
_DTYPE_NAME = re.compile(r"[a-z]{3,9}[0-9][a-z0-9_]*")


class ForbiddenUse(Exception):
    """A known function was called with arguments that metadata never gives it."""


class NewerTorch(Exception):
    """The data names a part of torch that this version does not have."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Stands for a class or function on the machine's stack; inert unless the machine acts on it.

    Attributes:
        name: its full name in the data.
        new: the class that the data may make bare instances of, or None.
        call: makes the value from the arguments of a call, or None.
    """

    name: str
    new: type[Any] | None = None
    call: Callable[[tuple[Any, ...]], object] | None = None


def quote(value: object) -> str:
    """Format a value for a message: on one line and short, whatever is in the data."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 200 else f"{value[:200]!r}..."
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print very long ones
    return str(value) if isinstance(value, int) or value is None else f"an object of type {type(value).__name__}"


def opted_in() -> dict[str, Any]:
    """Return what the user registered with ``torch.serialization.add_safe_globals``, by its name in a pickle."""
    found = {}
    for entry in torch.serialization.get_safe_globals():
        obj, name = entry if isinstance(entry, tuple) else (entry, f"{entry.__module__}.{entry.__qualname__}")
        # torch registers classes of its own for torch.load; to construct one of them, DeviceMesh, starts process
        # groups. The other modules are those that torch.load never takes from the list either.
        if name.partition(".")[0] not in ("torch", "os", "posix", "nt", "sys"):
            found[name] = obj
    return found


def set_any_state(target: Any, state: Any) -> None:
    """Set the state of an instance of a class that the user registered, by the rule of ``pickle``."""
    if hasattr(target, "__setstate__"):
        target.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        target.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        setattr(target, name, value)


def is_newer_torch(module: str, name: str) -> bool:
    """Whether an unknown name looks like one that a newer torch added to its checkpoints."""
    if (module == _CHECKPOINT or module.startswith(f"{_CHECKPOINT}.")) and name.isidentifier():
        while module not in sys.modules:
            module, _, name = module.rpartition(".")
        return name not in vars(sys.modules[module])
    return module == "torch" and _DTYPE_NAME.fullmatch(name) is not None and name not in vars(torch)


def _size(args: tuple[Any, ...]) -> torch.Size:
    (dimensions,) = args
    if type(dimensions) not in (tuple, list) or len(dimensions) > _MAX_DIMENSIONS:
        raise TypeError("a torch.Size is not made of a short tuple")
    return torch.Size(dimensions)


_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


def _layout(args: tuple[Any, ...]) -> torch.layout:
    (name,) = args
    if type(name) is not str:
        raise TypeError("a layout's name is not a string")
    if name not in _LAYOUTS:
        raise NewerTorch(name)
    return _LAYOUTS[name]


def _memory_format(args: tuple[Any, ...]) -> MemoryFormatEncoding:
    (value,) = args
    if type(value) is not int:
        raise TypeError("a memory format is not a number")
    return MemoryFormatEncoding(value)


_MEMORY_FORMAT = Known(f"{_CHECKPOINT}.metadata._MEM_FORMAT_ENCODING", call=_memory_format)


def _getattr(args: tuple[Any, ...]) -> MemoryFormatEncoding:
    # Early releases of Python 3.11 pickled an enum's member as getattr(cls, name).
    if len(args) != 2 or args[0] is not _MEMORY_FORMAT or type(args[1]) is not str:
        raise ForbiddenUse
    return MemoryFormatEncoding[args[1]]


def _ordered_dict(args: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    if args:
        raise ForbiddenUse  # picklers make it empty and set its items
    return OrderedDict()


def _pure_path(flavour: type[pathlib.PurePath]) -> Callable[[tuple[Any, ...]], pathlib.PurePath]:
    def make(args: tuple[Any, ...]) -> pathlib.PurePath:
        if not all(type(part) is str for part in args):
            raise TypeError("a path is not made of strings")
        return flavour(*args)

    return make


def _metadata(args: tuple[Any, ...]) -> Metadata:
    # How a `views.ColumnMetadata` is pickled by another writer.
    if len(args) != 1 or type(args[0]) is not dict:
        raise ForbiddenUse
    return Metadata(args[0])


# Classes that take a state, each with the fields that older pickles may lack and that no class attribute stands in for.
STATE_CLASSES: dict[type[Any], list[tuple[str, Callable[[], Any]]]] = {
    cls: [
        (field.name, field.default_factory)
        for field in dataclasses.fields(cls)
        if field.default_factory is not dataclasses.MISSING
    ]
    for cls in (
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
        BytesStorageMetadata,
        ChunkStorageMetadata,
        TensorProperties,
        StorageMeta,
        StorageInfo,
    )
}

# Fields of the state that a TensorProperties takes. torch unpacks exactly as many; a newer torch appends its own.
TENSOR_PROPERTIES = len(dataclasses.fields(TensorProperties))


def _known() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {
        ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
    }
    known["torch", "Size"] = Known("torch.Size", call=_size)
    known["torch.serialization", "_get_layout"] = Known("torch.serialization._get_layout", call=_layout)
    known["collections", "OrderedDict"] = Known("collections.OrderedDict", call=_ordered_dict)
    # Protocol 2 gives the module its old name.
    known["builtins", "getattr"] = known["__builtin__", "getattr"] = Known("builtins.getattr", call=_getattr)
    # FileSystemWriter stores the directory as a Path. The Path of another system cannot be instantiated here, and the
    # file system behind it is not needed. Python 3.13 calls the module pathlib._local.
    for flavour in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
        for name in (flavour.__name__, flavour.__name__.removeprefix("Pure")):
            path = Known(f"pathlib.{name}", call=_pure_path(flavour))
            known["pathlib", name] = known["pathlib._local", name] = path
    # torch 1.13 had the package under _shard; torch 2.0 to 2.2 took TensorProperties from sharded_tensor.
    for package in (_CHECKPOINT, "torch.distributed._shard.checkpoint"):
        for cls in STATE_CLASSES:
            module = f"{package}.{'filesystem' if cls is StorageInfo else 'metadata'}"
            call = _metadata if cls is Metadata else None
            known[module, cls.__name__] = Known(f"{module}.{cls.__name__}", new=cls, call=call)
        known[f"{package}.metadata", MemoryFormatEncoding.__name__] = _MEMORY_FORMAT
    sharded = "torch.distributed._shard.sharded_tensor.metadata"
    known[sharded, "TensorProperties"] = Known(f"{sharded}.TensorProperties", new=TensorProperties)
    known[sharded, "MEM_FORMAT_ENCODING"] = _MEMORY_FORMAT
    return known


KNOWN = _known()


# Opcodes that stand for a value of their own.
PLAIN: dict[int, Callable[[], Any]] = {
    pickle.NONE[0]: lambda: None,
    pickle.NEWTRUE[0]: lambda: True,
    pickle.NEWFALSE[0]: lambda: False,
    pickle.EMPTY_LIST[0]: list,
    pickle.EMPTY_SET[0]: set,
}
NUMBERS = {
    pickle.BININT[0]: struct.Struct("<i"),
    pickle.BININT2[0]: struct.Struct("<H"),
    pickle.BINFLOAT[0]: struct.Struct(">d"),
}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")  # as pickle encodes it


def _long(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


# Opcodes whose argument begins with its length: the length's width in bytes, what the bytes become.
SIZED: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    pickle.LONG1[0]: (1, _long),
    pickle.LONG4[0]: (4, _long),
    pickle.BINUNICODE[0]: (4, _text),
    pickle.BINUNICODE8[0]: (8, _text),
    pickle.SHORT_BINBYTES[0]: (1, bytes),
    pickle.BINBYTES[0]: (4, bytes),
    pickle.BINBYTES8[0]: (8, bytes),
    pickle.BYTEARRAY8[0]: (8, bytearray),
}
