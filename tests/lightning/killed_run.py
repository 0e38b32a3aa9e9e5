"""A training run in its own process, to be killed: ``python -m tests.lightning.killed_run '{"url": ...}'``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from azure_torch_ckpt.blobs.store import BlobStore
from tests.support.trainers import Namespace, trained_state

SCORES = (5.0, 3.0, 4.0, 2.0, 6.0)
EPOCHS = len(SCORES)


def run(
    namespace: str,
    url: str,
    folder: Path,
    *,
    async_save: bool = False,
    kill_at_step: int | None = None,
    kill_at_commit: str | None = None,
) -> dict[str, Any]:
    """Train, and resume from the last checkpoint if there is one.

    Args:
        kill_at_step: SIGKILL before the batch of this global step, after all pending saves.
        kill_at_commit: SIGKILL instead of the second write of this blob, when the data of the save is already there.
    """
    space = Namespace(namespace)
    plugin = space.plugin(async_save=async_save)
    checkpoint = space.checkpoint(url, monitor="val_loss", save_top_k=2, save_last=True)
    trainer = space.trainer(folder, checkpoint, max_epochs=EPOCHS, plugin=plugin)
    model = space.model(SCORES)

    def die_at_step(*_: Any) -> None:
        if trainer.global_step == kill_at_step:
            plugin.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    model.on_train_batch_start = die_at_step
    put = BlobStore.put
    puts: list[str | None] = []

    def die_at_commit(store: BlobStore, path: str, *args: Any, **kwargs: Any) -> str:
        puts.append(path)
        if puts.count(kill_at_commit) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return put(store, path, *args, **kwargs)

    with mock.patch.object(BlobStore, "put", die_at_commit):
        trainer.fit(model, ckpt_path="last")
    return {**trained_state(trainer, model), "steps": model.trained}


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = json.loads(sys.argv[1])
    run(**{**arguments, "folder": Path(arguments["folder"])})
