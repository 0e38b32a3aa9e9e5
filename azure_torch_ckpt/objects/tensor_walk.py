"""`TensorWalk`: the tensors that an object holds, in dicts, lists and tuples and in other objects."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict, defaultdict
from typing import Any

import torch

from azure_torch_ckpt.dcp.tensors.memory import is_plain

__all__ = ["TensorWalk", "is_sharded", "tensors_in"]

# Rebuilding one of these does not look at its contents.
_CONTAINERS = (dict, list, tuple, OrderedDict, defaultdict)
_NO_TENSORS = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))


class TensorWalk:
    """Walks through dicts, lists and tuples, and collects the tensors and the other objects in them.

    Attributes:
        tensors: in order, each with its path, and whether it is within an object of a subclass of dict, list or tuple,
            whose rebuilding may look at its contents.
        plain: the ids of the plain tensors.
        objects: all other objects that may hold tensors.
    """

    def __init__(self, value: Any) -> None:
        self.tensors: list[tuple[str, torch.Tensor, bool]] = []
        self.plain: set[int] = set()
        self.objects: list[Any] = []
        seen: set[int] = set()
        stack: list[tuple[str, Any, bool]] = [("", value, False)]
        while stack:
            path, thing, within_object = stack.pop()
            kind = type(thing)
            if kind in _NO_TENSORS:
                continue
            if isinstance(thing, torch.Tensor):
                self.tensors.append((path or "tensor", thing, within_object))
                if not is_sharded(thing):
                    if not is_plain(thing):
                        self.objects.append(thing)
                        continue
                    self.plain.add(id(thing))
                    if thing.__dict__:
                        self.objects.append(thing.__dict__)
                continue
            is_container = isinstance(thing, (dict, list, tuple))
            if kind not in _CONTAINERS:
                self.objects.append(thing)
            elif getattr(thing, "__dict__", None):
                self.objects.append(vars(thing))
            if not is_container or id(thing) in seen:
                continue
            seen.add(id(thing))
            within_object = within_object or kind not in _CONTAINERS
            entries = thing.items() if isinstance(thing, dict) else enumerate(thing)
            named = [(_step(key, number), part) for number, (key, part) in enumerate(entries)]
            stack += [(f"{path}.{step}" if path else step, part, within_object) for step, part in reversed(named)]


def tensors_in(objects: list[Any]) -> list[torch.Tensor]:
    """The tensors that objects of any class hold: those that pickling the objects reaches."""
    if not objects:
        return []
    finder = _TensorFinder(_NullStream(), protocol=2)
    finder.dump(objects)
    return finder.tensors


class _TensorFinder(pickle.Pickler):
    """Collects the tensors that may be items. Of a special tensor it reaches the plain tensors that it consists of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tensors: list[torch.Tensor] = []

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor) and (is_sharded(thing) or is_plain(thing)):
            self.tensors.append(thing)
            return int, ()
        return NotImplemented

    def persistent_id(self, thing: Any) -> Any:
        return 0 if isinstance(thing, torch.storage.TypedStorage) or torch.is_storage(thing) else None


class _NullStream:
    def write(self, data: Any) -> int:
        return len(data)


def _step(key: Any, number: int) -> str:
    """A key as part of a name: as in torch's own names if it is a string or a number, else its position."""
    return str(key) if isinstance(key, (str, int, float)) else str(number)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a DTensor, without importing DTensor's module, which takes seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
