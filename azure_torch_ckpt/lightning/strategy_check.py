"""`check_strategy`: the error for a strategy that cannot keep checkpoints in Blob Storage, before it tries to."""

from __future__ import annotations

from pathlib import Path

from azure_torch_ckpt.errors import ConfigurationError

from .checkpoint_io import blob_checkpoint_io, blob_location
from .stock import pytorch
from .strategies import AzureFSDPStrategy, AzureModelParallelStrategy

__all__ = ["check_strategy"]

# These strategies write files themselves, and take a URL for a folder of the working directory.
_INSTEAD = {
    pytorch.strategies.FSDPStrategy: "Use AzureFSDPStrategy",
    pytorch.strategies.ModelParallelStrategy: "Use AzureModelParallelStrategy",
    pytorch.strategies.DeepSpeedStrategy: "Save to a local folder, or use AzureModelParallelStrategy",
}


def check_strategy(strategy: pytorch.strategies.Strategy, path: str | Path | None) -> None:
    """See whether a Trainer with this strategy can save and load checkpoints at `path`.

    Nothing is to be seen of a path that is not in Blob Storage.

    Raises:
        LocationError: `path` is a URL, and names no place in Blob Storage.
        ConfigurationError: it cannot.
    """
    if path is None or blob_location(path) is None:
        return
    for stock, instead in _INSTEAD.items():
        if isinstance(strategy, stock) and not isinstance(strategy, (AzureFSDPStrategy, AzureModelParallelStrategy)):
            raise ConfigurationError(
                f"{type(strategy).__name__} writes checkpoints to local files, and would take {blob_location(path)} "
                f"for a folder. {instead}, which azure_torch_ckpt.lightning has"
            )
    if blob_checkpoint_io(strategy.checkpoint_io) is None:
        raise ConfigurationError(
            f"The Trainer saves checkpoints by {type(strategy.checkpoint_io).__name__}, which does not know "
            f"{blob_location(path)}. Give it plugins=[AzureBlobCheckpointIO(...)] of azure_torch_ckpt.lightning"
        )
