"""Makes small models, data and Trainers for either of Lightning's distributions, and lists what their runs saved."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from azure_torch_ckpt.catalog import list_checkpoints
from azure_torch_ckpt.location import BlobLocation
from tests.support.containers import KEY, store_of

NAMESPACES = ("lightning", "pytorch_lightning")
BATCHES = 4
_MODULES = {
    "lightning": ("lightning.pytorch", "lightning.fabric"),
    "pytorch_lightning": ("pytorch_lightning", "lightning_fabric"),
}


@dataclass(frozen=True)
class Namespace:
    """One of Lightning's two distributions, and our package for it."""

    name: str

    @functools.cached_property
    def pl(self) -> Any:
        return importlib.import_module(_MODULES[self.name][0])

    @functools.cached_property
    def fabric(self) -> Any:
        return importlib.import_module(_MODULES[self.name][1])

    @functools.cached_property
    def ours(self) -> Any:
        return importlib.import_module(f"azure_torch_ckpt.{self.name}")

    def module(self, name: str) -> Any:
        """A module of our package."""
        return importlib.import_module(f"azure_torch_ckpt.{self.name}.{name}")

    @property
    def cli(self) -> Any:
        return importlib.import_module(f"{self.pl.__name__}.cli").LightningCLI

    def plugin(self, credential: Any = KEY, **arguments: Any) -> Any:
        return self.ours.AzureBlobCheckpointIO(credential, **arguments)

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return self.ours.AzureBlobModelCheckpoint(*args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        return self.pl.callbacks.ModelCheckpoint(*args, **kwargs)

    def trainer(self, folder: Path, *callbacks: Any, plugin: Any = "ours", **arguments: Any) -> Any:
        """A quiet Trainer on the CPU, with our plugin unless another one, or None, is given."""
        plugins = [self.plugin() if plugin == "ours" else plugin]
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(one, self.pl.callbacks.Checkpoint) for one in callbacks),
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "plugins": [plugin for plugin in plugins if plugin is not None],
        }
        return self.pl.Trainer(**{**defaults, **arguments})

    def model(self, scores: tuple[float, ...] = (), width: Any = 8, lr: Any = 0.01, **attributes: Any) -> Any:
        """A model; in epoch n ``val_loss`` is ``scores[n]``, if there are any."""
        model = model_class(self.name)(width, lr)
        for name, value in {"scores": scores, **attributes}.items():
            setattr(model, name, value)
        return model


@functools.cache
def model_class(name: str) -> Any:
    pl = Namespace(name).pl

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        """Everything that a checkpoint keeps of a run: buffers, Adam's moments, a schedule, hyperparameters.

        Attributes:
            trained: the global step of each batch.
            losses: of each batch.
        """

        def __init__(self, width: int = 8, lr: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(11)
            self.lr = lr
            self.batch_size = 2
            self.scores: tuple[float, ...] = ()
            self.trained: list[int] = []
            self.losses: list[float] = []
            self.body = torch.nn.Sequential(
                torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Linear(width, 1)
            )

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.trained.append(self.trainer.global_step)
            loss = self.loss(batch)
            self.losses.append(loss.item())
            self.log("train_loss", loss)
            return loss

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.body(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.scores[self.current_epoch] if self.scores else self.loss(batch))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.body(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]

        def train_dataloader(self) -> Any:
            return data(batch_size=self.batch_size)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    return Net


def data(seed: int = 5, batch_size: int = 2) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * BATCHES, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=batch_size)


def save_each_epoch(pl: Any, url: str) -> Any:
    class SaveEachEpoch(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(url)

    return SaveEachEpoch()


def train(name: str, url: str, root: str, epochs: int, async_save: bool = False) -> None:
    """A run that overwrites its checkpoint after each epoch, in a process of its own."""
    space = Namespace(name)
    plugin = space.plugin(async_save=async_save)
    trainer = space.trainer(Path(root), save_each_epoch(space.pl, url), max_epochs=epochs, plugin=plugin)
    trainer.fit(space.model())


def names(url: str) -> set[str]:
    """The checkpoints below a URL. Each must be complete, with no blob but its own, and there must be no other blob."""
    entries = list_checkpoints(url, credential=KEY)
    assert all(entry.complete for entry in entries), entries
    blobs = etags(url)
    assert sum(entry.blobs for entry in entries) == len(blobs), blobs
    # One process saves one data blob and the metadata.
    assert all(entry.blobs == 2 for entry in entries), entries
    return {entry.name for entry in entries}


def etags(url: str) -> dict[str, str]:
    """The ETags of all blobs below a URL, by path in the container."""
    return {blob.path: blob.etag for blob in store_of(url).list(BlobLocation.parse(url).prefix)}


def trained_state(trainer: Any, model: Any) -> dict[str, Any]:
    """Everything that a resumed run and an uninterrupted one must have in common."""
    return {
        "model": dict(model.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
        "global_step": trainer.global_step,
    }
