"""AzureBlobLightningCLI takes a model's hyperparameters from a checkpoint in Blob Storage, as from a local file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from azure_torch_ckpt import CheckpointNotFoundError
from tests.support.trainers import KEY, Namespace, data


def model_of(space: Namespace) -> Any:
    class Scaled(space.pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, scale: float = 1.0, wide: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.scale = scale
            self.net = torch.nn.Linear(4, wide)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).mean() * self.scale

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self) -> Any:
            return data()

        test_dataloader = train_dataloader

    return Scaled


def run(space: Namespace, *args: str, **arguments: Any) -> Any:
    quiet = ["logger=false", "enable_progress_bar=false", "enable_model_summary=false", "accelerator=cpu"]
    cli = space.module("cli").AzureBlobLightningCLI
    every = [f"--trainer.{argument}" for argument in quiet]
    return cli(model_of(space), args=[args[0], *every, *args[1:]], save_config_callback=None, **arguments)


PLUGIN = "--trainer.plugins=azure_torch_ckpt.{name}.AzureBlobCheckpointIO"


def test_the_model_has_the_hyperparameters_of_its_checkpoint(
    space: Namespace, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url, local = f"{container}/run/last.ckpt", str(tmp_path / "last.ckpt")
    plugin = [PLUGIN.format(name=space.name), f"--trainer.plugins.credential={KEY}"]
    fitted = run(space, "fit", *plugin, "--trainer.max_epochs=1", "--model.scale=7", "--model.wide=3")
    for path in (url, local):
        fitted.trainer.save_checkpoint(path)
    for path in (url, local, f"{url}/"):
        tested = run(space, "test", *plugin, f"--ckpt_path={path}")
        assert (tested.model.scale, tested.model.net.out_features) == (7.0, 3)
        assert tested.trainer.ckpt_path == path
    # As with a file, what the checkpoint says wins.
    again = run(space, "test", *plugin, f"--ckpt_path={url}", "--model.scale=2")
    assert again.model.scale == 7.0


def test_the_plugin_may_be_among_the_defaults_and_there_need_be_no_path(
    space: Namespace, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"{container}/run/last.ckpt"
    defaults = {"plugins": [space.plugin()], "max_epochs": 1}
    fitted = run(space, "fit", "--model.scale=7", trainer_defaults=defaults)
    fitted.trainer.save_checkpoint(url)
    assert run(space, "test", f"--ckpt_path={url}", trainer_defaults=defaults).model.scale == 7.0
    with pytest.raises(CheckpointNotFoundError):
        run(space, "test", f"--ckpt_path={url}-gone", trainer_defaults=defaults)
