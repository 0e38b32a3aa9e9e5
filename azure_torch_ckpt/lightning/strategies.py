"""The Trainer's strategies: all ranks save and load a checkpoint in Blob Storage together.

`BlobStrategy` is what they share with those of Fabric: a sharded save or load through a plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError
from azure_torch_ckpt.objects.sharded import DTensorEntry, load_sharded, run_on_all_ranks, save_sharded
from azure_torch_ckpt.objects.states import FsdpStates, States, by_name, by_number, gathered, is_by_name

from .checkpoint_io import AzureBlobCheckpointIO, blob_location, required_checkpoint_io
from .stock import (
    PLUGIN_ATTRIBUTE,
    CheckpointIO,
    WrappingCheckpointIO,
    default_weights_only,
    fsdp_arguments,
    pytorch,
    saves_shards,
    weights_only_argument,
)

__all__ = [
    "AzureDDPStrategy",
    "AzureFSDPStrategy",
    "AzureModelParallelStrategy",
    "BlobStrategy",
    "give_mesh",
    "is_sharded_path",
]

_State = dict[str, Any]


def is_sharded_path(path: str | Path) -> bool:
    """Whether all ranks save or load `path` together: it is in Blob Storage, and there is a process group."""
    return blob_location(path) is not None and dist.is_available() and dist.is_initialized()


class BlobStrategy:
    """First base of our strategies, before Lightning's own class. Every rank calls its methods, with the same path."""

    _states: States = States()
    _blob_writer: AzureBlobWriter | None = None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin, which has the credential; by default an `AzureBlobCheckpointIO` without arguments."""
        plugin: CheckpointIO | None = getattr(self, PLUGIN_ATTRIBUTE)
        if plugin is None:
            self.checkpoint_io = plugin = AzureBlobCheckpointIO()
        elif isinstance(plugin, WrappingCheckpointIO) and plugin.checkpoint_io is None:
            plugin.checkpoint_io = AzureBlobCheckpointIO()
        return plugin

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        setattr(self, PLUGIN_ATTRIBUTE, io)

    def _save_sharded(self, checkpoint: Any, path: str | Path, storage_options: Any) -> None:
        """Save a part on each rank; return when the checkpoint is complete, with ``async_save`` as well."""
        plugin = required_checkpoint_io(self.checkpoint_io, path)
        if storage_options is not None:
            raise TypeError("Saves to Blob Storage take no storage_options. Give them to AzureBlobCheckpointIO")

        def prepare() -> AzureBlobWriter:
            plugin.wait_for(path)
            writer = self._blob_writer or plugin.writer(path)
            writer.reset(path)
            return writer

        self._blob_writer = run_on_all_ranks(prepare)
        save_sharded(checkpoint, self._blob_writer)

    def _save_on_rank_0(self, checkpoint: Any, path: str | Path, storage_options: Any) -> None:
        """Save rank 0's object through the plugin. All ranks raise what the plugin raises."""

        def save() -> None:
            if dist.get_rank() == 0:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

        run_on_all_ranks(save)

    def _load_sharded(
        self,
        path: str | Path,
        device: torch.device,
        dtensors: Callable[[Any], Iterable[DTensorEntry]],
        *,
        without: tuple[str, ...] = (),
        weights_only: bool | None = None,
    ) -> Any:
        """Load what each rank needs; each rank loads all of a blob of ``torch.save``."""
        plugin = required_checkpoint_io(self.checkpoint_io, path)

        def prepare() -> AzureBlobReader:
            plugin.wait_for(path)
            return plugin.reader(path)

        reader = run_on_all_ranks(prepare)
        weights_only = default_weights_only(weights_only)
        try:
            return load_sharded(reader, device, dtensors, without=without, weights_only=weights_only)
        except CheckpointNotFoundError:
            return run_on_all_ranks(lambda: plugin.load_checkpoint(path, weights_only=weights_only))


def give_mesh(strategy: Any) -> None:
    """Give the FSDP of a strategy a device mesh, without which its sharded states are not DTensors.

    Raises:
        ConfigurationError: the mesh depends on the arguments, so that the user has to choose it.
    """
    arguments, sharding = fsdp_arguments(strategy), strategy.sharding_strategy.name
    if "device_mesh" in arguments:
        return
    if "process_group" in arguments or "HYBRID" in sharding:
        raise ConfigurationError(
            f"To shard by {sharding} and save the shards, FSDP needs a device mesh. Give the strategy "
            "device_mesh=(replicas, shards) instead of a process_group"
        )
    arguments["device_mesh"] = init_device_mesh(strategy.root_device.type, (dist.get_world_size(),))


class _TrainerStrategy(BlobStrategy, pytorch.strategies.ParallelStrategy):
    """Base of the Trainer's strategies. Lightning's own strategy handles paths outside of Blob Storage."""

    _loaded_sharded = False

    def save_checkpoint(self, checkpoint: _State, filepath: str | Path, storage_options: Any = None) -> None:
        """Save on all ranks, and return when the checkpoint is complete.

        Raises:
            TypeError: there are `storage_options`.
            AzureCheckpointError: the save failed on some rank; the checkpoint at the URL has not changed.
        """
        path = self.broadcast(filepath)
        if not is_sharded_path(path):
            self._save_elsewhere(checkpoint, path, storage_options)
        elif saves_shards(self):
            self._save_sharded(checkpoint, path, storage_options)
        else:
            self._save_on_rank_0(checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> _State:
        """Load on each rank the part that it needs.

        Raises:
            AzureCheckpointError: some rank cannot load the checkpoint.
        """
        path = self.broadcast(checkpoint_path)
        self._loaded_sharded = is_sharded_path(path)
        if self._loaded_sharded:
            checkpoint: _State = self._load_sharded(
                path,
                self.root_device,
                self._dtensors,
                without=() if self._needs_optimizers else ("optimizer_states",),
                weights_only=weights_only,
            )
            return checkpoint
        return super().load_checkpoint(path, **weights_only_argument(weights_only))

    @property
    def _needs_optimizers(self) -> bool:
        return True

    def _save_elsewhere(self, checkpoint: _State, path: str | Path, storage_options: Any) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)

    def _dtensors(self, checkpoint: _State) -> Iterable[DTensorEntry]:
        return ()


class AzureDDPStrategy(_TrainerStrategy, pytorch.strategies.DDPStrategy):
    """DDP: each rank uploads a part of a checkpoint in Blob Storage, and downloads a part of it.

        Trainer(strategy=AzureDDPStrategy(), plugins=[AzureBlobCheckpointIO()])

    The checkpoint has rank 0's state. Tensors with the same bytes on several ranks, as most parameters and optimizer
    states are, are distributed among these ranks; each rank computes a checksum of its tensors to find out. On
    loading, one rank reads each large tensor and sends it to the others.

    The arguments are those of Lightning's ``DDPStrategy``.
    """

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        states = [
            by_number(state, self._states.names(self.lightning_module, optimizer)) if is_by_name(state) else state
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


class _ModelShardingStrategy(_TrainerStrategy):
    """Base of the strategies for sharded models, whose module and optimizers are loaded as DTensors."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        # Otherwise Lightning's strategy has already restored it in `load_checkpoint`.
        return self._loaded_sharded

    @property
    def _needs_optimizers(self) -> bool:
        assert self.lightning_module is not None
        return bool(self.lightning_module.trainer.state.fn == pytorch.trainer.states.TrainerFn.FITTING)

    def lightning_module_state_dict(self) -> _State:
        assert self.model is not None
        state = self._states.of_module(self.model)
        return state if saves_shards(self) else gathered(state, self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> _State:
        assert self.model is not None
        state = self._states.of_optimizer(self.model, _bare(optimizer))
        return state if saves_shards(self) else gathered(state, self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._loaded_sharded:
            assert self.model is not None
            self._states.load_module(self.model, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        states = checkpoint["optimizer_states"]
        if len(states) != len(self.optimizers):
            raise CheckpointError(
                f"The checkpoint has the states of {len(states)} optimizers, and the model has {len(self.optimizers)}. "
                "Resume with the optimizers that were saved"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            self._states.load_optimizer(self.model, optimizer, state)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.checkpoint_io.teardown()

    def _dtensors(self, checkpoint: _State) -> Iterable[DTensorEntry]:
        assert self.model is not None
        yield from self._states.module_dtensors(checkpoint.get("state_dict", {}), self.model)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            yield from self._states.optimizer_dtensors(state, self.model, optimizer)

    def _save_elsewhere(self, checkpoint: _State, path: str | Path, storage_options: Any) -> None:
        if saves_shards(self) and "optimizer_states" in checkpoint:
            assert self.model is not None
            states = [
                by_name(state, self._states.names(self.model, optimizer))
                for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            ]
            checkpoint = {**checkpoint, "optimizer_states": states}
        super()._save_elsewhere(checkpoint, path, storage_options)


class AzureModelParallelStrategy(_ModelShardingStrategy, pytorch.strategies.ModelParallelStrategy):
    """FSDP2 and tensor parallelism: each rank saves and loads its shards of a checkpoint in Blob Storage.

        Trainer(strategy=AzureModelParallelStrategy(), plugins=[AzureBlobCheckpointIO()])

    The arguments are those of Lightning's ``ModelParallelStrategy``. With ``save_distributed_checkpoint=False`` the
    state is assembled in rank 0's memory and saved from there; the checkpoint is the same.
    """


class AzureFSDPStrategy(_ModelShardingStrategy, pytorch.strategies.FSDPStrategy):
    """FSDP1: each rank saves and loads its shards of a checkpoint in Blob Storage.

        Trainer(strategy=AzureFSDPStrategy(), plugins=[AzureBlobCheckpointIO()])

    The arguments are those of Lightning's ``FSDPStrategy``, except that ``state_dict_type`` is "sharded" by default.
    With "full" the state is assembled in rank 0's memory and saved from there; the checkpoint is the same.
    ``HYBRID_SHARD`` needs ``device_mesh=(replicas, shards)``.
    """

    _states = FsdpStates()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("state_dict_type", "sharded")
        super().__init__(*args, **kwargs)

    def setup_environment(self) -> None:
        super().setup_environment()
        give_mesh(self)


def _bare(optimizer: Optimizer | pytorch.core.optimizer.LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, pytorch.core.optimizer.LightningOptimizer) else optimizer
