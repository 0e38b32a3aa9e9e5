"""What planners may do: which of them keep to the order and the memory of torch's, and which keys their plans have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlan, SavePlanner

from azure_torch_ckpt.errors import CheckpointError

__all__ = ["keeps_its_memory", "takes_any_order", "with_plain_keys"]

_Methods = Mapping[str, Callable[..., Any]]


def _methods(kind: type, *names: str) -> _Methods:
    return {name: vars(kind)[name] for name in names}


# As they are before the classes are patched.
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

    torch's writers have written an item before they ask for the next, and a planner may give the same memory again.
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


def with_plain_keys(plan: SavePlan) -> SavePlan:
    """Return the plan with every key a ``str``, and not of a subclass, which a reader's process might not have.

    Raises:
        CheckpointError: a key is not a string. torch's planner makes strings of all keys if it flattens the state dict.
    """
    if {type(item.index.fqn) for item in plan.items} <= {str}:
        return plan
    items = []
    for item in plan.items:
        name: object = item.index.fqn
        if not isinstance(name, str):
            raise CheckpointError(
                f"The state dict has the key {repr(name)[:200]}, of type {type(name).__name__}, and keys of a "
                "checkpoint are strings. Rename it, or let the planner flatten the state dict"
            )
        if type(name) is not str:
            item = dataclasses.replace(item, index=dataclasses.replace(item.index, fqn=str.__str__(name)))
        items.append(item)
    return dataclasses.replace(plan, items=items)
