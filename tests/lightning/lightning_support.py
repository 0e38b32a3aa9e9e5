"""A small model, data and Trainer for the tests of both Lightning namespaces, in this process and in others."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.catalog import list_checkpoints
from azure_torch_ckpt.location import BlobLocation

NAMESPACES = ("lightning", "pytorch_lightning")
BATCHES = 4
# What Lightning says about every run as small as these are, and about torch.
LIGHTNING_WARNINGS = (
    ".*does not have many workers",
    ".*number of training batches",
    ".*isinstance.treespec, LeafSpec.. is deprecated",
    ".*exists and is not empty",
    ".*dirpath has changed",
    "Trying to infer the `batch_size`",
    ".*there is no last checkpoint available",
    ".*was called without a model",
    ".*your dataloader is not resumable",
    "LightningCLI's args parameter",
    "(?s).*deprecated in v4",
    ".*uploads checkpoints only from a local disk",
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the process; and a model this small takes ten times as long with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Namespace:
    """One of Lightning's two distributions, and our package for it."""

    name: str

    @property
    def pl(self) -> Any:
        return importlib.import_module({"lightning": "lightning.pytorch"}.get(self.name, self.name))

    @property
    def ours(self) -> Any:
        return importlib.import_module(f"azure_torch_ckpt.{self.name}")

    @property
    def cli(self) -> Any:
        return importlib.import_module(f"{self.pl.__name__}.cli").LightningCLI

    def model(self, scores: tuple[float, ...] = (), **attributes: Any) -> Any:
        """A model with Adam and a schedule; epoch n logs ``scores[n]`` as ``val_loss``, if there are any."""

        class Model(self.pl.LightningModule):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(11)
                self.batch_size = 2
                self.learning_rate = 0.01
                self.trained: list[int] = []
                self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                self.trained.append(self.trainer.global_step)
                loss: torch.Tensor = (self.layers(batch[0]) - batch[1]).pow(2).mean()
                self.log("train_loss", loss)
                return loss

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                if scores:
                    self.log("val_loss", scores[self.current_epoch])

            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.log("test_loss", (self.layers(batch[0]) - batch[1]).pow(2).mean())

            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                return self.layers(batch[0])

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]

            def train_dataloader(self) -> Any:
                return data(self.batch_size)

            val_dataloader = test_dataloader = predict_dataloader = train_dataloader

        model = Model()
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    def trainer(self, folder: Path, *callbacks: Any, plugin: Any = "ours", **arguments: Any) -> Any:
        """A quiet Trainer on the CPU, with our plugin unless another one is given."""
        plugins = [self.ours.AzureBlobCheckpointIO() if plugin == "ours" else plugin]
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            "plugins": [plugin for plugin in plugins if plugin is not None],
        }
        return self.pl.Trainer(**{**defaults, "callbacks": list(callbacks), **arguments})

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return self.ours.AzureBlobModelCheckpoint(*args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        return self.pl.callbacks.ModelCheckpoint(*args, **kwargs)


def data(batch_size: int) -> Any:
    generator = torch.Generator().manual_seed(5)
    samples = 2 * BATCHES
    tensors = torch.randn(samples, 6, generator=generator), torch.randn(samples, 1, generator=generator)
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


def names(url: str) -> set[str]:
    """The checkpoints below a URL. Every one must be complete, with no blob but its own, and no other blob be there."""
    entries = list_checkpoints(url)
    assert all(entry.complete for entry in entries), entries
    blobs = etags(url)
    assert sum(entry.blobs for entry in entries) == len(blobs), blobs
    # One process saves one data blob and the metadata.
    assert all(entry.blobs == 2 for entry in entries), entries
    return {entry.name for entry in entries}


def etags(url: str) -> dict[str, str]:
    location = BlobLocation.parse(url)
    return {blob.path: blob.etag for blob in BlobStore(location).list(f"{location.path}/" if location.path else "")}


def trained_state(trainer: Any, model: Any) -> dict[str, Any]:
    """Everything that a resumed run must have as an uninterrupted one has it."""
    return {
        "model": dict(model.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
        "global_step": trainer.global_step,
    }
