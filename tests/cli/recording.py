"""Records a session of the command on checkpoints of a real training, as Markdown for the README.

    python -m tests.cli.recording > recording.md

examples/gpt.py trains on two processes and saves into an emulator; then the commands below run one after the other, as
in a shell, and their output is recorded. One byte is changed between two of them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.location import BlobLocation

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "azure-torch-ckpt ls $U",
    "azure-torch-ckpt show $(azure-torch-ckpt latest $U) --match 'app.model.blocks.0.*'",
    "azure-torch-ckpt verify $U/step-30",
    "# one byte of step-20 changes, as a broken disk or a broken cable would do it",
    "azure-torch-ckpt verify $U/step-20; echo exit code $?",
    "azure-torch-ckpt rm --yes $U/step-20",
    "azure-torch-ckpt diff $U/step-30 $U/step-40",
    "azure-torch-ckpt cp $U/step-40 ./step-40",
    "azure-torch-ckpt consolidate $U/step-40 model.pt --match 'app.model.*'",
    "azure-torch-ckpt prune $U --keep-last 1",
    "azure-torch-ckpt prune $U --keep-last 1 --yes",
    "azure-torch-ckpt ls $U --json",
]


def record(url: str, folder: Path) -> list[str]:
    """Run the commands; return the lines of the session."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    command = bin_folder / "azure-torch-ckpt"  # as pip installs it
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m azure_torch_ckpt.cli "$@"\n')
    command.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AZURE_")}
    environment |= {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "U": url,
        "TERM": "dumb",
    }
    lines = [f"$ U={url}"]
    for command_line in COMMANDS:
        if command_line.startswith("#"):
            flip_a_byte(f"{url}/step-20")
            lines.append(command_line)
            continue
        done = subprocess.run(
            ["bash", "-c", command_line],
            cwd=work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        lines += [f"$ {command_line}", *done.stdout.splitlines()]
    return lines


def flip_a_byte(url: str) -> None:
    """Flip a bit in the middle of the largest data blob of a checkpoint."""
    location = BlobLocation.parse(url)
    store = BlobStore(location)
    blob = max(store.list(location.path + "/"), key=lambda blob: blob.size)
    data = bytearray(store.read(blob.path, limit=blob.size)[0])
    data[len(data) // 2] ^= 0x10
    store.put(blob.path, bytes(data))


def main() -> None:
    with Azurite() as azurite, tempfile.TemporaryDirectory() as folder:
        url = azurite.create_container("checkpoints")
        train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        train += [str(ROOT / "examples" / "gpt.py"), f"{url}/run-7", "--steps=40", "--save-every=10"]
        path = os.pathsep.join([str(ROOT), *sys.path])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        subprocess.run(train, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        lines = record(f"{url}/run-7", Path(folder))
    # Every run has another port; 10000 is the one that `azure-torch-ckpt emulator` takes.
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:10000", "\n".join(lines))
    print(f"```console\n{text}\n```")


if __name__ == "__main__":
    main()
