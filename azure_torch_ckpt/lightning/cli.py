"""`AzureBlobLightningCLI`: Lightning's command line for checkpoints in Blob Storage."""

from __future__ import annotations

import importlib
import pydoc
import tempfile
from pathlib import Path
from typing import Any

import torch

from .checkpoint_io import AzureBlobCheckpointIO, blob_location
from .stock import pytorch

__all__ = ["AzureBlobLightningCLI"]

_cli = importlib.import_module(f"{pytorch.__name__}.cli")


class AzureBlobLightningCLI(_cli.LightningCLI):  # type: ignore[misc,name-defined]  # a module of either namespace
    """`LightningCLI` that takes the hyperparameters of a model from its checkpoint in Blob Storage, too.

        AzureBlobLightningCLI(Model, Data)      # python train.py test --ckpt_path=https://... --trainer.plugins=...

    From 2.6 on ``LightningCLI`` builds the model with the hyperparameters of the checkpoint ``--ckpt_path``, which it
    opens itself and only if it is a local file. With a URL it builds the model with the defaults, and says nothing.

    The credential is that of the `AzureBlobCheckpointIO` among ``--trainer.plugins``.

    Raises:
        CheckpointNotFoundError: there is no checkpoint at the URL.
        UnsupportedCheckpointError: the hyperparameters are more than ``weights_only=True`` allows.
    """

    def _parse_ckpt_path(self) -> None:
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if not path or blob_location(path) is None:
            super()._parse_ckpt_path()
            return
        # The tensors stay where they are.
        checkpoint = self._plugin(subcommand).load_checkpoint(path, map_location="meta", weights_only=True)
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "hyperparameters.ckpt"
            torch.save({"hyper_parameters": checkpoint.get("hyper_parameters", {})}, local)
            self.config[subcommand]["ckpt_path"] = str(local)
            try:
                super()._parse_ckpt_path()
            finally:
                self.config[subcommand]["ckpt_path"] = path

    def _plugin(self, subcommand: str) -> AzureBlobCheckpointIO:
        """The plugin that the Trainer will have, which is not made yet."""
        plugins = self.config[subcommand].get("trainer", {}).get("plugins")
        for plugin in plugins if isinstance(plugins, list) else [plugins]:
            if isinstance(plugin, AzureBlobCheckpointIO):
                return plugin
            named = pydoc.locate(str(getattr(plugin, "class_path", "")))
            if isinstance(named, type) and issubclass(named, AzureBlobCheckpointIO):
                parser = _cli.ArgumentParser()
                parser.add_subclass_arguments(AzureBlobCheckpointIO, "plugin")
                made: Any = parser.instantiate_classes(parser.parse_object({"plugin": plugin}))
                found: AzureBlobCheckpointIO = made.plugin
                return found
        return AzureBlobCheckpointIO()
