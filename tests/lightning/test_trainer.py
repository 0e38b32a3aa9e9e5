"""The Trainer's other parts beside checkpoints in Blob Storage: tuners, averages, loggers, SLURM, bars."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.deep_equality import assert_alike
from tests.support.trainers import Namespace, names, trained_state


def fail_after(batches: int) -> Callable[..., None]:
    """A hook of a model that lets so many batches begin."""
    left = iter(range(batches))

    def on_train_batch_start(*_: Any) -> None:
        if next(left, None) is None:
            raise KeyError("the end of this run")

    return on_train_batch_start


# ---- Tuners --------------------------------------------------------------------------------------------------------


def test_the_learning_rate_and_the_batch_size_can_be_searched(space: Namespace, container: str, folder: Path) -> None:
    url = f"{container}/run"
    checkpoint = space.checkpoint(url, save_last=True)
    trainer = space.trainer(folder, checkpoint, max_epochs=10)
    tuner = space.pl.tuner.Tuner(trainer)
    model = space.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tuner.lr_find(model, num_training=30, early_stop_threshold=None)
    assert model.lr == found.suggestion() != 0.01
    assert tuner.scale_batch_size(model, max_trials=2, steps_per_trial=1) == model.batch_size > 2
    assert_alike(dict(model.state_dict()), before)
    assert not names(container)
    model.trained.clear()
    trainer.fit(model)
    assert model.trained == list(range(len(model.trained))) and len(model.trained) < 40
    assert names(url) == {f"epoch=9-step={len(model.trained)}.ckpt", "last.ckpt"}


def test_finders_at_the_start_of_a_resumed_fit_leave_its_checkpoint_alone(
    space: Namespace, container: str, folder: Path
) -> None:
    url = f"{container}/run"
    space.trainer(folder, space.checkpoint(url), max_epochs=1).fit(space.model())
    finders = [
        space.pl.callbacks.LearningRateFinder(num_training_steps=30, early_stop_threshold=None),
        space.pl.callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=1),
    ]
    plugin = space.plugin(async_save=True)
    trainer = space.trainer(folder, *finders, space.checkpoint(url), max_epochs=3, plugin=plugin)
    trainer.fit(model := space.model(), ckpt_path=f"{url}/epoch=0-step=4.ckpt")
    assert trainer.current_epoch == 3 and model.batch_size > 2
    assert len(names(url)) == 2 and "epoch=0-step=4.ckpt" in names(url)


# ---- Checkpoints of other callbacks --------------------------------------------------------------------------------


def test_an_on_exception_checkpoint_is_found_by_the_next_fit_and_removed_at_its_end(
    space: Namespace, container: str, folder: Path
) -> None:
    url = f"{container}/run"
    callbacks = [space.pl.callbacks.OnExceptionCheckpoint(url), space.checkpoint(url)]
    with pytest.raises(KeyError):
        space.trainer(folder, *callbacks, max_epochs=3).fit(space.model(on_train_batch_start=fail_after(6)))
    assert names(url) == {"epoch=0-step=4.ckpt", "on_exception.ckpt"}
    callbacks = [space.pl.callbacks.OnExceptionCheckpoint(url), space.checkpoint(url)]
    model = space.model()
    space.trainer(folder, *callbacks, max_epochs=3).fit(model)
    assert model.trained == list(range(6, 12))
    assert names(url) == {"epoch=2-step=12.ckpt"}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("EMAWeightAveraging", {"decay": 0.9}), ("StochasticWeightAveraging", {"swa_lrs": 0.02, "swa_epoch_start": 2})],
)
def test_averaged_weights_go_on_where_they_were(
    space: Namespace, container: str, folder: Path, kind: str, arguments: dict[str, Any]
) -> None:
    def run(url: str, **attributes: Any) -> tuple[Any, Any]:
        averaging = getattr(space.pl.callbacks, kind)(**arguments)
        trainer = space.trainer(folder, averaging, space.checkpoint(url, save_last=True), max_epochs=5)
        model = space.model(**attributes)
        trainer.fit(model, ckpt_path="last")
        return trainer, model

    whole = trained_state(*run(f"{container}/whole"))
    with pytest.raises(KeyError):
        run(f"{container}/run", on_train_batch_start=fail_after(18))
    trainer, model = run(f"{container}/run")
    assert model.trained[:4] == list(range(16, 20))
    resumed = trained_state(trainer, model)
    for part in ("model", "optimizers", "schedulers", "global_step"):
        assert_alike(resumed[part], whole[part])


# ---- Logs on the local disk ----------------------------------------------------------------------------------------


def test_logs_are_local_while_checkpoints_are_remote(space: Namespace, container: str, folder: Path) -> None:
    loggers = [space.pl.loggers.CSVLogger(folder / "csv"), space.pl.loggers.TensorBoardLogger(folder / "board")]
    url = f"{container}/run"
    space.trainer(folder, space.checkpoint(url), logger=loggers, log_every_n_steps=1).fit(space.model())
    assert names(url) == {"epoch=0-step=4.ckpt"}
    assert "train_loss" in (folder / "csv/lightning_logs/version_0/metrics.csv").read_text()
    assert list((folder / "board").rglob("events.out.tfevents.*"))


def test_loggers_are_told_urls_and_the_user_that_they_upload_none(
    space: Namespace, container: str, folder: Path
) -> None:
    scan = space.pl.loggers.utilities._scan_checkpoints
    told: list[tuple[str, Any]] = []

    class Uploading(space.pl.loggers.logger.DummyLogger):  # type: ignore[name-defined,misc]
        """Does with checkpoints what Lightning's loggers for services that keep them do."""

        _log_model = "all"

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            told.append((checkpoint_callback.best_model_path, scan(checkpoint_callback, {})))

    url = f"{container}/run"
    with pytest.warns(UserWarning, match="Uploading uploads checkpoints only from a local disk"):
        space.trainer(folder, space.checkpoint(url), logger=[Uploading()], max_epochs=2).fit(space.model())
    assert told == [(f"{url}/epoch=0-step=4.ckpt", []), (f"{url}/epoch=1-step=8.ckpt", [])]


# ---- SLURM ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of one task; what it asks of scontrol is written to the file that is returned."""
    asked = folder / "asked"
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > "{asked}"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7012", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    return asked


def test_a_slurm_requeue_goes_through_the_local_root_beside_remote_checkpoints(
    space: Namespace, container: str, folder: Path, slurm: Path
) -> None:
    def interrupt(*_: Any) -> None:
        if model.trainer.global_step == 6:
            signal.raise_signal(signal.SIGUSR1)
            model.trainer.should_stop = True

    url, shared = f"{container}/run", folder / "local"
    shared.mkdir()
    model = space.model(on_train_batch_start=interrupt)
    before = signal.getsignal(signal.SIGUSR1)
    trainer = space.trainer(shared, space.checkpoint(url, save_last=True), max_epochs=3)
    trainer.fit(model)
    signal.signal(signal.SIGUSR1, before)
    assert slurm.read_text() == "requeue 7012\n"
    assert [path.name for path in shared.iterdir()] == ["hpc_ckpt_1.ckpt"]
    for ckpt_path in (None, "hpc"):
        again = space.trainer(shared, space.checkpoint(url, save_last=True), max_epochs=3)
        model = space.model()
        again.fit(model, ckpt_path=ckpt_path)
        assert again.ckpt_path == str(shared / "hpc_ckpt_1.ckpt")
        assert model.trained[0] == 6 and again.global_step == 12


# ---- Progress bars -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
def test_progress_bars_show_what_they_show_with_local_checkpoints(
    space: Namespace, container: str, folder: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    shown = []
    for checkpoint in (space.stock(folder / "local" / "stock"), space.checkpoint(f"{container}/run")):
        bar = getattr(space.pl.callbacks, kind)()
        trainer = space.trainer(folder, checkpoint, bar, enable_progress_bar=True, max_epochs=2)
        capfd.readouterr()
        trainer.fit(space.model())
        out, err = capfd.readouterr()
        assert re.search(r"Epoch 1/?1?.*4/4", out + err, re.DOTALL)
        # The times differ, and with them how often a bar is drawn anew; its lines are the same.
        shown.append((out + err).split("\n"))
        assert "blob" not in out + err
    assert len(shown[0]) == len(shown[1])
