"""`check_strategy`: an error before training if a strategy cannot save checkpoints to Blob Storage."""

from __future__ import annotations

from pathlib import Path

from azure_torch_ckpt.errors import ConfigurationError

from .checkpoint_io import blob_location, required_checkpoint_io
from .stock import pytorch
from .strategies import AzureFSDPStrategy, AzureModelParallelStrategy

__all__ = ["check_strategy"]

# These strategies write files themselves, and take a URL for a folder in the working directory.
_REMEDIES = {
    pytorch.strategies.FSDPStrategy: "Use AzureFSDPStrategy",
    pytorch.strategies.ModelParallelStrategy: "Use AzureModelParallelStrategy",
    pytorch.strategies.DeepSpeedStrategy: "Save to a local folder, or use AzureModelParallelStrategy",
}


def check_strategy(strategy: pytorch.strategies.Strategy, path: str | Path | None) -> None:
    """Check that a Trainer with this strategy can save and load checkpoints at `path`. Local paths always pass.

    Raises:
        LocationError: `path` is a URL, but not one of Blob Storage.
        ConfigurationError: the strategy cannot save there, or its plugin cannot.
    """
    if path is None or blob_location(path) is None:
        return
    for stock, remedy in _REMEDIES.items():
        if isinstance(strategy, stock) and not isinstance(strategy, (AzureFSDPStrategy, AzureModelParallelStrategy)):
            raise ConfigurationError(
                f"{type(strategy).__name__} writes checkpoints to local files, and would take {blob_location(path)} "
                f"for a folder. {remedy} of azure_torch_ckpt.lightning"
            )
    required_checkpoint_io(strategy.checkpoint_io, path)
