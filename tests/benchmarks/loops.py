"""What a training loop loses while ``dcp.async_save`` saves beside it."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from azure_torch_ckpt import AzureBlobWriter, TransferOptions
from tests.benchmarks import works
from tests.benchmarks.spec import WARM, AsyncCase, Job

_IDLE_SECONDS = 3.0


def run(job: Job) -> dict[str, float]:
    """Run a loop alone, then beside one asynchronous save.

    Returns:
        ``blocked``: seconds that the call of ``async_save`` took (it copies the state dict); ``save``: seconds from the
        call to the end of the save; ``lost``: seconds of that time in which the loop did not do what it would have done
        alone, the blocked ones among them; ``share``: ``lost`` without the blocked seconds, as a share of the time that
        the loop ran beside the save; ``payload``: bytes of the state dict.
    """
    case = job.case
    assert isinstance(case, AsyncCase)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the other core is for the save and the server
    step = _python_step if case.loop == "python" else _torch_step()
    state = works.build(case.tensors)
    with tempfile.TemporaryDirectory(prefix="benchmark-disk-") as folder:
        _save(case, job, works.build(WARM), "warm", folder).result()
        alone = _rate(step)
        begin = time.monotonic()
        future = _save(case, job, state, "measured", folder)
        begin_loop = time.monotonic()
        count = 0
        while not future.done():
            step()
            count += 1
        end = time.monotonic()
        future.result()
    beside = end - begin_loop
    missing = beside - count / alone
    return {
        "blocked": begin_loop - begin,
        "save": end - begin,
        "lost": begin_loop - begin + missing,
        "share": missing / beside,
        "payload": works.nbytes(state),
    }


def _save(case: AsyncCase, job: Job, state: works.State, name: str, folder: str) -> Future[Any]:
    writer: StorageWriter
    if case.writer == "disk":
        writer = dcp.FileSystemWriter(Path(folder, name))
    else:
        writer = AzureBlobWriter(
            f"{job.address.container_url}/{job.path}/{name}",
            credential=job.address.key,
            options=TransferOptions(concurrency=case.connections),
            ca_file=job.address.ca_file,
        )
    future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType[case.mode])
    assert isinstance(future, Future)
    return future


def _rate(step: Callable[[], None]) -> float:
    """Steps a second."""
    step()
    begin, count = time.monotonic(), 0
    while (now := time.monotonic()) < begin + _IDLE_SECONDS:
        step()
        count += 1
    return count / (now - begin)


def _python_step() -> None:
    """About a millisecond of bytecode that never releases the GIL on its own initiative."""
    total = 0
    for number in range(20_000):
        total += number & 3


def _torch_step() -> Callable[[], None]:
    """A step of some 10 ms of a small network on the CPU."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.ones(128, 512)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return step
