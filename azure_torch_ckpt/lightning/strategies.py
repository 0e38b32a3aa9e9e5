"""Strategies of the Trainer whose ranks save and load a checkpoint in Blob Storage together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from azure_torch_ckpt.errors import CheckpointError
from azure_torch_ckpt.objects.sharded import Place
from azure_torch_ckpt.objects.states import FsdpStates, States, by_name, by_number, gathered, is_by_name

from .sharding import KeepsInBlobs, give_mesh, is_sharded_path
from .stock import LOAD_TAKES_WEIGHTS_ONLY, pytorch

__all__ = ["AzureDDPStrategy", "AzureFSDPStrategy", "AzureModelParallelStrategy"]

_State = dict[str, Any]


class _BlobStrategy(KeepsInBlobs, pytorch.strategies.ParallelStrategy):
    """Base of them all. Paths of any other kind than Blob Storage are left to the strategy of Lightning."""

    _states: States = States()
    _loaded_sharded = False

    def save_checkpoint(self, checkpoint: _State, filepath: str | Path, storage_options: Any = None) -> None:
        """Save on all ranks, and return when the checkpoint is complete.

        Raises:
            TypeError: there are `storage_options`.
            AzureCheckpointError: the save failed on some rank; what stood at the URL still stands.
        """
        path = self.broadcast(filepath)
        if not is_sharded_path(path):
            self._save_elsewhere(checkpoint, path, storage_options)
        elif self._saves_shards:
            self._checkpoints.save(self.checkpoint_io, checkpoint, path, storage_options)
        else:
            self._checkpoints.save_on_rank_0(self.checkpoint_io, checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> _State:
        """Load on all ranks what each of them needs.

        Raises:
            AzureCheckpointError: it cannot be loaded on some rank.
        """
        path = self.broadcast(checkpoint_path)
        self._loaded_sharded = is_sharded_path(path)
        if self._loaded_sharded:
            checkpoint: _State = self._checkpoints.load(
                self.checkpoint_io,
                path,
                self.root_device,
                self._places,
                without=() if self._needs_optimizers else ("optimizer_states",),
                weights_only=weights_only,
            )
            return checkpoint
        arguments = {"weights_only": weights_only} if LOAD_TAKES_WEIGHTS_ONLY else {}
        return super().load_checkpoint(path, **arguments)

    @property
    def _saves_shards(self) -> bool:
        """Whether the states of this strategy are of a kind that each rank saves its part of."""
        return True

    @property
    def _needs_optimizers(self) -> bool:
        return True

    def _save_elsewhere(self, checkpoint: _State, path: str | Path, storage_options: Any) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)

    def _places(self, checkpoint: _State) -> Iterable[Place]:
        return ()


class AzureDDPStrategy(_BlobStrategy, pytorch.strategies.DDPStrategy):
    """DDP whose ranks each upload a share of a checkpoint in Blob Storage, and each download a share of it.

        Trainer(strategy=AzureDDPStrategy(), plugins=[AzureBlobCheckpointIO()])

    What is saved is what rank 0 has. Tensors that have the same bytes on other ranks, as parameters and the states of
    optimizers mostly do, are shared out among them; each rank computes a checksum of its tensors to find out. On
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


class _ModelShardingStrategy(_BlobStrategy):
    """For models whose parameters are sharded: the module and its optimizers are loaded as DTensors."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        # The strategy of Lightning has done it by then, in `load_checkpoint`.
        return self._loaded_sharded

    @property
    def _needs_optimizers(self) -> bool:
        assert self.lightning_module is not None
        return bool(self.lightning_module.trainer.state.fn == pytorch.trainer.states.TrainerFn.FITTING)

    def lightning_module_state_dict(self) -> _State:
        assert self.model is not None
        state = self._states.of_module(self.model)
        return state if self._saves_shards else gathered(state, self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> _State:
        assert self.model is not None
        state = self._states.of_optimizer(self.model, _bare(optimizer))
        return state if self._saves_shards else gathered(state, self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._loaded_sharded:
            assert self.model is not None
            self._states.load_module(self.model, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        states = checkpoint["optimizer_states"]
        if len(states) != len(self.optimizers):
            raise CheckpointError(
                f"The checkpoint has the states of {len(states)} optimizers, and there are {len(self.optimizers)}. "
                "Resume with those that it was saved with"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            self._states.load_optimizer(self.model, optimizer, state)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.checkpoint_io.teardown()

    def _places(self, checkpoint: _State) -> Iterable[Place]:
        assert self.model is not None
        yield from self._states.module_places(checkpoint.get("state_dict", {}), self.model)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            yield from self._states.optimizer_places(state, self.model, optimizer)

    def _save_elsewhere(self, checkpoint: _State, path: str | Path, storage_options: Any) -> None:
        if self._saves_shards and "optimizer_states" in checkpoint:
            assert self.model is not None
            states = [
                by_name(state, self._states.names(self.model, optimizer))
                for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            ]
            checkpoint = {**checkpoint, "optimizer_states": states}
        super()._save_elsewhere(checkpoint, path, storage_options)


class AzureModelParallelStrategy(_ModelShardingStrategy, pytorch.strategies.ModelParallelStrategy):
    """FSDP2 and tensor parallelism, with checkpoints in Blob Storage of which each rank saves and loads its shard.

        Trainer(strategy=AzureModelParallelStrategy(), plugins=[AzureBlobCheckpointIO()])

    The arguments are those of Lightning's ``ModelParallelStrategy``. With ``save_distributed_checkpoint=False`` the
    state is assembled in rank 0's memory and saved from there; what is stored is the same.
    """

    @property
    def _saves_shards(self) -> bool:
        return bool(self._save_distributed_checkpoint)


class AzureFSDPStrategy(_ModelShardingStrategy, pytorch.strategies.FSDPStrategy):
    """FSDP1, with checkpoints in Blob Storage of which each rank saves and loads its shard.

        Trainer(strategy=AzureFSDPStrategy(), plugins=[AzureBlobCheckpointIO()])

    The arguments are those of Lightning's ``FSDPStrategy``, but that ``state_dict_type`` is "sharded" if it is not
    given. With "full" the state is assembled in rank 0's memory and saved from there; what is stored is the same.
    ``HYBRID_SHARD`` needs ``device_mesh=(replicas, shards)``.
    """

    _states = FsdpStates()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("state_dict_type", "sharded")
        super().__init__(*args, **kwargs)

    def setup_environment(self) -> None:
        super().setup_environment()
        give_mesh(self.kwargs, self.sharding_strategy.name, self.root_device)

    @property
    def _saves_shards(self) -> bool:
        return bool(self._state_dict_type == "sharded")


def _bare(optimizer: Optimizer | pytorch.core.optimizer.LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, pytorch.core.optimizer.LightningOptimizer) else optimizer
