"""The keys of a state dict, as a save plan names them."""

from __future__ import annotations

import dataclasses

from torch.distributed.checkpoint.planner import SavePlan

from azure_torch_ckpt.errors import CheckpointError

__all__ = ["with_plain_names"]


def with_plain_names(plan: SavePlan) -> SavePlan:
    """The plan with every name a ``str`` and not of a subclass, whose name no reader's process might know.

    Raises:
        CheckpointError: a key of the state dict is no string. torch's ``DefaultSavePlanner`` makes strings of all keys
            unless it is told not to flatten the state dict.
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
