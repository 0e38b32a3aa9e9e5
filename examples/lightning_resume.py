"""Kill a Lightning training with SIGKILL, start it again, and see that it ends where an unbroken one ends.

    python examples/lightning_resume.py

Blob Storage is an emulator (Azurite) that this script starts. `train` is the part to copy: the same call starts and
resumes a run. With a storage account, run that part alone:

    python examples/lightning_resume.py https://ACCOUNT.blob.core.windows.net/CONTAINER/run-1
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from azure_torch_ckpt.catalog import list_checkpoints
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.lightning import AzureBlobCheckpointIO, AzureBlobModelCheckpoint, load_from_checkpoint

EPOCHS = 6
BATCHES = 20  # in an epoch
KILLED_AT = 70  # in the middle of the fourth epoch


class Spiral(pl.LightningModule):
    """Tells the two arms of a spiral apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(self.layers(batch[0]).squeeze(1), batch[1])
        print(f"step {self.global_step} loss {loss:.4f}", flush=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        right = (self.layers(batch[0]).squeeze(1) > 0) == (batch[1] > 0)
        self.log("accuracy", right.float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)}


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    samples = 32 * BATCHES
    arm = torch.randint(2, (samples,), generator=generator).float()
    radius = torch.rand(samples, generator=generator)
    angle = 6 * radius + torch.pi * arm
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return DataLoader(TensorDataset(points, arm), batch_size=32)


def train(url: str) -> None:
    """Start the run at `url`, or go on with it from its last checkpoint."""
    best = AzureBlobModelCheckpoint(url, "best-{epoch}", monitor="accuracy", mode="max", save_top_k=2)
    # A callback of its own: with a monitor, Lightning saves `last` only when it saves one of the best.
    newest = AzureBlobModelCheckpoint(url, "newest-{epoch}", save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AzureBlobCheckpointIO(async_save=True)],
        callbacks=[best, newest],
    )
    trainer.fit(Spiral(), batches(), batches(), ckpt_path="last")


def run(url: str, kill_at: int | None = None) -> list[str]:
    """Let another process train, kill it at a step, and return the lines about its steps."""
    steps = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen([sys.executable, __file__, url], stdout=subprocess.PIPE, stderr=errors, text=True) as job,
    ):
        assert job.stdout is not None
        try:
            for line in job.stdout:
                steps.append(line.strip())
                if line.startswith(f"step {kill_at} "):
                    job.kill()
            status = job.wait()
        finally:
            job.kill()
        errors.seek(0)
        wanted = 0 if kill_at is None else -signal.SIGKILL
        check(status == wanted, f"the training ended with status {status}\n{errors.read()}")
    return steps


def last(url: str) -> Any:
    return AzureBlobCheckpointIO().load_checkpoint(f"{url}/last.ckpt")


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"FAILED: {otherwise}")


def main() -> None:
    with Azurite() as azurite, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        container = azurite.create_container("checkpoints")
        whole_url, url = f"{container}/uninterrupted", f"{container}/run-1"
        print(f"Azurite serves {container}")

        print(f"\n1. To compare with: {EPOCHS} epochs without a break.")
        whole = run(whole_url)
        print(f"   {len(whole)} steps, {whole[0]!r} to {whole[-1]!r}")

        print(f"\n2. The same again, until SIGKILL at step {KILLED_AT}.")
        killed = run(url, kill_at=KILLED_AT)
        print(f"   the last that it said is {killed[-1]!r}")

        print("\n3. The same command once more.")
        resumed = run(url)
        print(f"   {resumed[0]!r} to {resumed[-1]!r}")
        check(0 < len(resumed) < len(whole), "it did not resume")
        check(resumed == whole[-len(resumed) :], "its losses are not those of the unbroken run")

        print("\n4. The checkpoints now:")
        for entry in list_checkpoints(url):
            print(f"   {entry.name}   {entry.size / 1e3:.0f} kB in {entry.blobs} blobs")
        # One more if the kill came between a save and the note of it in the next: a run removes only what it knows.
        check(len(list_checkpoints(url)) in (4, 5), "there should be the two best, the newest and the last")
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            same = repr(last(url)[part]) == repr(last(whole_url)[part])
            check(same, f"{part} is not as in the unbroken run")
        model = load_from_checkpoint(Spiral, f"{url}/last.ckpt")
        equal = all(map(torch.equal, model.state_dict().values(), last(whole_url)["state_dict"].values()))
        check(equal, "the parameters are not those of the unbroken run, bit for bit")
        check(not list(Path(folder).iterdir()), "something was written to the local folder")
        print("\nThe parameters, Adam's state and the schedule are those of the unbroken run.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="train there; without it, show all of it with an emulator")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(num_workers|does not have many workers|logging interval)")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if arguments.url is None:
        main()
    else:
        train(arguments.url)
