"""Jobs for the ranks of the tests of strategies: they run Trainers and return the states that these reach."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from azure_torch_ckpt.catalog import list_checkpoints
from azure_torch_ckpt.objects.states import FsdpStates, States, gathered
from tests.support.containers import KEY
from tests.support.trainers import Namespace

STRATEGIES = {"ddp": "AzureDDPStrategy", "fsdp2": "AzureModelParallelStrategy", "fsdp": "AzureFSDPStrategy"}


@dataclass(frozen=True)
class Run:
    """One call of ``Trainer.fit``.

    Attributes:
        kind: of strategy: a key of `STRATEGIES`, or "stock" for one process without a strategy.
        root: the working folder, which must stay empty.
        save: path to save the final state to.
        resume: path of the checkpoint to start from.
        folder: the `dirpath` of an `AzureBlobModelCheckpoint`; "" for no callback.
        arguments: of the strategy.
        package: ours, for one of Lightning's distributions.
    """

    kind: str
    epochs: int
    root: str
    save: str = ""
    resume: str = ""
    folder: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    package: str = "lightning"
    async_save: bool = False


def network() -> nn.Sequential:
    """Shapes that no number of ranks divides, a layer with a single row, and buffers that differ between ranks."""
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 1))


def adam(net: nn.Module) -> torch.optim.Adam:
    """Two groups, so that the order of an optimizer's parameters is not the module's."""
    biases = [one for name, one in net.named_parameters() if name.endswith("bias")]
    weights = [one for name, one in net.named_parameters() if not name.endswith("bias")]
    return torch.optim.Adam([{"params": biases, "lr": 0.02}, {"params": weights, "weight_decay": 0.1}], lr=0.01)


def shard(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in net.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])
    return net


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(48, 5, generator=generator), torch.randn(48, 1, generator=generator))


def model(package: str) -> Any:
    """A LightningModule for our `package`."""

    class Model(Namespace(package).pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.net = network()

        def configure_model(self) -> None:
            if (mesh := self.device_mesh) is not None and not isinstance(next(self.parameters()), DTensor):
                shard(self.net, mesh)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            optimizer = adam(self.net)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]

        def train_dataloader(self) -> Any:
            return DataLoader(samples(), batch_size=4)

        test_dataloader = train_dataloader

    return Model()


def trainer(run: Run) -> Any:
    space = Namespace(run.package)
    strategy: Any = "auto"
    if run.kind != "stock":
        strategy_class = getattr(space.ours, STRATEGIES[run.kind])
        arguments = dict(run.arguments)
        if run.kind == "fsdp2":
            arguments.update(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
        strategy = (fsdp_on_the_cpu(strategy_class) if run.kind == "fsdp" else strategy_class)(**arguments)
    callbacks = []
    if run.folder:
        callbacks.append(space.checkpoint(dirpath=run.folder, save_last=True, save_top_k=1))
    return space.pl.Trainer(
        accelerator="cpu",
        devices=1 if run.kind == "stock" else dist.get_world_size(),
        strategy=strategy,
        plugins=[space.plugin(async_save=run.async_save)],
        callbacks=callbacks,
        max_epochs=run.epochs,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def fit(run: Run) -> dict[str, Any]:
    """Train; return the full state, which is the same on all ranks except for what DDP lets differ."""
    os.chdir(run.root)
    used = trainer(run)
    used.fit(model(run.package), ckpt_path=run.resume or None)
    reached = reached_state(used)
    if run.save:
        used.save_checkpoint(run.save)
    return reached


def score(run: Run) -> Any:
    """Load a checkpoint for a test, without any optimizer; return the module's state."""
    os.chdir(run.root)
    used = trainer(run)
    used.test(model(run.package), ckpt_path=run.resume, verbose=False)
    return cloned(gathered(States().of_module(used.lightning_module), True))


def reached_state(used: Any) -> dict[str, Any]:
    """The state that a resumed run and an uninterrupted one must have in common."""
    is_fsdp = "FSDP" in type(used.strategy).__mro__[1].__name__
    states = FsdpStates() if is_fsdp else States()
    module = used.strategy.model if is_fsdp else used.lightning_module
    (optimizer,) = used.optimizers
    return {
        "model": cloned(gathered(states.of_module(module), True)),
        "optimizer": cloned(gathered(states.of_optimizer(module, optimizer), True)),
        "schedule": used.lr_scheduler_configs[0].scheduler.state_dict(),
        "step": used.global_step,
        "epoch": used.current_epoch,
    }


def writers(url: str) -> int:
    """How many ranks wrote data of the checkpoint."""
    (entry,) = list_checkpoints(url, credential=KEY)
    assert entry.complete
    return int(entry.blobs) - 1


def cloned(state: Any) -> Any:
    """A copy of a state: tensors in plain dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: cloned(value) for key, value in state.items()}
    return [cloned(value) for value in state] if isinstance(state, list) else state


def fsdp_on_the_cpu(strategy_class: Any) -> Any:
    """A subclass of a strategy that runs FSDP on the CPU, which FSDP does only if it is told to."""

    class OnCpu(strategy_class):  # type: ignore[misc]
        def _setup_model(self, module: nn.Module) -> nn.Module:
            return wrapped(module, self.kwargs)

        def setup_module(self, module: nn.Module) -> nn.Module:
            return wrapped(module, self._fsdp_kwargs)

    return OnCpu


def wrapped(module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    policy = ModuleWrapPolicy({nn.Linear})
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), auto_wrap_policy=policy, **arguments)
