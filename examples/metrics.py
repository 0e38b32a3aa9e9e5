"""Watch checkpoints in TensorBoard: bytes, seconds, GB/s and retries of every save and load, failed ones too.

    python examples/metrics.py [https://ACCOUNT.blob.core.windows.net/CONTAINER/run]

Without a URL, Blob Storage is an emulator (Azurite) that this script starts. Without TensorBoard (pip install
tensorboard), the script only prints the figures.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.events import TransferEvent, listening

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class CheckpointMetrics:
    """A listener that feeds TensorBoard. In a job of several ranks, make one on each of them, or on rank 0 alone.

    Attributes:
        step: the training's, for the x axis.
    """

    def __init__(self, board: SummaryWriter | None) -> None:
        self._board = board
        self.step = 0

    def __call__(self, event: TransferEvent) -> None:
        figures = {
            "bytes": float(event.bytes),
            "seconds": event.seconds,
            "GB_per_s": event.bytes / event.seconds / 1e9,
            "retries": float(event.retries),
            "failed": float(event.error is not None),
        }
        for name, value in figures.items():
            print(f"step {self.step}  checkpoint/{event.operation}/{name}  {value:.6g}")
            if self._board is not None:
                self._board.add_scalar(f"checkpoint/{event.operation}/{name}", value, self.step)


def tensorboard() -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter()


def main() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is enough here
    with contextlib.ExitStack() as stack:
        if len(sys.argv) > 1:
            run = sys.argv[1]
        else:
            run = stack.enter_context(Azurite()).create_container("checkpoints") + "/run"
        board = tensorboard()
        if board is not None:
            stack.callback(board.close)
        metrics = CheckpointMetrics(board)
        stack.enter_context(listening(metrics))

        model = nn.Linear(1024, 1024)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(1, 4):
            metrics.step = step
            optimizer.zero_grad()
            model(torch.randn(8, 1024)).square().mean().backward()
            optimizer.step()
            dcp.save({"model": model.state_dict()}, storage_writer=AzureBlobWriter(f"{run}/step-{step}", progress=True))
        dcp.load({"model": model.state_dict()}, storage_reader=AzureBlobReader(f"{run}/step-3"))
        if board is not None:
            print(f"now: tensorboard --logdir {board.log_dir}")


if __name__ == "__main__":
    main()
