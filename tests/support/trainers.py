"""Small models and Trainers for the tests of the Lightning parts, for either of Lightning's namespaces."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from azure_torch_ckpt.emulator import Azurite

KEY = Azurite.account_key
NAMESPACES = ["lightning", "pytorch_lightning"]


@dataclass(frozen=True)
class Namespace:
    """One of Lightning's two distributions, and our package for it."""

    name: str

    @functools.cached_property
    def ours(self) -> Any:
        return importlib.import_module(f"azure_torch_ckpt.{self.name}")

    @functools.cached_property
    def pl(self) -> Any:
        return importlib.import_module("lightning.pytorch" if self.name == "lightning" else "pytorch_lightning")

    @functools.cached_property
    def fabric(self) -> Any:
        return importlib.import_module("lightning.fabric" if self.name == "lightning" else "lightning_fabric")

    def plugin(self, **arguments: Any) -> Any:
        return self.ours.AzureBlobCheckpointIO(KEY, **arguments)

    def trainer(self, root: Path, **arguments: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        fixed = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "default_root_dir": root}
        return self.pl.Trainer(**{**quiet, **fixed, **arguments})

    def model(self, **hparams: Any) -> Any:
        return net(self.name)(**hparams)


@functools.cache
def net(name: str) -> Any:
    pl = Namespace(name).pl

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        """Everything that a checkpoint keeps of a run: buffers, Adam's moments, a schedule, hyperparameters."""

        def __init__(self, width: int = 8, lr: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.body = torch.nn.Sequential(
                torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Linear(width, 1)
            )
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            inputs, wanted = batch
            loss: torch.Tensor = torch.nn.functional.mse_loss(self.body(inputs), wanted)
            self.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            inputs, wanted = batch
            self.log("val_loss", torch.nn.functional.mse_loss(self.body(inputs), wanted))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]

        def train_dataloader(self) -> Any:
            return data(0)

        def val_dataloader(self) -> Any:
            return data(1)

    # Spawned processes find it by its name.
    Net.__qualname__ = Net.__name__ = f"Net_{name}"
    globals()[Net.__name__] = Net
    return Net


def data(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(24, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=6)


def save_each_epoch(pl: Any, url: str) -> Any:
    class SaveEachEpoch(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(url)

    return SaveEachEpoch()


def train(name: str, url: str, root: str, epochs: int, async_save: bool = False) -> None:
    """A run that overwrites its checkpoint after each epoch, in a process of its own."""
    space = Namespace(name)
    torch.manual_seed(0)
    plugin = space.plugin(async_save=async_save)
    trainer = space.trainer(Path(root), max_epochs=epochs, plugins=[plugin], callbacks=[save_each_epoch(space.pl, url)])
    trainer.fit(space.model())
