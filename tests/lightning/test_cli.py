"""The command line: AzureBlobLightningCLI, and plugin and callback as arguments of LightningCLI."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from azure_torch_ckpt import CheckpointNotFoundError
from tests.support.containers import KEY
from tests.support.trainers import Namespace, model_class, names


def run(space: Namespace, *args: str, **arguments: Any) -> Any:
    quiet = ["logger=false", "enable_progress_bar=false", "enable_model_summary=false", "accelerator=cpu"]
    cli = space.module("cli").AzureBlobLightningCLI
    every = [f"--trainer.{argument}" for argument in quiet]
    return cli(model_class(space.name), args=[args[0], *every, *args[1:]], save_config_callback=None, **arguments)


PLUGIN = "--trainer.plugins=azure_torch_ckpt.{name}.AzureBlobCheckpointIO"


def test_the_model_has_the_hyperparameters_of_its_checkpoint(space: Namespace, container: str, folder: Path) -> None:
    url, local = f"{container}/run/last.ckpt", str(folder / "local" / "last.ckpt")
    plugin = [PLUGIN.format(name=space.name), f"--trainer.plugins.credential={KEY}"]
    fitted = run(space, "fit", *plugin, "--trainer.max_epochs=1", "--model.lr=0.5", "--model.width=3")
    for path in (url, local):
        fitted.trainer.save_checkpoint(path)
    for path in (url, local, f"{url}/"):
        tested = run(space, "test", *plugin, f"--ckpt_path={path}")
        assert (tested.model.lr, tested.model.body[0].out_features) == (0.5, 3)
        assert tested.trainer.ckpt_path == path
    # As with a file, the hyperparameters of the checkpoint win.
    again = run(space, "test", *plugin, f"--ckpt_path={url}", "--model.lr=2")
    assert again.model.lr == 0.5


def test_the_plugin_may_be_among_the_defaults_and_there_need_be_no_path(
    space: Namespace, container: str, folder: Path
) -> None:
    url = f"{container}/run/last.ckpt"
    defaults = {"plugins": [space.plugin()], "max_epochs": 1}
    fitted = run(space, "fit", "--model.lr=0.5", trainer_defaults=defaults)
    fitted.trainer.save_checkpoint(url)
    assert run(space, "test", f"--ckpt_path={url}", trainer_defaults=defaults).model.lr == 0.5
    with pytest.raises(CheckpointNotFoundError):
        run(space, "test", f"--ckpt_path={url}-gone", trainer_defaults=defaults)


# ---- LightningCLI itself ---------------------------------------------------------------------------------------------


def test_the_cli_takes_plugin_and_callback_from_yaml(space: Namespace, container: str, folder: Path) -> None:
    url, package = f"{container}/run", space.ours.__name__
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [{"class_path": f"{package}.AzureBlobCheckpointIO", "init_args": {"async_save": True}}],
        "callbacks": [
            {
                "class_path": f"{package}.AzureBlobModelCheckpoint",
                "init_args": {"dirpath": url, "filename": "{epoch}", "save_last": True, "every_n_epochs": 1},
            }
        ],
    }
    (folder / "config.yml").write_text(json.dumps({"trainer": trainer, "ckpt_path": "last"}))
    for epochs in (1, 2):
        cli = space.cli(
            model_class(space.name),
            args=["fit", "--config", "config.yml", f"--trainer.max_epochs={epochs}"],
            save_config_kwargs={"overwrite": True},
            seed_everything_default=False,
        )
        assert len(cli.model.trained) == 4
        assert isinstance(cli.trainer.checkpoint_callback, space.ours.AzureBlobModelCheckpoint)
        assert names(url) == {f"epoch={epochs - 1}.ckpt", "last.ckpt"}
    saved = (folder / "config.yaml").read_text()  # what the CLI saves beside the logs
    assert "async_save: true" in saved and f"dirpath: {url}" in saved


def test_the_cli_takes_plugin_and_callback_as_arguments(space: Namespace, container: str, folder: Path) -> None:
    url, package = f"{container}/run", space.ours.__name__
    arguments = [
        "fit",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.plugins={package}.AzureBlobCheckpointIO",
        f"--trainer.callbacks={package}.AzureBlobModelCheckpoint",
        f"--trainer.callbacks.dirpath={url}",
        "--trainer.callbacks.save_top_k=-1",
    ]
    with mock.patch.object(sys, "argv", ["train.py", *arguments]):
        space.cli(model_class(space.name), save_config_callback=None, seed_everything_default=False)
    assert names(url) == {"epoch=0-step=4.ckpt"}
