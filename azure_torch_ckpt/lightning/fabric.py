"""Fabric's strategies: all ranks save and load a checkpoint in Blob Storage together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from azure_torch_ckpt.objects.sharded import DTensorEntry
from azure_torch_ckpt.objects.states import FsdpStates, gathered

from .stock import (
    FabricDDPStrategy,
    FabricFSDPStrategy,
    FabricModelParallelStrategy,
    FabricParallelStrategy,
    saves_shards,
    weights_only_argument,
)
from .strategies import BlobStrategy, give_mesh, is_sharded_path

__all__ = [
    "AzureDDPStrategy",
    "AzureFSDPStrategy",
    "AzureFabricDDPStrategy",
    "AzureFabricFSDPStrategy",
    "AzureFabricModelParallelStrategy",
    "AzureModelParallelStrategy",
]

_State = dict[str, Any]
_Filter = dict[str, Callable[[str, Any], bool]]


class _FabricStrategy(BlobStrategy, FabricParallelStrategy):
    """Base of Fabric's strategies. Lightning's own strategy handles paths outside of Blob Storage."""

    def save_checkpoint(
        self, path: str | Path, state: _State, storage_options: Any = None, filter: _Filter | None = None
    ) -> None:
        """Save on all ranks, and return when the checkpoint is complete.

        Raises:
            TypeError: there are `storage_options`.
            AzureCheckpointError: the save failed on some rank; the checkpoint at the URL has not changed.
        """
        path = self.broadcast(path)
        if not is_sharded_path(path):
            super().save_checkpoint(path, state, storage_options, filter)
            return
        modules = _modules(state)
        checkpoint = {key: self._state_of(value, modules) for key, value in state.items()}
        for key, is_kept in (filter or {}).items():
            if not isinstance(checkpoint.get(key), dict):
                raise TypeError(f"The filter for {key!r} needs a dict in the state, and there is none under that key")
            checkpoint[key] = {name: value for name, value in checkpoint[key].items() if is_kept(name, value)}
        if saves_shards(self):
            self._save_sharded(checkpoint, path, storage_options)
        else:
            self._save_on_rank_0(gathered(checkpoint, self.is_global_zero), path, storage_options)

    def load_checkpoint(
        self,
        path: str | Path,
        state: nn.Module | Optimizer | _State | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> _State:
        """Load on each rank the part that it needs; without a `state`, everything.

        Returns:
            The entries of the checkpoint that `state` does not have.

        Raises:
            KeyError: `strict`, and the checkpoint lacks an entry of `state`. Nothing has changed.
            AzureCheckpointError: some rank cannot load the checkpoint.
        """
        path = self.broadcast(path)
        if not is_sharded_path(path):
            rest: _State = super().load_checkpoint(path, state, strict, **weights_only_argument(weights_only))
            return rest
        # A module or an optimizer alone means a checkpoint that is its state.
        wanted = {"": state} if isinstance(state, (nn.Module, Optimizer)) else state or {}
        is_raw = wanted is not state and bool(wanted)

        def dtensors(loaded: _State) -> Iterator[DTensorEntry]:
            checkpoint = {"": loaded} if is_raw else loaded
            missing = [key for key in wanted if key not in checkpoint]
            if strict and missing:
                raise KeyError(
                    f"The checkpoint has no entry {missing[0]!r}. With strict=False, missing entries keep their state"
                )
            modules = _modules(wanted)
            for key, value in wanted.items():
                if isinstance(value, nn.Module) and key in checkpoint:
                    yield from self._states.module_dtensors(checkpoint[key], _inner(value))
                elif isinstance(value, Optimizer) and key in checkpoint:
                    yield from self._states.optimizer_dtensors(checkpoint[key], _module_of(value, modules), value)

        loaded = self._load_sharded(path, self.root_device, dtensors, weights_only=weights_only)
        return self._restore({"": loaded} if is_raw else loaded, wanted, strict)

    def _state_of(self, value: Any, modules: list[nn.Module]) -> Any:
        if isinstance(value, nn.Module):
            return self._states.of_module(_inner(value))
        if isinstance(value, Optimizer):
            return self._states.of_optimizer(_module_of(value, modules), value)
        return value.state_dict() if _is_stateful(value) else value

    def _restore(self, checkpoint: _State, wanted: _State, strict: bool) -> _State:
        """Load the wanted entries into their objects, or into `wanted` itself; return the other entries."""
        modules = _modules(wanted)
        for key, value in list(wanted.items()):
            if key not in checkpoint:
                continue
            saved = checkpoint.pop(key)
            if isinstance(value, nn.Module):
                self._states.load_module(_inner(value), saved, strict)
            elif isinstance(value, Optimizer):
                self._states.load_optimizer(_module_of(value, modules), value, saved)
            elif _is_stateful(value):
                value.load_state_dict(saved)
            else:
                wanted[key] = saved
        return checkpoint


class AzureFabricDDPStrategy(_FabricStrategy, FabricDDPStrategy):
    """DDP: each rank uploads a part of a checkpoint in Blob Storage, and downloads a part of it.

        Fabric(strategy=AzureFabricDDPStrategy(), plugins=[AzureBlobCheckpointIO()])

    The checkpoint has rank 0's state; `azure_torch_ckpt.lightning.AzureDDPStrategy` says who writes and reads which
    tensors.

    The arguments are those of Lightning's ``DDPStrategy``.
    """

    def _state_of(self, value: Any, modules: list[nn.Module]) -> Any:
        # Lightning's method collects a state that the optimizer itself has sharded (ZeroRedundancyOptimizer).
        return self.get_optimizer_state(value) if isinstance(value, Optimizer) else super()._state_of(value, modules)


class AzureFabricModelParallelStrategy(_FabricStrategy, FabricModelParallelStrategy):
    """FSDP2 and tensor parallelism: each rank saves and loads its shards of a checkpoint in Blob Storage.

        Fabric(strategy=AzureFabricModelParallelStrategy(parallelize), plugins=[AzureBlobCheckpointIO()])

    The arguments are those of Lightning's ``ModelParallelStrategy``. With ``save_distributed_checkpoint=False`` the
    state is assembled in rank 0's memory and saved from there; the checkpoint is the same.
    """


class AzureFabricFSDPStrategy(_FabricStrategy, FabricFSDPStrategy):
    """FSDP1: each rank saves and loads its shards of a checkpoint in Blob Storage.

        Fabric(strategy=AzureFabricFSDPStrategy(), plugins=[AzureBlobCheckpointIO()])

    The arguments are those of Lightning's ``FSDPStrategy``. With ``state_dict_type="full"`` the state is assembled in
    rank 0's memory and saved from there; the checkpoint is the same. ``HYBRID_SHARD`` needs
    ``device_mesh=(replicas, shards)``.
    """

    _states = FsdpStates()

    def setup_environment(self) -> None:
        super().setup_environment()
        give_mesh(self)


# The earlier names, which the Trainer's strategies have as well.
AzureDDPStrategy = AzureFabricDDPStrategy
AzureModelParallelStrategy = AzureFabricModelParallelStrategy
AzureFSDPStrategy = AzureFabricFSDPStrategy


def _modules(state: _State) -> list[nn.Module]:
    return [_inner(value) for value in state.values() if isinstance(value, nn.Module)]


def _inner(module: nn.Module) -> nn.Module:
    """The module that DDP wraps, or the module itself."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _module_of(optimizer: Optimizer, modules: Iterable[nn.Module]) -> nn.Module:
    """The module with the optimizer's parameters; an empty module if none of `modules` has them."""
    first: torch.Tensor | None = next((one for group in optimizer.param_groups for one in group["params"]), None)
    for module in modules:
        if any(parameter is first for parameter in module.parameters()):
            return module
    return nn.Module()


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
