"""The Trainer's strategies on real processes: resumed runs, and checkpoints that move between strategies and sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from azure_torch_ckpt import CheckpointNotFoundError
from azure_torch_ckpt.catalog import list_checkpoints
from azure_torch_ckpt.errors import ConfigurationError
from azure_torch_ckpt.lightning import AzureBlobCheckpointIO, AzureDDPStrategy, AzureModelParallelStrategy
from azure_torch_ckpt.lightning.stock import AsyncCheckpointIO, TorchCheckpointIO, pytorch
from azure_torch_ckpt.lightning.strategy_check import check_strategy
from tests.lightning import strategy_jobs
from tests.lightning.strategy_jobs import Run, writers
from tests.support.containers import KEY
from tests.support.deep_equality import assert_alike
from tests.support.ranks import Ranks

WHOLE_ON_RANK_0 = {"fsdp2": ("save_distributed_checkpoint", False), "fsdp": ("state_dict_type", "full")}


def loaded(url: str) -> dict[str, Any]:
    """The checkpoint, loaded by the plugin in this process."""
    return AzureBlobCheckpointIO(KEY).load_checkpoint(url, weights_only=False)


@pytest.mark.parametrize(
    ("kind", "package", "shards"),
    [
        ("ddp", "lightning", True),
        ("ddp", "pytorch_lightning", True),
        ("fsdp2", "lightning", True),
        ("fsdp2", "lightning", False),
        ("fsdp", "lightning", True),
        ("fsdp", "lightning", False),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    ranks: Ranks, container: str, tmp_path: Path, kind: str, package: str, shards: bool
) -> None:
    arguments = () if shards else (WHOLE_ON_RANK_0[kind],)
    run = Run(kind, 2, str(tmp_path), arguments=arguments, package=package)
    whole, other_rank = ranks(2).run(strategy_jobs.fit, dataclasses.replace(run, save=f"{container}/whole"))
    half = f"{container}/half"
    ranks(2).run(strategy_jobs.fit, dataclasses.replace(run, epochs=1, save=half))
    resumed, _ = ranks(2).run(strategy_jobs.fit, dataclasses.replace(run, resume=half, save=f"{container}/resumed"))
    assert whole["step"] == 12
    statistics = "net.1.running_mean"
    assert not torch.equal(whole["model"][statistics], other_rank["model"][statistics])
    # Buffers go on from rank 0's on all ranks, and the parameters do not depend on them in training.
    assert_alike(resumed, whole)
    saved, again = loaded(f"{container}/whole"), loaded(f"{container}/resumed")
    assert_alike(dict(saved["state_dict"]), whole["model"])
    assert_alike(saved["optimizer_states"], [whole["optimizer"]])
    assert_alike(again, saved)
    assert writers(f"{container}/whole") == (2 if shards else 1)
    assert not list(tmp_path.iterdir())


def test_checkpoints_move_between_all_strategies_and_numbers_of_ranks(
    ranks: Ranks, container: str, tmp_path: Path
) -> None:
    run = Run("stock", 1, str(tmp_path))
    first = f"{container}/first"
    strategy_jobs.fit(dataclasses.replace(run, save=first))
    wanted = loaded(first)
    assert wanted["optimizer_states"][0]["state"][7]["exp_avg"].any()
    url = first
    for kind, size in [("ddp", 2), ("fsdp2", 2), ("ddp", 3), ("fsdp", 2), ("fsdp2", 3), ("stock", 1), ("fsdp", 3)]:
        stage = dataclasses.replace(run, kind=kind, resume=url, save=f"{container}/{kind}-{size}")
        # The one epoch is over, so what is loaded is saved as it is.
        reached = [strategy_jobs.fit(stage)] if kind == "stock" else ranks(size).run(strategy_jobs.fit, stage)
        for state in reached:
            assert_alike(state["model"], dict(wanted["state_dict"]))
            assert_alike(state["optimizer"], wanted["optimizer_states"][0])
        url = stage.save
        saved = loaded(url)
        assert_alike(dict(saved["state_dict"]), dict(wanted["state_dict"]))
        for entry in ("optimizer_states", "lr_schedulers"):
            assert_alike(saved[entry], wanted[entry])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_callback_saves_and_resumes_from_last(ranks: Ranks, container: str, tmp_path: Path, kind: str) -> None:
    run = Run(kind, 1, str(tmp_path), folder=f"{container}/run", async_save=True)
    ranks(2).run(strategy_jobs.fit, run)
    resumed, _ = ranks(2).run(strategy_jobs.fit, dataclasses.replace(run, epochs=2, resume="last"))
    whole, _ = ranks(2).run(strategy_jobs.fit, dataclasses.replace(run, epochs=2, folder="", async_save=False))
    assert_alike(resumed, whole)
    names = {entry.name for entry in list_checkpoints(run.folder, credential=KEY)}
    assert "last.ckpt" in names
    assert writers(f"{run.folder}/last.ckpt") == 2
    assert not list(tmp_path.iterdir())


def test_a_test_run_loads_no_optimizer(ranks: Ranks, container: str, tmp_path: Path) -> None:
    url = f"{container}/trained"
    reached, _ = ranks(2).run(strategy_jobs.fit, Run("ddp", 1, str(tmp_path), save=url))
    for kind in ("ddp", "fsdp2"):
        states = ranks(2).run(strategy_jobs.score, Run(kind, 1, str(tmp_path), resume=url))
        for state in states:
            assert_alike(state, reached["model"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_lightnings_own_strategy_handles_local_paths(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    run = Run(kind, 1, str(tmp_path), save=str(tmp_path / "local.ckpt"))
    reached, _ = ranks(2).run(strategy_jobs.fit, run)
    assert (tmp_path / "local.ckpt").is_dir() == (kind == "fsdp2")
    again, _ = ranks(2).run(strategy_jobs.fit, dataclasses.replace(run, save="", resume=run.save))
    assert_alike(parameters(again), parameters(reached))
    assert_alike(again["optimizer"]["state"], reached["optimizer"]["state"])


def parameters(reached: dict[str, Any]) -> dict[str, Any]:
    """The parameters alone: Lightning's own sharded checkpoint may have any rank's buffers."""
    return {name: value for name, value in reached["model"].items() if name.endswith(("weight", "bias"))}


def missing(run: Run) -> str:
    try:
        strategy_jobs.fit(run)
    except CheckpointNotFoundError as error:
        return str(error)
    raise AssertionError("there is a checkpoint")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_missing_checkpoint_raises_on_every_rank(ranks: Ranks, container: str, tmp_path: Path, kind: str) -> None:
    url = f"{container}/nothing"
    messages = ranks(2).run(missing, Run(kind, 1, str(tmp_path), resume=url))
    assert all(url in message for message in messages)


@pytest.mark.parametrize(
    ("strategy", "remedy"),
    [
        (pytorch.strategies.FSDPStrategy, "AzureFSDPStrategy"),
        (pytorch.strategies.ModelParallelStrategy, "AzureModelParallelStrategy"),
    ],
)
def test_stock_strategies_that_would_write_files_are_refused(strategy: Any, remedy: str) -> None:
    url = "https://account.blob.core.windows.net/container/run"
    made = strategy()
    made.checkpoint_io = AzureBlobCheckpointIO(KEY)
    with pytest.raises(ConfigurationError, match=remedy):
        check_strategy(made, url)
    check_strategy(made, "a/folder")
    check_strategy(made, None)


def test_a_strategy_needs_the_plugin_and_finds_it_in_a_wrapper() -> None:
    url = "https://account.blob.core.windows.net/container/run"
    stock = pytorch.strategies.SingleDeviceStrategy()
    for other in (TorchCheckpointIO(), AsyncCheckpointIO()):
        stock.checkpoint_io = other
        with pytest.raises(ConfigurationError, match="AzureBlobCheckpointIO"):
            check_strategy(stock, url)
    stock.checkpoint_io = AzureBlobCheckpointIO(KEY)
    check_strategy(stock, url)
    stock.checkpoint_io = AsyncCheckpointIO(AzureBlobCheckpointIO(KEY))
    check_strategy(stock, url)
    for ours in (AzureDDPStrategy(), AzureModelParallelStrategy(), AzureDDPStrategy(checkpoint_io=AsyncCheckpointIO())):
        check_strategy(ours, url)


def test_a_rank_that_fails_fails_the_save_on_all_and_nothing_is_visible(
    ranks: Ranks, container: str, tmp_path: Path
) -> None:
    url = f"{container}/never"
    messages = ranks(2).run(broken, Run("ddp", 1, str(tmp_path), save=url))
    assert all("rank 1" in message and "no pickle" in message for message in messages), messages
    assert not list_checkpoints(container, credential=KEY)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("no pickle of this")


def broken(run: Run) -> str:
    strategy_jobs.fit(dataclasses.replace(run, save=""))
    used = strategy_jobs.trainer(run)
    module = strategy_jobs.model("lightning")
    used.fit(module)
    if used.global_rank == 1:
        module.on_save_checkpoint = lambda checkpoint: checkpoint.update(extra=Unpicklable())
    try:
        used.save_checkpoint(run.save)
    except Exception as error:
        return f"rank {used.global_rank if isinstance(error, ValueError) else 1}: {error}"
    raise AssertionError("it was saved")
