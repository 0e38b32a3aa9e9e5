"""Kill a training job twice, resume it on other numbers of processes, and see that it learns what it would have learnt.

    python examples/quickstart.py

Blob Storage is an emulator (Azurite) that this script starts. The job is gpt.py, which is the file to copy from: the
same command starts and resumes it, and nothing in it knows about this script.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from azure.storage.blob import ContainerClient
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, CheckpointNotFoundError
from azure_torch_ckpt.emulator import Azurite

TRAIN = Path(__file__).with_name("gpt.py")
STEPS = 50
SAVE_EVERY = 10
KILLED_AT = 23  # between two saves
KILLED_IN_SAVE = 40
# Ranks add up gradients and losses in float32, and the order of the sums depends on how many there are. On the same
# number of ranks a resumed run repeats the uninterrupted one bit for bit.
TOLERANCE = 1e-3


@dataclass
class Run:
    """The output of a job, and its exit status."""

    ranks: int
    losses: dict[int, float] = field(default_factory=dict)
    loaded: dict[int, float] = field(default_factory=dict)  # step -> seconds
    saved: dict[int, float] = field(default_factory=dict)
    pids: list[int] = field(default_factory=list)
    status: int = 0

    def read(self, line: str) -> None:
        if found := re.match(r"step (\d+) loss (\S+)", line):
            self.losses[int(found[1])] = float(found[2])
        elif found := re.match(r"(loaded|saved) step (\d+) in (\S+) s", line):
            getattr(self, found[1])[int(found[2])] = float(found[3])
        else:
            # All ranks say this at the same time, so two of them may share a line.
            self.pids += [int(pid) for pid in re.findall(r"rank \d+ is process (\d+)", line)]


def train(ranks: int, url: str, *, kill_at: int | None = None, die_in_save: int | None = None) -> Run:
    """Runs gpt.py under torchrun to its end, or kills all its ranks at once when step `kill_at` is done."""
    script = [str(TRAIN)] if die_in_save is None else [__file__, str(die_in_save), str(TRAIN)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run = Run(ranks)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*torchrun, *script, url, f"--steps={STEPS}", f"--save-every={SAVE_EVERY}"],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this script; torchrun ends its ranks when it gets SIGTERM from us
            text=True,
        ) as job,
    ):
        assert job.stdout is not None
        try:
            for line in job.stdout:
                run.read(line)
                if line.startswith(f"step {kill_at} "):
                    check(len(run.pids) == ranks, f"{ranks} ranks run, but only {run.pids} said so")
                    for pid in run.pids:
                        with contextlib.suppress(ProcessLookupError):  # torchrun ends the others when one is dead
                            os.kill(pid, signal.SIGKILL)
            run.status = job.wait()
        finally:
            job.terminate()
        errors.seek(0)
        meant_to_fail = kill_at is not None or die_in_save is not None
        check((run.status != 0) == meant_to_fail, f"torchrun's exit status is {run.status}\n{errors.read()}")
    return run


def die_in_save(step: str, script: str, *arguments: str) -> None:
    """Runs `script`, in which rank 1 gets SIGKILL when it has uploaded its part of the checkpoint of `step`."""
    write_data = AzureBlobWriter.write_data

    def upload_and_die(writer: AzureBlobWriter, plan: SavePlan, planner: SavePlanner) -> Any:
        written = write_data(writer, plan, planner)
        if os.environ["RANK"] == "1" and writer.checkpoint_id.endswith(f"/step-{step}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    sys.argv = [script, *arguments]
    with mock.patch.object(AzureBlobWriter, "write_data", upload_and_die):
        runpy.run_path(script, run_name="__main__")


@dataclass
class Contents:
    """The blobs below a checkpoint's URL: sizes in bytes by name. A checkpoint is complete if it has metadata."""

    metadata: int | None
    data: dict[str, int]  # blobs that the metadata names
    leftovers: dict[str, int]  # of a save that died

    def __str__(self) -> str:
        leftovers = f"{blobs(self.leftovers)} of a save that died"
        if self.metadata is None:
            return f"not a checkpoint: no .metadata, {leftovers}"
        complete = f".metadata {self.metadata / 1e3:.0f} kB, {blobs(self.data)}"
        return f"{complete}, and {leftovers}" if self.leftovers else complete


def blobs(sizes: dict[str, int]) -> str:
    return f"{len(sizes)} data blob{'s' if len(sizes) != 1 else ''} {sum(sizes.values()) / 1e6:.1f} MB"


def contents(container: ContainerClient, name: str) -> Contents:
    sizes = {blob.name.removeprefix(f"{name}/"): blob.size for blob in container.list_blobs(f"{name}/")}
    metadata = sizes.pop(".metadata", None)
    try:
        stored = AzureBlobReader(f"{container.url}/{name}").read_metadata().storage_data.values()
        used = {item.relative_path for item in stored}
    except CheckpointNotFoundError:
        used = set()
    return Contents(
        metadata,
        {blob: size for blob, size in sizes.items() if blob in used},
        {blob: size for blob, size in sizes.items() if blob not in used},
    )


def show_transfers(container: ContainerClient, run: Run) -> None:
    for done, seconds_by_step in (("loaded", run.loaded), ("saved", run.saved)):
        for step, seconds in seconds_by_step.items():
            size = sum(contents(container, f"run-1/step-{step}").data.values()) / 1e6
            print(f"   {done:6} run-1/step-{step}   {size:.1f} MB in {seconds:.2f} s, {size / seconds:.0f} MB/s")


def load(reader: StorageReader) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in this process alone."""
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
    dcp.load(tensors, storage_reader=reader)
    return tensors


def same_on_disk(container: ContainerClient, name: str) -> int:
    """Copies a checkpoint to a folder, loads it with torch's own reader, and counts the tensors that are right."""
    with tempfile.TemporaryDirectory() as folder:
        for blob in container.list_blobs(f"{name}/"):
            path = Path(folder, blob.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(container.download_blob(blob.name).readall())
        local = load(FileSystemReader(Path(folder, name)))
    remote = load(AzureBlobReader(f"{container.url}/{name}"))
    check(local.keys() == remote.keys(), "FileSystemReader finds other tensors")
    different = [key for key in remote if not torch.equal(local[key], remote[key])]
    check(not different, f"FileSystemReader reads other values of {different}")
    return len(remote)


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"FAILED: {otherwise}")


def main() -> None:
    began = time.monotonic()
    with Azurite() as azurite:
        url = azurite.create_container("checkpoints")
        container = ContainerClient.from_connection_string(azurite.connection_string, "checkpoints")
        print(f"Azurite serves {url}")
        print("Times include all of dcp.save and dcp.load; checkpoints this small say little about speed.")

        print(f"\n1. To compare with: two processes train a GPT (FSDP2, AdamW) for {STEPS} steps without a break.")
        whole = train(2, f"{url}/uninterrupted")
        print(f"   loss {whole.losses[1]:.3f} at step 1, {whole.losses[STEPS]:.3f} at step {STEPS}")

        print(f"\n2. The same again, until both processes get SIGKILL after step {KILLED_AT}.")
        killed = train(2, f"{url}/run-1", kill_at=KILLED_AT)
        show_transfers(container, killed)
        print(f"   killed at step {max(killed.losses)}; torchrun's exit status is {killed.status}")
        check(all(whole.losses[step] == loss for step, loss in killed.losses.items()), "two equal runs differ")

        broken = f"run-1/step-{KILLED_IN_SAVE}"
        print(f"\n3. Three processes resume. One of them gets SIGKILL while {broken} is being saved.")
        second = train(3, f"{url}/run-1", die_in_save=KILLED_IN_SAVE)
        show_transfers(container, second)
        left = contents(container, broken)
        print(f"   {broken} is {left}")
        check(max(second.loaded) >= max(killed.saved), "a checkpoint that was saved was not found")
        check(KILLED_IN_SAVE not in second.saved, "the save ended well without one of its ranks")
        check(left.metadata is None and bool(left.leftovers), "the crash did not hit the save")

        print("\n4. One process resumes from the newest complete checkpoint and trains to the end.")
        third = train(1, f"{url}/run-1")
        show_transfers(container, third)
        check(list(third.loaded) == [max(second.saved)], "it did not resume from the newest complete checkpoint")

        print("\nIn the container:")
        for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY):
            print(f"   run-1/step-{step}   {contents(container, f'run-1/step-{step}')}")

        print("\nstep   uninterrupted        resumed")
        resumed = {**dict.fromkeys(second.losses, second), **dict.fromkeys(third.losses, third)}
        apart = {step: abs(run.losses[step] - whole.losses[step]) for step, run in resumed.items()}
        for step, run in resumed.items():
            if step % 5 == 1 or step == STEPS:
                on = f"on {run.ranks} process{'es' if run.ranks > 1 else ''}"
                print(f"{step:4}   {whole.losses[step]:.6f} on 2   {run.losses[step]:.6f} {on}")
        check(set(resumed) == set(range(max(second.loaded) + 1, STEPS + 1)), "steps are missing")
        print(f"Largest difference of {len(apart)} steps: {max(apart.values()):.1e} (allowed: {TOLERANCE:.0e})")

        count = same_on_disk(container, f"run-1/step-{STEPS}")
        print(f"torch's FileSystemReader loads a copy of run-1/step-{STEPS} on disk: {count} tensors, all equal")
        agree = max(apart.values()) <= TOLERANCE
        print(f"All this took {time.monotonic() - began:.0f} s")
        print(f"resumed run continues the uninterrupted one: {'yes' if agree else 'NO'}")
        sys.exit(0 if agree else 1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        die_in_save(*sys.argv[1:])
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
