"""Fabric's strategies on real processes: each loads what another one saved, and so does a single process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from azure_torch_ckpt.lightning import AzureBlobCheckpointIO
from azure_torch_ckpt.objects import load_object, save_object
from azure_torch_ckpt.objects.states import FsdpStates, States, gathered
from tests.lightning.strategy_jobs import STRATEGIES, adam, cloned, fsdp_on_the_cpu, network, samples, shard
from tests.support.containers import KEY
from tests.support.deep_equality import assert_alike
from tests.support.ranks import Ranks
from tests.support.trainers import Namespace


class Counter:
    """A user's object with a state."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[Any, Any]:
        return {"count": self.count, 7: (self.count, {})}

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        assert state[7] == (state["count"], {})
        self.count = state["count"]


@dataclass
class Job:
    """A Fabric, and the module and optimizer that it trains."""

    fabric: Any
    net: Any
    optimizer: Any

    def step(self, count: int) -> None:
        x, y = samples().tensors
        for number in range(count):
            part = slice(8 * number + 4 * self.fabric.global_rank, None, 8 * self.fabric.world_size)
            self.optimizer.zero_grad()
            self.fabric.backward(nn.functional.mse_loss(self.net(x[part]), y[part]))
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """The full states of the module and the optimizer."""
        strategy = self.fabric.strategy
        states = FsdpStates() if "FSDP" in type(strategy).__mro__[1].__name__ else States()
        net = self.net._forward_module
        net = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
        optimizer = self.optimizer.optimizer
        of_net, of_optimizer = states.of_module(net), states.of_optimizer(net, optimizer)
        return {"net": cloned(gathered(of_net, True)), "optimizer": cloned(gathered(of_optimizer, True))}


def job(kind: str, package: str = "lightning", whole: bool = False) -> Job:
    space = Namespace(package)
    strategy_class = getattr(space.module("fabric"), STRATEGIES[kind].replace("Azure", "AzureFabric"))
    arguments: dict[str, Any] = {}
    if kind == "fsdp":
        strategy_class = fsdp_on_the_cpu(strategy_class)
        arguments = {"state_dict_type": "full" if whole else "sharded"}
    if kind == "fsdp2":
        sizes = {"data_parallel_size": dist.get_world_size(), "tensor_parallel_size": 1}
        arguments = {"parallelize_fn": shard, "save_distributed_checkpoint": not whole, **sizes}
    fabric = space.fabric.Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy_class(**arguments),
        plugins=[space.plugin()],
    )
    fabric.launch()
    torch.manual_seed(5)
    net = network()
    if kind == "ddp":
        return Job(fabric, *fabric.setup(net, adam(net)))
    net = fabric.setup_module(net)
    return Job(fabric, net, fabric.setup_optimizers(adam(net)))


def save(kind: str, url: str, root: str, package: str, whole: bool) -> dict[str, Any]:
    os.chdir(root)
    made = job(kind, package, whole)
    made.step(2)
    made.fabric.save(url, {"net": made.net, "optimizer": made.optimizer, "counter": Counter(3), "note": {1: "x"}})
    return made.state()


def load(kind: str, url: str, root: str, package: str = "lightning") -> dict[str, Any]:
    os.chdir(root)
    made = job(kind, package)
    counter = Counter()
    state = {"net": made.net, "optimizer": made.optimizer, "counter": counter}
    rest = made.fabric.load(url, state, weights_only=False)
    assert (counter.count, rest) == (3, {"note": {1: "x"}})
    return made.state()


@pytest.mark.parametrize(
    ("kind", "package", "whole"),
    [
        ("ddp", "lightning", False),
        ("fsdp2", "lightning", False),
        ("fsdp2", "pytorch_lightning", True),
        ("fsdp", "lightning", False),
        ("fsdp", "lightning", True),
    ],
)
def test_a_state_is_loaded_by_every_strategy_on_any_number_of_ranks(
    ranks: Ranks, container: str, tmp_path: Path, kind: str, package: str, whole: bool
) -> None:
    url = f"{container}/state"
    saved, _ = ranks(2).run(save, kind, url, str(tmp_path), package, whole)
    assert saved["optimizer"]["state"][0]["exp_avg"].any()
    for other, size in [("ddp", 3), ("fsdp2", 3), ("fsdp", 2)]:
        for state in ranks(size).run(load, other, url, str(tmp_path)):
            assert_alike(state, saved)
    alone = AzureBlobCheckpointIO(KEY).load_checkpoint(url, weights_only=False)
    assert_alike(dict(alone["net"]), saved["net"])
    assert_alike(alone["optimizer"], saved["optimizer"])
    assert (alone["counter"], alone["note"]) == (Counter(3).state_dict(), {1: "x"})
    assert not list(tmp_path.iterdir())


def checked(function: Callable[[Job, str], Any], kind: str, url: str) -> Any:
    return function(job(kind), url)


def load_more_than_there_is(made: Job, url: str) -> None:
    before = made.state()
    state = {"net": made.net, "optimizer": made.optimizer, "more": 1}
    with pytest.raises(KeyError, match="more"):
        made.fabric.load(url, state, weights_only=False)
    assert_alike(made.state(), before)
    made.fabric.load(url, state, strict=False, weights_only=False)
    assert state["more"] == 1
    assert not torch.equal(made.state()["net"]["0.weight"], before["net"]["0.weight"])


def load_bare(made: Job, url: str) -> Any:
    made.fabric.load_raw(url, made.net)
    return made.state()["net"]


def load_everything(made: Job, url: str) -> Any:
    return cloned(made.fabric.load(url, weights_only=False))


def save_some(made: Job, url: str) -> None:
    made.fabric.save(url, {"net": made.net}, filter={"net": lambda name, value: name.endswith("weight")})


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp"])
def test_parts_of_a_state_are_saved_and_loaded(ranks: Ranks, container: str, kind: str) -> None:
    torch.manual_seed(9)
    net = network()
    whole, bare, some = (f"{container}/{name}" for name in ("whole", "bare", "some"))
    everything = {"net": net.state_dict(), "optimizer": adam(net).state_dict(), "note": (1, 2)}
    save_object(everything, AzureBlobWriter(whole, credential=KEY))
    save_object(net.state_dict(), AzureBlobWriter(bare, credential=KEY))
    ranks(2).run(checked, load_more_than_there_is, kind, whole)
    for state in ranks(2).run(checked, load_bare, kind, bare):
        assert_alike(state, cloned(dict(net.state_dict())))
    for state in ranks(2).run(checked, load_everything, kind, whole):
        assert_alike(state, cloned({**everything, "net": dict(net.state_dict())}))
    ranks(2).run(checked, save_some, kind, some)
    kept = load_object(AzureBlobReader(some, credential=KEY))["net"]
    assert set(kept) == {name for name in net.state_dict() if name.endswith("weight")}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp"])
def test_a_state_by_name_as_stock_strategies_save_it_is_understood(
    ranks: Ranks, container: str, tmp_path: Path, kind: str
) -> None:
    url = f"{container}/by-name"
    torch.manual_seed(9)
    net = network()
    optimizer = adam(net)
    net(samples().tensors[0]).sum().backward()
    optimizer.step()
    by_name = get_optimizer_state_dict(net, optimizer)
    assert "0.weight" in by_name["state"]
    checkpoint = {"net": net.state_dict(), "optimizer": by_name, "counter": Counter(3).state_dict(), "note": {1: "x"}}
    save_object(checkpoint, AzureBlobWriter(url, credential=KEY))
    for state in ranks(2).run(load, kind, url, str(tmp_path)):
        assert_alike(state["net"], cloned(dict(net.state_dict())))
        assert_alike(state["optimizer"]["state"], cloned(optimizer.state_dict()["state"]))
        groups = [(group["lr"], group["params"]) for group in state["optimizer"]["param_groups"]]
        assert groups == [(group["lr"], group["params"]) for group in optimizer.state_dict()["param_groups"]]
