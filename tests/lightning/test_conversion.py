"""`load_from_checkpoint` and the conversion from and to a ``.ckpt`` file, in both of Lightning's namespaces."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from azure_torch_ckpt import CheckpointExistsError, CheckpointNotFoundError, UnsupportedCheckpointError
from tests.support import trainers
from tests.support.containers import KEY
from tests.support.deep_equality import assert_alike, through_torch
from tests.support.trainers import Namespace


def test_load_from_checkpoint_loads_the_present_checkpoint(space: Namespace, container: str, tmp_path: Path) -> None:
    """Lightning's own would look for ``last.ckpt`` in a cache, and find the one of the first run."""
    for run, width in (("a", 5), ("b", 6), ("a", 7)):
        trainer = space.trainer(tmp_path)
        trainer.fit(model := space.model(width=width))
        url = f"{container}/{run}/last.ckpt"
        trainer.save_checkpoint(url)
        loaded = space.ours.load_from_checkpoint(type(model), url, credential=KEY)
        assert loaded.hparams.width == width
        assert_alike(through_torch(loaded.state_dict()), through_torch(model.state_dict()))


def test_load_from_checkpoint_has_the_arguments_of_lightnings_own(space: Namespace, url: str, tmp_path: Path) -> None:
    trainer = space.trainer(tmp_path)
    trainer.fit(model := space.model())
    trainer.save_checkpoint(url)
    trainer.save_checkpoint(file := tmp_path / "stock.ckpt")

    def both(**arguments: Any) -> tuple[Any, Any]:
        ours = space.ours.load_from_checkpoint(type(model), url, credential=KEY, **arguments)
        return ours, type(model).load_from_checkpoint(file, **arguments)

    for arguments in (
        {},
        {"lr": 0.5},
        {"map_location": "cpu"},
        {"map_location": {"cpu": "cpu"}},
        {"weights_only": True},
    ):
        ours, stock = both(**arguments)
        assert dict(ours.hparams) == dict(stock.hparams)
        assert_alike(through_torch(ours.state_dict()), through_torch(stock.state_dict()))
    (hparams := tmp_path / "hparams.yaml").write_text("width: 8\nlr: 0.25\n")
    assert both(hparams_file=hparams)[0].hparams.lr == 0.25
    with pytest.raises(RuntimeError, match="size mismatch"):
        space.ours.load_from_checkpoint(type(model), url, credential=KEY, width=9)
    with pytest.raises(CheckpointNotFoundError):
        space.ours.load_from_checkpoint(type(model), f"{url}-gone", credential=KEY)


def test_load_from_checkpoint_runs_no_code_unless_it_is_asked_to(space: Namespace, url: str, tmp_path: Path) -> None:
    model = space.model(lr=Rate(0.5))
    trainer = space.trainer(tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(url)
    with pytest.raises(UnsupportedCheckpointError, match="weights_only=False"):
        space.ours.load_from_checkpoint(type(model), url, credential=KEY)
    loaded = space.ours.load_from_checkpoint(type(model), url, credential=KEY, weights_only=False)
    assert loaded.hparams.lr == Rate(0.5)


class Rate(float):
    """A hyperparameter of a class of the user's own."""


def test_load_from_checkpoint_takes_a_data_module(space: Namespace, url: str, tmp_path: Path) -> None:
    class Data(space.pl.LightningDataModule):  # type: ignore[misc, name-defined]
        def __init__(self, seed: int = 0) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return trainers.data(self.hparams["seed"])

    trainer = space.trainer(tmp_path)
    trainer.fit(space.model(), datamodule=Data(seed=3))
    trainer.save_checkpoint(url)
    assert space.ours.load_from_checkpoint(Data, url, credential=KEY).hparams.seed == 3


def test_a_ckpt_file_goes_to_a_url_and_back(space: Namespace, url: str, tmp_path: Path) -> None:
    trainer = space.trainer(tmp_path, plugin=None)
    trainer.fit(space.model())
    trainer.save_checkpoint(file := tmp_path / "stock.ckpt")
    space.ours.import_checkpoint(file, url, credential=KEY)
    wanted = torch.load(file)
    assert_alike(space.plugin().load_checkpoint(url), wanted)
    space.ours.export_checkpoint(url, back := tmp_path / "back.ckpt", credential=KEY)
    assert_alike(torch.load(back), wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"stock.ckpt", "back.ckpt"}
    resumed = space.trainer(tmp_path, max_epochs=2, plugin=None)
    resumed.fit(space.model(), ckpt_path=back)
    assert resumed.global_step == 8


def test_conversions_replace_nothing_by_accident_and_run_no_code(space: Namespace, url: str, tmp_path: Path) -> None:
    ours = space.ours
    torch.save({"w": torch.ones(1)}, file := tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    ours.import_checkpoint(file, url, credential=KEY)
    with pytest.raises(CheckpointExistsError):
        ours.import_checkpoint(file, url, credential=KEY)
    ours.import_checkpoint(file, url, credential=KEY, overwrite=True)
    torch.save({"thing": trainers.Namespace("x")}, file)
    with pytest.raises(pickle.UnpicklingError):
        ours.import_checkpoint(file, url, credential=KEY, overwrite=True)
    ours.import_checkpoint(file, url, credential=KEY, overwrite=True, weights_only=False)
    with pytest.raises(UnsupportedCheckpointError):
        ours.export_checkpoint(url, file, credential=KEY)
    assert torch.load(file, weights_only=False)["thing"].name == "x"
