"""States of modules and optimizers in one form for any number of ranks: as in one process, except for DTensors in them.

A saved optimizer state has its parameters by number, in the order of its parameter groups, as ``torch.optim`` has them
in one process. The form by name, which ``get_optimizer_state_dict`` and FSDP use, is recognised on loading.
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
from azure_torch_ckpt.objects.sharded import DTensorEntry

__all__ = ["FsdpStates", "States", "by_name", "by_number", "gathered", "is_by_name"]

_State = dict[str, Any]


class States:
    """For modules whose parameters are plain tensors (DDP) or DTensors (``fully_shard``, tensor parallelism)."""

    def of_module(self, module: nn.Module) -> _State:
        return module.state_dict()

    def of_optimizer(self, module: nn.Module, optimizer: Optimizer) -> _State:
        return optimizer.state_dict()

    def module_dtensors(self, saved: _State, module: nn.Module) -> Iterator[DTensorEntry]:
        """The entries of a module's loaded state that become DTensors."""
        for name, tensor in self.of_module(module).items():
            if isinstance(tensor, DTensor) and isinstance(saved.get(name), torch.Tensor):
                yield DTensorEntry(saved, name, tensor)

    def optimizer_dtensors(self, saved: _State, module: nn.Module, optimizer: Optimizer) -> Iterator[DTensorEntry]:
        """The entries of an optimizer's loaded state that become DTensors."""
        if any(isinstance(parameter, DTensor) for parameter in _parameters(optimizer)):
            yield from _dtensor_entries(saved, itertools.chain(*self.names(module, optimizer)), _parameters(optimizer))

    def load_module(self, module: nn.Module, saved: _State, strict: bool) -> None:
        state = self.of_module(module)
        loaded = copy.copy(saved)  # with the attribute `_metadata`, the versions of the submodules
        loaded.update({name: _as(value, state.get(name)) for name, value in saved.items()})
        module.load_state_dict(loaded, strict=strict)

    def load_optimizer(self, module: nn.Module, optimizer: Optimizer, saved: _State) -> None:
        """Load a state, by number or by name, into the optimizer.

        Raises:
            UnsupportedCheckpointError: the state is by name, and lacks a parameter of the optimizer.
            ValueError: the optimizer has other groups or other numbers of parameters.
        """
        if is_by_name(saved):
            saved = by_number(saved, self.names(module, optimizer))
        parameters = [*_parameters(optimizer)]
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            saved = _copied(saved)
            for holder, key, number in _parameter_tensors(saved):
                if isinstance(number, int) and number < len(parameters):
                    holder[key] = _as(holder[key], parameters[number])
        optimizer.load_state_dict(saved)

    def names(self, module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
        """The names of the parameters in each of an optimizer's groups; "" for one that the module does not have."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return [[names.get(id(one), "") for one in group["params"]] for group in optimizer.param_groups]


class FsdpStates(States):
    """For modules in `FullyShardedDataParallel` (FSDP1) with a ``device_mesh``; their states have DTensors, too."""

    def of_module(self, module: nn.Module) -> _State:
        with _sharded(module):
            return module.state_dict()

    def of_optimizer(self, module: nn.Module, optimizer: Optimizer) -> _State:
        with _sharded(module):
            state = FullyShardedDataParallel.optim_state_dict(module, optimizer)
        return by_number(state, [group["params"] for group in state["param_groups"]])

    def optimizer_dtensors(self, saved: _State, module: nn.Module, optimizer: Optimizer) -> Iterator[DTensorEntry]:
        tensors = self.of_module(module)
        names = [*itertools.chain(*self.names(module, optimizer))]
        yield from _dtensor_entries(saved, names, [tensors.get(name) for name in names])

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

    The state may have any form: an optimizer that wraps another one keeps that one's state somewhere in its own.
    """
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return False
    names = [name for group in groups for name in group.get("params", ())]
    return bool(names) and all(isinstance(name, str) for name in names)


def by_number(state: _State, groups: list[list[str]]) -> _State:
    """Convert an optimizer's state by name to one by number. Entries that belong to no parameter stay.

    Args:
        groups: the names of the parameters in each of the optimizer's present groups.

    Raises:
        UnsupportedCheckpointError: the state lacks one of these parameters.
    """
    group_of = {name: group for group in state["param_groups"] for name in group["params"]}
    numbers: dict[str, int] = {}
    numbered_groups = []
    for group in groups:
        unknown = [name for name in group if name not in group_of]
        if unknown:
            raise UnsupportedCheckpointError(
                f"The checkpoint's optimizer has no parameter {unknown[0]!r}. Load it with an optimizer that has the "
                "same parameters as when it was saved"
            )
        numbers.update({name: number for number, name in enumerate(group, start=len(numbers))})
        saved = group_of[group[0]] if group else {}
        numbered_groups.append({**saved, "params": [numbers[name] for name in group]})
    states = state.get("state", {})
    numbered = {numbers[name]: value for name, value in states.items() if name in numbers}
    others = {name: value for name, value in states.items() if name not in group_of}
    return {**state, "state": {**dict(sorted(numbered.items())), **others}, "param_groups": numbered_groups}


def by_name(state: _State, groups: list[list[str]]) -> _State:
    """Convert an optimizer's state by number to one by name; `groups` as for `by_number`.

    A state in another form than that of ``torch.optim`` is returned unchanged.
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
    """A state with full CPU tensors in place of DTensors; empty ones without `keep`, because full ones need memory."""
    if isinstance(state, DTensor):
        full = state.full_tensor().detach()
        return full.cpu() if keep else full.new_empty(0)
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


def _dtensor_entries(saved: Any, names: Iterable[str], likes: Iterable[Any]) -> Iterator[DTensorEntry]:
    """The entries of an optimizer's state that become DTensors: those of parameters whose `likes` are DTensors."""
    by_key: dict[Any, Any] = {}
    for number, (name, like) in enumerate(zip(names, likes, strict=True)):
        by_key[number] = by_key[name] = like
    for holder, key, parameter in _parameter_tensors(saved):
        like = by_key.get(parameter)
        if isinstance(like, DTensor):
            yield DTensorEntry(holder, key, like, other_shapes=True)


def _parameter_tensors(state: Any) -> Iterator[tuple[dict[Any, Any], Any, Any]]:
    """The tensors in an optimizer's state that belong to one parameter: each as its dict, its key, the parameter's key.

    A parameter's entry is a dict of tensors. It may be nested, in the state of an optimizer within an optimizer.
    """
    if not isinstance(state, dict):
        return
    for parameter, entry in [*state.items()]:
        if not isinstance(entry, dict):
            continue
        for key, value in [*entry.items()]:
            # torch.optim keeps the number of steps on the CPU, wherever the parameter is.
            if isinstance(value, torch.Tensor) and key != "step":
                yield entry, key, parameter
        yield from _parameter_tensors(entry)


def _copied(state: Any) -> Any:
    """A copy of the state with new dicts, and the same tensors."""
    if not isinstance(state, dict):
        return state
    copied = copy.copy(state)
    copied.update({key: _copied(value) for key, value in state.items()})
    return copied


def _as(value: Any, like: Any) -> Any:
    """A full tensor as a DTensor like `like`, if that is one of the same shape; else the value unchanged."""
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
