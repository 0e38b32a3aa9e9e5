"""States of modules and optimizers, the same on any number of ranks: as in one process, but for DTensors in them.

An optimizer's state has its parameters by number, in the order of its parameter groups, as ``torch.optim`` has it in
one process. That is the only form that is saved. The other one, by name, which ``get_optimizer_state_dict`` and FSDP
make and take, is recognised when it is loaded.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from azure_torch_ckpt.errors import UnsupportedCheckpointError
from azure_torch_ckpt.objects.sharded import Place

__all__ = ["FsdpStates", "States", "by_name", "by_number", "gathered", "is_by_name"]

_State = dict[str, Any]


class States:
    """For modules whose parameters are plain tensors (DDP) or DTensors (``fully_shard``, tensor parallelism)."""

    def of_module(self, module: nn.Module) -> _State:
        return module.state_dict()

    def of_optimizer(self, module: nn.Module, optimizer: Optimizer) -> _State:
        return optimizer.state_dict()

    def module_places(self, saved: _State, module: nn.Module) -> Iterator[Place]:
        """Where in a module's loaded state there are to be DTensors."""
        for name, tensor in self.of_module(module).items():
            if isinstance(tensor, DTensor) and isinstance(saved.get(name), torch.Tensor):
                yield Place(saved, name, tensor)

    def optimizer_places(self, saved: _State, module: nn.Module, optimizer: Optimizer) -> Iterator[Place]:
        """Where in an optimizer's loaded state there are to be DTensors."""
        if any(isinstance(parameter, DTensor) for parameter in _parameters(optimizer)):
            yield from _places_of(saved, itertools.chain(*self.names(module, optimizer)), _parameters(optimizer))

    def load_module(self, module: nn.Module, saved: _State, strict: bool) -> None:
        state = self.of_module(module)
        loaded = copy.copy(saved)  # with the attribute `_metadata`, the versions of the submodules
        loaded.update({name: _as(value, state.get(name)) for name, value in saved.items()})
        module.load_state_dict(loaded, strict=strict)

    def load_optimizer(self, module: nn.Module, optimizer: Optimizer, saved: _State) -> None:
        """Load the state, by number or by name.

        Raises:
            UnsupportedCheckpointError: it is by name, and lacks a parameter that the optimizer has.
            ValueError: the optimizer has other groups or other numbers of parameters.
        """
        if is_by_name(saved):
            saved = by_number(saved, self.names(module, optimizer))
        parameters = [*_parameters(optimizer)]
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            saved = _copied(saved)
            for holder, key, number in _parts_of(saved):
                if isinstance(number, int) and number < len(parameters):
                    holder[key] = _as(holder[key], parameters[number])
        optimizer.load_state_dict(saved)

    def names(self, module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
        """The names of the parameters of each of an optimizer's groups; "" for one that is not the module's."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return [[names.get(id(one), "") for one in group["params"]] for group in optimizer.param_groups]


class FsdpStates(States):
    """For modules in `torch.distributed.fsdp.FullyShardedDataParallel`, given a ``device_mesh``: DTensors, too."""

    def of_module(self, module: nn.Module) -> _State:
        with _sharded(module):
            return module.state_dict()

    def of_optimizer(self, module: nn.Module, optimizer: Optimizer) -> _State:
        with _sharded(module):
            state = FullyShardedDataParallel.optim_state_dict(module, optimizer)
        return by_number(state, [group["params"] for group in state["param_groups"]])

    def optimizer_places(self, saved: _State, module: nn.Module, optimizer: Optimizer) -> Iterator[Place]:
        tensors = self.of_module(module)
        names = [*itertools.chain(*self.names(module, optimizer))]
        yield from _places_of(saved, names, [tensors.get(name) for name in names])

    def load_module(self, module: nn.Module, saved: _State, strict: bool) -> None:
        with _sharded(module):
            super().load_module(module, saved, strict)

    def load_optimizer(self, module: nn.Module, optimizer: Optimizer, saved: _State) -> None:
        groups = self.names(module, optimizer)
        state = by_name(by_number(saved, groups) if is_by_name(saved) else saved, groups)
        with _sharded(module):
            loaded = FullyShardedDataParallel.optim_state_dict_to_load(module, optimizer, state)
        optimizer.load_state_dict(loaded)

    def names(self, module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
        with _sharded(module):
            state = FullyShardedDataParallel.optim_state_dict(module, optimizer)
        return [group["params"] for group in state["param_groups"]]


def is_by_name(state: Any) -> bool:
    """Whether an optimizer's state has its parameters by name.

    The state may be of any form: an optimizer that wraps another one keeps that one's state somewhere in its own.
    """
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return False
    names = [name for group in groups for name in group.get("params", ())]
    return bool(names) and all(isinstance(name, str) for name in names)


def by_number(state: _State, groups: list[list[str]]) -> _State:
    """An optimizer's state with its parameters by number, of one that has them by name.

    Entries that belong to no parameter stay.

    Args:
        groups: the names of the parameters of each group that the optimizer has now.

    Raises:
        UnsupportedCheckpointError: the state knows nothing of one of them.
    """
    group_of = {name: group for group in state["param_groups"] for name in group["params"]}
    numbers: dict[str, int] = {}
    numbered_groups = []
    for group in groups:
        unknown = [name for name in group if name not in group_of]
        if unknown:
            raise UnsupportedCheckpointError(
                f"The checkpoint's optimizer has no parameter {unknown[0]!r}. Load it with an optimizer of the "
                "parameters that it was saved with"
            )
        numbers.update({name: number for number, name in enumerate(group, start=len(numbers))})
        saved = group_of[group[0]] if group else {}
        numbered_groups.append({**saved, "params": [numbers[name] for name in group]})
    states = state.get("state", {})
    numbered = {numbers[name]: value for name, value in states.items() if name in numbers}
    others = {name: value for name, value in states.items() if name not in group_of}
    return {**state, "state": {**dict(sorted(numbered.items())), **others}, "param_groups": numbered_groups}


def by_name(state: _State, groups: list[list[str]]) -> _State:
    """An optimizer's state by number, with the names of its parameters instead; `groups` as for `by_number`.

    One of an optimizer that keeps its state in a form of its own comes back as it is.
    """
    if not {"state", "param_groups"} <= state.keys():
        return state
    names = dict(enumerate(name for group in groups for name in group))
    return {
        **state,
        "state": {names.get(number, number): value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def gathered(state: Any, keep: bool) -> Any:
    """A state with whole CPU tensors in place of DTensors; only where `keep`, for they may need much memory."""
    if isinstance(state, DTensor):
        whole = state.full_tensor().detach()
        return whole.cpu() if keep else whole.new_empty(0)
    if isinstance(state, dict):
        copied = copy.copy(state)
        copied.update({key: gathered(value, keep) for key, value in state.items()})
        return copied
    if type(state) in (list, tuple):
        return type(state)(gathered(value, keep) for value in state)
    return state


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _places_of(saved: Any, names: Iterable[str], likes: Iterable[Any]) -> Iterator[Place]:
    """The places for DTensors in an optimizer's state; `likes` are DTensors for those parameters that have one."""
    by_key: dict[Any, Any] = {}
    for number, (name, like) in enumerate(zip(names, likes, strict=True)):
        by_key[number] = by_key[name] = like
    for holder, key, parameter in _parts_of(saved):
        like = by_key.get(parameter)
        if isinstance(like, DTensor):
            yield Place(holder, key, like, other_shapes=True)


def _parts_of(state: Any) -> Iterator[tuple[dict[Any, Any], Any, Any]]:
    """The tensors that an optimizer's state has of single parameters: each as a dict, a key, the parameter's key.

    A parameter's entry is a dict of tensors. It may lie deeper, in the state of an optimizer within an optimizer.
    """
    if not isinstance(state, dict):
        return
    for parameter, entry in [*state.items()]:
        if not isinstance(entry, dict):
            continue
        for key, value in [*entry.items()]:
            # torch.optim keeps its count of steps on the CPU, whatever the parameter is.
            if isinstance(value, torch.Tensor) and key != "step":
                yield entry, key, parameter
        yield from _parts_of(entry)


def _copied(state: Any) -> Any:
    """The state with dicts of its own."""
    if not isinstance(state, dict):
        return state
    copied = copy.copy(state)
    copied.update({key: _copied(value) for key, value in state.items()})
    return copied


def _as(value: Any, like: Any) -> Any:
    """A whole tensor as a DTensor, where the module has one."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or not isinstance(value, torch.Tensor):
        return value
    if value.shape != like.shape:
        return value
    return distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)


def _sharded(module: nn.Module) -> AbstractContextManager[Any]:
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(offload_to_cpu=True),
        ShardedOptimStateDictConfig(offload_to_cpu=True),
    )
