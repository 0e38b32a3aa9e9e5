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

__all__ = ["FsdpStates", "States", "by_name", "by_number", "gathered", "live_tensors"]

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
        names = itertools.chain.from_iterable(self.names(module, optimizer))
        for number, (name, parameter) in enumerate(zip(names, _parameters(optimizer), strict=True)):
            if isinstance(parameter, DTensor):
                yield from _places_of(saved, number, name, parameter)

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
        saved = by_number(saved, self.names(module, optimizer))
        state = dict(saved["state"])
        for number, parameter in enumerate(_parameters(optimizer)):
            if number in state:
                state[number] = {
                    key: value if key == "step" else _as(value, parameter) for key, value in state[number].items()
                }
        optimizer.load_state_dict({**saved, "state": state})

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
        for number, name in enumerate(itertools.chain.from_iterable(self.names(module, optimizer))):
            if isinstance(tensors.get(name), DTensor):
                yield from _places_of(saved, number, name, tensors[name])

    def load_module(self, module: nn.Module, saved: _State, strict: bool) -> None:
        with _sharded(module):
            super().load_module(module, saved, strict)

    def load_optimizer(self, module: nn.Module, optimizer: Optimizer, saved: _State) -> None:
        groups = self.names(module, optimizer)
        state = by_name(by_number(saved, groups), groups)
        with _sharded(module):
            loaded = FullyShardedDataParallel.optim_state_dict_to_load(module, optimizer, state)
        optimizer.load_state_dict(loaded)

    def names(self, module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
        with _sharded(module):
            state = FullyShardedDataParallel.optim_state_dict(module, optimizer)
        return [group["params"] for group in state["param_groups"]]


def by_number(state: _State, groups: list[list[str]]) -> _State:
    """An optimizer's state with its parameters by number, if it has them by name.

    Args:
        groups: the names of the parameters of each group that the optimizer has now.

    Raises:
        UnsupportedCheckpointError: the state knows nothing of one of them.
    """
    saved_groups = state["param_groups"]
    if all(isinstance(name, int) for group in saved_groups for name in group["params"]):
        return state
    group_of = {name: group for group in saved_groups for name in group["params"]}
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
    state_by_number = {numbers[name]: value for name, value in state["state"].items() if name in numbers}
    return {**state, "state": dict(sorted(state_by_number.items())), "param_groups": numbered_groups}


def by_name(state: _State, groups: list[list[str]]) -> _State:
    """An optimizer's state by number, with the names of its parameters instead; `groups` as for `by_number`."""
    names = [name for group in groups for name in group]
    return {
        **state,
        "state": {names[number]: value for number, value in state["state"].items()},
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


def live_tensors(modules: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> Iterator[torch.Tensor]:
    """What is equal on all ranks under DDP: parameters and states of optimizers, but no buffers."""
    for module in modules:
        yield from module.parameters()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _places_of(saved: _State, number: int, name: str, like: DTensor) -> Iterator[Place]:
    state = saved["state"].get(number, saved["state"].get(name))
    for key, value in (state or {}).items():
        # torch.optim keeps its count of steps on the CPU, whatever the parameter is.
        if isinstance(value, torch.Tensor) and key != "step":
            yield Place(state, key, like, other_shapes=True)


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
