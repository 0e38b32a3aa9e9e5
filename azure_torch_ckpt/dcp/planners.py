"""What planners of torch are known for, and others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

__all__ = ["keeps_its_memory", "takes_any_order"]

_Methods = Mapping[str, Callable[..., Any]]


def _methods(kind: type, *names: str) -> _Methods:
    return {name: vars(kind)[name] for name in names}


# As they are before anybody patches the classes.
_LOADS = _methods(
    DefaultLoadPlanner, "load_bytes", "resolve_tensor", "commit_tensor", "lookup_tensor", "transform_tensor"
)
_SAVES = _methods(DefaultSavePlanner, "resolve_data", "lookup_object", "transform_object")


def takes_any_order(planner: LoadPlanner) -> bool:
    """Whether the planner gives tensors of the state dict itself, and does nothing when they are filled.

    torch's readers resolve, fill and commit one item after the other, and a planner may rely on that: it may give the
    same scratch memory for every item, and copy from it when the item is committed.
    """
    return _has(planner, _LOADS)


def keeps_its_memory(planner: SavePlanner) -> bool:
    """Whether the planner gives tensors of the state dict itself, so that each stays as it is until the save ends.

    torch's writers are done with an item before they ask for the next, and a planner may give the same memory again.
    """
    return _has(planner, _SAVES)


def _has(planner: object, methods: _Methods) -> bool:
    """Whether the planner has these very functions, from whatever class: subclasses may change other methods."""
    kind = type(planner)
    return (
        kind.__getattribute__ is object.__getattribute__
        and methods.keys().isdisjoint(getattr(planner, "__dict__", ()))
        and all(
            getattr(kind, name, None) is method and method.__module__.startswith("torch.")
            for name, method in methods.items()
        )
    )
