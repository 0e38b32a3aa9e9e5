"""Runs that are killed and resumed by another process, and runs of several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from azure_torch_ckpt import AccessDeniedError
from azure_torch_ckpt.location import BlobLocation
from tests.lightning import killed_run
from tests.support.deep_equality import assert_alike
from tests.support.ranks import Ranks
from tests.support.trainers import Namespace, etags, names

ROOT = Path(__file__).resolve().parents[2]
TOP_2 = {"epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt", "last.ckpt"}


def killed(folder: Path, **arguments: Any) -> None:
    """Run killed_run.py in another process, to the point where it is killed."""
    folder.mkdir()
    process = subprocess.run(
        [sys.executable, "-m", "tests.lightning.killed_run", json.dumps({"folder": str(folder), **arguments})],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not list(folder.iterdir())


def moved(value: Any, source: str, destination: str) -> Any:
    """A callback's state with the paths of another folder."""
    if isinstance(value, str):
        return value.replace(source, destination)
    if isinstance(value, dict):
        return {moved(key, source, destination): moved(item, source, destination) for key, item in value.items()}
    return value


@pytest.mark.parametrize(("namespace", "async_save"), [("lightning", False), ("pytorch_lightning", True)])
def test_a_killed_run_that_is_resumed_equals_an_uninterrupted_one_bit_for_bit(
    container: str, tmp_path: Path, namespace: str, async_save: bool
) -> None:
    whole_url, url = f"{container}/whole", f"{container}/run"
    whole = killed_run.run(namespace, whole_url, tmp_path)
    killed(tmp_path / "killed", namespace=namespace, url=url, async_save=async_save, kill_at_step=14)
    resumed = killed_run.run(namespace, url, tmp_path, async_save=async_save)
    assert resumed.pop("steps") == list(range(12, 20)) and whole.pop("steps") == list(range(20))
    assert resumed["optimizers"][0]["state"][0]["exp_avg"].count_nonzero()
    assert_alike(resumed, {**whole, "callbacks": moved(whole["callbacks"], whole_url, url)})
    assert names(url) == names(whole_url) == TOP_2


def test_a_kill_between_the_data_and_the_metadata_of_last_leaves_the_old_last(container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    committed = BlobLocation.parse(f"{url}/last.ckpt/.metadata").path
    killed(tmp_path / "killed", namespace="lightning", url=url, kill_at_commit=committed)
    below = {path.split("/")[2] for path in etags(f"{url}/last.ckpt")}
    assert len(below) == 3 and ".metadata" in below  # and the data of two saves
    assert killed_run.run("lightning", url, tmp_path)["steps"] == list(range(4, 20))


# ---- DDP -----------------------------------------------------------------------------------------------------------


def train_on_a_rank(
    namespace: str, url: str, folder: Path, epochs: int, async_save: bool, credential: Any = None
) -> dict[str, Any]:
    space = Namespace(namespace)
    plugin = space.plugin(credential, async_save=async_save)
    checkpoint = space.checkpoint(url, monitor="val_loss", save_top_k=2, save_last=True)
    trainer = space.trainer(folder, checkpoint, max_epochs=epochs, plugin=plugin, strategy="ddp", devices=2)
    model = space.model((5.0, 3.0, 4.0, 2.0, 6.0))
    try:
        trainer.fit(model, ckpt_path="last")
    except AccessDeniedError as error:
        return {"error": str(error), "steps": model.trained}
    return {"state": checkpoint.state_dict(), "steps": model.trained, "model": dict(model.state_dict())}


@pytest.mark.parametrize(("namespace", "async_save"), [("lightning", True), ("pytorch_lightning", False)])
def test_two_processes_save_once_and_agree_on_what_is_there(
    ranks: Ranks, container: str, tmp_path: Path, namespace: str, async_save: bool
) -> None:
    url = f"{container}/run"
    for epochs, wanted in (
        (2, {"epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "last.ckpt"}),
        (4, {"epoch=1-step=4.ckpt", "epoch=3-step=8.ckpt", "last.ckpt"}),
    ):
        first, second = ranks(2).run(train_on_a_rank, namespace, url, tmp_path, epochs, async_save)
        assert_alike(second["state"], first["state"])
        assert first["steps"] == list(range(epochs * 2 - 4, epochs * 2))
        # The statistics of a BatchNorm are each rank's own; rank 0's are saved.
        assert torch.equal(first["model"]["body.3.weight"], second["model"]["body.3.weight"])
        assert names(url) == wanted


def test_what_rank_0_is_refused_ends_the_other_ranks_too(ranks: Ranks, container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    outcomes = ranks(2).run(train_on_a_rank, "lightning", url, tmp_path, 1, False, False)
    assert [outcome["steps"] for outcome in outcomes] == [[], []]
    assert all(url.rpartition("/")[0] in outcome["error"] for outcome in outcomes)
