"""What differs between ranks is saved as rank 0 has it, and what is equal on all of them by any of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from azure_torch_ckpt.lightning import AzureBlobCheckpointIO, AzureDDPStrategy
from azure_torch_ckpt.lightning.fabric import AzureFabricDDPStrategy
from azure_torch_ckpt.objects import load_object
from azure_torch_ckpt.objects.sharded import load_sharded, save_sharded
from azure_torch_ckpt.objects.states import States, gathered
from tests.lightning import strategy_jobs
from tests.lightning.strategy_jobs import cloned, writers
from tests.support.containers import KEY
from tests.support.deep_equality import assert_alike
from tests.support.ranks import Ranks


def loaded(url: str) -> Any:
    return load_object(AzureBlobReader(url, credential=KEY), weights_only=False)


# ---- Models --------------------------------------------------------------------------------------------------------


class Counting(torch.optim.Adam):
    """With an entry of its state that belongs to no parameter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state["calls"] = torch.zeros(())  # type: ignore[index]
        self.state["note"] = "of no parameter"  # type: ignore[index]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.state["calls"] += 1  # type: ignore[index]
        return super().step(*args, **kwargs)


class Wrapping(torch.optim.Optimizer):
    """Keeps the optimizer in it under a key, beside tensors of its own, as Lookahead and its like do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([{"params": group["params"]} for group in inner.param_groups], {})
        self.inner = inner
        self.slow = [one.detach().clone() for group in inner.param_groups for one in group["params"]]

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        params = [one for group in self.inner.param_groups for one in group["params"]]
        for slow, fast in zip(self.slow, params, strict=True):
            slow.add_(fast.detach(), alpha=0.5)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "slow": {n: {"slow": slow} for n, slow in enumerate(self.slow)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self.slow = [entry["slow"] for entry in state_dict["slow"].values()]


def optimizer_of(kind: str, net: nn.Module) -> torch.optim.Optimizer:
    trained = [one for one in net.parameters() if one.requires_grad]
    if kind == "counting":
        return Counting(trained, lr=0.01)
    return Wrapping(torch.optim.Adam(trained, lr=0.01))


class Unsynchronised(nn.Module):
    """Parameters that each rank changes on its own, of the kinds that DDP lets differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Linear(5, 300)
        self.ignored = nn.Parameter(torch.ones(300, 300))
        self.frozen = nn.Parameter(torch.ones(300, 300), requires_grad=False)
        self.register_buffer("counts", torch.zeros(300, 300))
        self._ddp_params_and_buffers_to_ignore = ["ignored", "counts"]

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x) + self.ignored.sum(0)

    def change(self, rank: int) -> None:
        with torch.no_grad():
            self.frozen.add_(rank + 1)
            self.get_buffer("counts").add_(rank + 1)


def vq(kind: str) -> Any:
    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Unsynchronised()
            self._ddp_params_and_buffers_to_ignore = ["inner.ignored", "inner.counts"]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.inner.change(self.global_rank)
            return nn.functional.mse_loss(self.inner(batch[0]).mean(1, keepdim=True), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer_of(kind, self.inner)

        def train_dataloader(self) -> Any:
            return DataLoader(strategy_jobs.samples(), batch_size=12)

    return Model()


def fit(url: str, root: str, kind: str, resume: bool) -> Any:
    os.chdir(root)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=AzureDDPStrategy(),
        plugins=[AzureBlobCheckpointIO(KEY)],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = vq(kind)
    arguments: dict[str, Any] = {"ckpt_path": url, "weights_only": False} if resume else {}
    trainer.fit(module, **arguments)
    if not resume:
        trainer.save_checkpoint(url)
    return cloned(dict(module.state_dict())), cloned(trainer.optimizers[0].state_dict())


@pytest.mark.parametrize("kind", ["counting", "wrapping"])
def test_the_trainer_saves_and_resumes_rank_0s_state(ranks: Ranks, container: str, tmp_path: Path, kind: str) -> None:
    url = f"{container}/last.ckpt"
    (net, optimizer), (other, _) = ranks(2).run(fit, url, str(tmp_path), kind, False)
    for name in ("frozen", "ignored", "counts"):
        assert not torch.equal(net[f"inner.{name}"], other[f"inner.{name}"])
    saved = loaded(url)
    assert_alike(dict(saved["state_dict"]), net)
    assert_alike(saved["optimizer_states"], [optimizer])
    assert writers(url) == 2
    for resumed in ranks(2).run(fit, url, str(tmp_path), kind, True):
        assert_alike(resumed, (net, optimizer))


def run_fabric(url: str, kind: str, resume: bool) -> Any:
    """Local SGD: after the first step no rank gets the others' gradients."""
    fabric = Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=AzureFabricDDPStrategy(),
        plugins=[AzureBlobCheckpointIO(KEY)],
    )
    fabric.launch()
    inner = Unsynchronised()
    net, optimizer = fabric.setup(inner, optimizer_of(kind, inner))
    if resume:
        fabric.load(url, {"net": net, "optimizer": optimizer}, weights_only=False)
    else:
        x, y = strategy_jobs.samples().tensors
        for number in range(3):
            optimizer.zero_grad()
            with fabric.no_backward_sync(net, enabled=number > 0):
                fabric.backward((net(x + fabric.global_rank) - y).square().mean())
            optimizer.step()
        inner.change(fabric.global_rank)
        fabric.save(url, {"net": net, "optimizer": optimizer})
    return cloned(dict(inner.state_dict())), cloned(optimizer.optimizer.state_dict())


@pytest.mark.parametrize("kind", ["counting", "wrapping"])
def test_fabric_saves_and_loads_rank_0s_state(ranks: Ranks, container: str, kind: str) -> None:
    url = f"{container}/fabric"
    (net, optimizer), (other, _) = ranks(2).run(run_fabric, url, kind, False)
    assert not torch.equal(net["net.weight"], other["net.weight"])
    saved = loaded(url)
    assert_alike(dict(saved["net"]), net)
    assert_alike(saved["optimizer"], optimizer)
    for resumed in ranks(2).run(run_fabric, url, kind, True):
        assert_alike(resumed, (net, optimizer))


def wrapped_and_sharded(url: str, resume: bool) -> Any:
    """FSDP2 with an optimizer in an optimizer: its moments become DTensors again."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    torch.manual_seed(3)
    net = strategy_jobs.shard(strategy_jobs.network(), mesh)
    optimizer = Wrapping(Counting(net.parameters(), lr=0.01))
    states = States()
    if resume:
        value = load_sharded(
            AzureBlobReader(url, credential=KEY),
            torch.device("cpu"),
            lambda value: states.optimizer_dtensors(value, net, optimizer),
            weights_only=False,
        )
        assert isinstance(value["inner"]["state"][0]["exp_avg"], DTensor)
        states.load_optimizer(net, optimizer, value)
    x, y = strategy_jobs.samples().tensors
    net(x).sub(y).square().mean().backward()
    if not resume:
        optimizer.step()
        save_sharded(states.of_optimizer(net, optimizer), AzureBlobWriter(url, credential=KEY))
    state = cloned(gathered(optimizer.inner.state_dict(), True))
    optimizer.step()
    return state


def test_a_wrapped_optimizer_of_shards_goes_on(ranks: Ranks, container: str) -> None:
    saved, _ = ranks(2).run(wrapped_and_sharded, f"{container}/sharded", False)
    for resumed in ranks(2).run(wrapped_and_sharded, f"{container}/sharded", True):
        assert_alike(resumed, saved)
