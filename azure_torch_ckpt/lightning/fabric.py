"""Strategies of Fabric whose ranks save and load a checkpoint in Blob Storage together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from azure_torch_ckpt.objects.sharded import Place
from azure_torch_ckpt.objects.states import FsdpStates, States, gathered

from .sharding import KeepsInBlobs, give_mesh, is_sharded_path
from .stock import (
    LOAD_TAKES_WEIGHTS_ONLY,
    FabricDDPStrategy,
    FabricFSDPStrategy,
    FabricModelParallelStrategy,
    FabricParallelStrategy,
)

__all__ = ["AzureDDPStrategy", "AzureFSDPStrategy", "AzureModelParallelStrategy"]

_State = dict[str, Any]
_Filter = dict[str, Callable[[str, Any], bool]]


class _BlobStrategy(KeepsInBlobs, FabricParallelStrategy):
    """Base of them all. Paths of any other kind than Blob Storage are left to the strategy of Lightning."""

    _states: States = States()

    def save_checkpoint(
        self, path: str | Path, state: _State, storage_options: Any = None, filter: _Filter | None = None
    ) -> None:
        """Save on all ranks, and return when the checkpoint is complete.

        Raises:
            TypeError: there are `storage_options`.
            AzureCheckpointError: the save failed on some rank; what stood at the URL still stands.
        """
        path = self.broadcast(path)
        if not is_sharded_path(path):
            super().save_checkpoint(path, state, storage_options, filter)
            return
        modules = _modules(state)
        checkpoint = {}
        for key, thing in state.items():
            checkpoint[key] = self._state_of(thing, modules)
        for key, is_kept in (filter or {}).items():
            if not isinstance(checkpoint.get(key), dict):
                raise TypeError(f"The filter for {key!r} has no dict to choose from")
            checkpoint[key] = {name: value for name, value in checkpoint[key].items() if is_kept(name, value)}
        if self._saves_shards:
            self._checkpoints.save(self.checkpoint_io, checkpoint, path, storage_options)
        else:
            whole = gathered(checkpoint, self.is_global_zero)
            self._checkpoints.save_on_rank_0(self.checkpoint_io, whole, path, storage_options)

    def load_checkpoint(
        self,
        path: str | Path,
        state: nn.Module | Optimizer | _State | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> _State:
        """Load on all ranks what each of them needs. Without a `state` that is everything.

        Raises:
            KeyError: `strict`, and the checkpoint lacks an entry of `state`. Nothing has changed.
            AzureCheckpointError: it cannot be loaded on some rank.
        """
        path = self.broadcast(path)
        if not is_sharded_path(path):
            arguments = {"weights_only": weights_only} if LOAD_TAKES_WEIGHTS_ONLY else {}
            rest: _State = super().load_checkpoint(path, state, strict, **arguments)
            return rest
        # A module or an optimizer alone stands for a checkpoint that is nothing but its state.
        wanted = {"": state} if isinstance(state, (nn.Module, Optimizer)) else state or {}
        is_raw = wanted is not state and bool(wanted)

        def places(loaded: _State) -> Iterator[Place]:
            checkpoint = {"": loaded} if is_raw else loaded
            missing = [key for key in wanted if key not in checkpoint]
            if strict and missing:
                raise KeyError(
                    f"The checkpoint has no entry {missing[0]!r}. With strict=False, what it lacks keeps its state"
                )
            modules = _modules(wanted)
            for key, thing in wanted.items():
                if isinstance(thing, nn.Module) and key in checkpoint:
                    yield from self._states.module_places(checkpoint[key], _inner(thing))
                elif isinstance(thing, Optimizer) and key in checkpoint:
                    yield from self._states.optimizer_places(checkpoint[key], _of(thing, modules), thing)

        loaded = self._checkpoints.load(self.checkpoint_io, path, self.root_device, places, weights_only=weights_only)
        return self._restore({"": loaded} if is_raw else loaded, wanted, strict)

    @property
    def _saves_shards(self) -> bool:
        """Whether the states of this strategy are of a kind that each rank saves its part of."""
        return True

    def _state_of(self, thing: Any, modules: list[nn.Module]) -> Any:
        if isinstance(thing, nn.Module):
            return self._states.of_module(_inner(thing))
        if isinstance(thing, Optimizer):
            return self._states.of_optimizer(_of(thing, modules), thing)
        return thing.state_dict() if _is_stateful(thing) else thing

    def _restore(self, checkpoint: _State, wanted: _State, strict: bool) -> _State:
        """Put the entries that are wanted into their objects, or in their places; return the others."""
        modules = _modules(wanted)
        for key, thing in list(wanted.items()):
            if key not in checkpoint:
                continue
            saved = checkpoint.pop(key)
            if isinstance(thing, nn.Module):
                self._states.load_module(_inner(thing), saved, strict)
            elif isinstance(thing, Optimizer):
                self._states.load_optimizer(_of(thing, modules), thing, saved)
            elif _is_stateful(thing):
                thing.load_state_dict(saved)
            else:
                wanted[key] = saved
        return checkpoint


class AzureDDPStrategy(_BlobStrategy, FabricDDPStrategy):
    """DDP whose ranks each upload a share of a checkpoint in Blob Storage, and each download a share of it.

        Fabric(strategy=AzureDDPStrategy(), plugins=[AzureBlobCheckpointIO()])

    What is saved is what rank 0 has. Tensors that have the same bytes on other ranks, as parameters and the states of
    optimizers mostly do, are shared out among them; each rank computes a checksum of its tensors to find out. On
    loading, one rank reads each large tensor and sends it to the others.

    The arguments are those of Lightning's ``DDPStrategy``.
    """

    def _state_of(self, thing: Any, modules: list[nn.Module]) -> Any:
        # Lightning's method collects a state that the optimizer itself has sharded (ZeroRedundancyOptimizer).
        return self.get_optimizer_state(thing) if isinstance(thing, Optimizer) else super()._state_of(thing, modules)


class AzureModelParallelStrategy(_BlobStrategy, FabricModelParallelStrategy):
    """FSDP2 and tensor parallelism, with checkpoints in Blob Storage of which each rank saves and loads its shard.

        Fabric(strategy=AzureModelParallelStrategy(parallelize), plugins=[AzureBlobCheckpointIO()])

    The arguments are those of Lightning's ``ModelParallelStrategy``. With ``save_distributed_checkpoint=False`` the
    state is assembled in rank 0's memory and saved from there; what is stored is the same.
    """

    @property
    def _saves_shards(self) -> bool:
        return bool(self._save_distributed_checkpoint)


class AzureFSDPStrategy(_BlobStrategy, FabricFSDPStrategy):
    """FSDP1, with checkpoints in Blob Storage of which each rank saves and loads its shard.

        Fabric(strategy=AzureFSDPStrategy(), plugins=[AzureBlobCheckpointIO()])

    The arguments are those of Lightning's ``FSDPStrategy``. With ``state_dict_type="full"`` the state is assembled in
    rank 0's memory and saved from there; what is stored is the same. ``HYBRID_SHARD`` needs
    ``device_mesh=(replicas, shards)``.
    """

    _states = FsdpStates()

    def setup_environment(self) -> None:
        super().setup_environment()
        give_mesh(self._fsdp_kwargs, self.sharding_strategy.name, self.root_device)

    @property
    def _saves_shards(self) -> bool:
        return bool(self._state_dict_type == "sharded")


def _modules(state: _State) -> list[nn.Module]:
    return [_inner(thing) for thing in state.values() if isinstance(thing, nn.Module)]


def _inner(module: nn.Module) -> nn.Module:
    """The module that DDP is wrapped around."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _of(optimizer: Optimizer, modules: Iterable[nn.Module]) -> nn.Module:
    """The module whose parameters an optimizer has; an empty one if it is none of those."""
    first: torch.Tensor | None = next((one for group in optimizer.param_groups for one in group["params"]), None)
    for module in modules:
        if any(parameter is first for parameter in module.parameters()):
            return module
    return nn.Module()


def _is_stateful(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))
