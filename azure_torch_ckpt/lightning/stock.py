"""Every name of Lightning that this package uses from outside of its public modules, and every private one.

Lightning comes as two distributions with the same classes twice: ``lightning`` (``lightning.pytorch``,
``lightning.fabric``) and ``pytorch_lightning`` (with ``lightning_fabric``). A Trainer only takes plugins, callbacks and
strategies of its own distribution. So there are two packages here as well, ``azure_torch_ckpt.lightning`` and
``azure_torch_ckpt.pytorch_lightning``, which share these files; each has its own `namespace`. The modules of this
folder therefore

- get Lightning from `namespace` and `stock`, and never import it themselves;
- import each other relatively (``from .checkpoint_io import ...``), so that each package gets its own modules;
- leave to ``objects/`` what does not depend on Lightning, and every class that a pickle in a checkpoint may name.

Only this file uses private names of Lightning, except for the methods in `OVERRIDES`. Lightning may change private
names in any version: tests/lightning/test_stock.py fails when one is gone.
"""

from __future__ import annotations

import inspect
from typing import Any

from .namespace import ddp, fabric_plugins, fsdp, model_parallel, parallel, pytorch, wrapper

__all__ = [
    "LOAD_TAKES_WEIGHTS_ONLY",
    "OVERRIDES",
    "AsyncCheckpointIO",
    "CheckpointIO",
    "FabricDDPStrategy",
    "FabricFSDPStrategy",
    "FabricModelParallelStrategy",
    "FabricParallelStrategy",
    "TorchCheckpointIO",
    "WrappingCheckpointIO",
    "default_weights_only",
    "fsdp_arguments",
    "given_checkpoint_io",
    "pytorch",
    "save_on_exception",
    "saves_shards",
    "set_checkpoint_io",
    "uploads_checkpoints",
    "weights_only_argument",
]

AsyncCheckpointIO = pytorch.plugins.AsyncCheckpointIO
CheckpointIO = fabric_plugins.CheckpointIO
TorchCheckpointIO = fabric_plugins.TorchCheckpointIO
FabricDDPStrategy = ddp.DDPStrategy
FabricFSDPStrategy = fsdp.FSDPStrategy
FabricModelParallelStrategy = model_parallel.ModelParallelStrategy
FabricParallelStrategy = parallel.ParallelStrategy

# The base of AsyncCheckpointIO, by which Lightning recognises plugins that wrap another one. No public name has it.
WrappingCheckpointIO = wrapper._WrappingCheckpointIO

OVERRIDES = {
    # What it decides by local paths, we decide by URLs. Only this method knows which checkpoint is to go.
    "_should_remove_checkpoint": pytorch.callbacks.ModelCheckpoint,
    # The Trainer calls it for ckpt_path="last" before any public hook.
    "_find_last_checkpoints": pytorch.callbacks.ModelCheckpoint,
    # New in 2.6. LightningCLI calls it between parsing and making the model, where there is no public hook.
    "_parse_ckpt_path": "LightningCLI",
}
"""The private methods that our classes override, by the class that calls them."""

LOAD_TAKES_WEIGHTS_ONLY = "weights_only" in inspect.signature(TorchCheckpointIO.load_checkpoint).parameters
"""From Lightning 2.6 on ``load_checkpoint`` has this argument, with torch's default; before, it unpickles all."""


def default_weights_only(weights_only: bool | None) -> bool | None:
    """What `weights_only` means to the installed Lightning: None is torch's default from 2.6 on, and False before."""
    return False if weights_only is None and not LOAD_TAKES_WEIGHTS_ONLY else weights_only


def weights_only_argument(weights_only: bool | None) -> dict[str, Any]:
    """The keyword argument for those methods of Lightning that have it from 2.6 on."""
    return {"weights_only": weights_only} if LOAD_TAKES_WEIGHTS_ONLY else {}


def uploads_checkpoints(logger: pytorch.loggers.Logger) -> bool:
    """Whether a logger uploads the files of checkpoints.

    Lightning has no public interface for that. The loggers for Wandb, MLflow and Lit, and Neptune's before 2.6, keep
    their argument in one of these attributes.
    """
    return any(getattr(logger, name, False) for name in ("_log_model", "_log_model_checkpoints"))


def given_checkpoint_io(strategy: Any) -> CheckpointIO | None:
    """The plugin that a strategy was given. The public property would replace None by a plugin for local files."""
    given: CheckpointIO | None = strategy._checkpoint_io
    return given


def set_checkpoint_io(strategy: Any, plugin: CheckpointIO) -> None:
    """Give a strategy its plugin. Our strategies override the public property that does it."""
    strategy._checkpoint_io = plugin


def saves_shards(strategy: Any) -> bool:
    """Whether each rank saves its part of a model; otherwise the state is assembled on rank 0.

    The strategies for sharded models keep the argument that says it, and have no public attribute for it.
    """
    if isinstance(strategy, (pytorch.strategies.FSDPStrategy, FabricFSDPStrategy)):
        return bool(strategy._state_dict_type == "sharded")
    if isinstance(strategy, (pytorch.strategies.ModelParallelStrategy, FabricModelParallelStrategy)):
        return bool(strategy._save_distributed_checkpoint)
    return True


def fsdp_arguments(strategy: Any) -> dict[str, Any]:
    """The arguments that a strategy passes to FSDP. They are public in the Trainer's strategy, but not in Fabric's."""
    arguments: dict[str, Any] = strategy._fsdp_kwargs if isinstance(strategy, FabricFSDPStrategy) else strategy.kwargs
    return arguments


def save_on_exception(callback: pytorch.callbacks.ModelCheckpoint, trainer: pytorch.Trainer) -> str | None:
    """Save as ``ModelCheckpoint.on_exception`` does, which is new in 2.6, but under a name that is free.

    Lightning's own method does not ask whether the name is taken, and does it all in one go.

    Returns:
        The path of the checkpoint; None if there is nothing to save.
    """
    if not getattr(callback, "save_on_exception", False) or not callback._should_save_on_exception(trainer):
        return None
    candidates = callback._monitor_candidates(trainer)
    path: str = callback._get_metric_interpolated_filepath_name(candidates, trainer)
    callback._save_checkpoint(trainer, path)
    callback._save_last_checkpoint(trainer, candidates)
    return path
