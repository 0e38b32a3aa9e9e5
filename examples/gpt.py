"""A small GPT, trained with FSDP2, that keeps its checkpoints in Azure Blob Storage.

    torchrun --nproc-per-node 2 examples/gpt.py https://ACCOUNT.blob.core.windows.net/CONTAINER/run-1

Start it again, on another number of processes too, and it goes on from its newest checkpoint. It runs on CPUs, so that
it runs everywhere; the lines about checkpoints are the same on GPUs.
"""

from __future__ import annotations

import argparse
import os
import time
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, CheckpointNotFoundError

VOCABULARY = 256  # bytes
CONTEXT = 64
WIDTH = 128
HEADS = 4
LAYERS = 4
BATCH = 12  # sequences in a step, over all ranks; 1, 2, 3, 4, 6 and 12 ranks can share it


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads: Tensor = self.qkv(self.norm_1(x)).unflatten(-1, (HEADS, -1)).transpose(-3, -2)
        query, key, value = heads.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        x = x + self.mlp(self.norm_2(x))
        return x


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def read_text() -> Tensor:
    """Python's language reference, as `help()` shows it: 450 kB of English."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def batch(text: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """This rank's share of a step's inputs and targets. The step alone decides which sequences all ranks get."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
    mine = starts.chunk(dist.get_world_size())[dist.get_rank()]
    windows = torch.stack([text[start : start + CONTEXT + 1] for start in mine.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]


class TrainingState(Stateful):
    """All that a resumed run needs to go on as if nothing had happened."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.step = 0  # the last one done; the order of the data follows from it

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]


def newest_checkpoint(run: str, steps: range) -> str | None:
    """URL of the newest complete checkpoint among those that the run may have saved at `steps`.

    All ranks get the same answer, since none of them saves anything yet.
    """
    for step in reversed(steps):
        try:
            AzureBlobReader(f"{run}/step-{step}").read_metadata()
        except CheckpointNotFoundError:
            continue
        return f"{run}/step-{step}"
    return None


def train(run: str, steps: int, save_every: int) -> None:
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    rank = dist.get_rank()
    print(f"rank {rank} is process {os.getpid()}", flush=True)

    torch.manual_seed(0)  # every rank makes the same model, then keeps its shard
    model = GPT()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = TrainingState(model, optimizer)

    url = newest_checkpoint(run, range(save_every, steps + 1, save_every))
    if url is not None:
        start = time.perf_counter()
        dcp.load({"app": state}, storage_reader=AzureBlobReader(url))
        if rank == 0:
            print(f"loaded step {state.step} in {time.perf_counter() - start:.3f} s", flush=True)

    text = read_text()
    while state.step < steps:
        state.step += 1
        inputs, targets = batch(text, state.step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {state.step} loss {mean.item():.7f}", flush=True)

        if state.step % save_every == 0:
            start = time.perf_counter()
            dcp.save({"app": state}, storage_writer=AzureBlobWriter(f"{run}/step-{state.step}"))
            if rank == 0:
                print(f"saved step {state.step} in {time.perf_counter() - start:.3f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="URL below which the checkpoints lie")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100)
    train(**vars(parser.parse_args()))
