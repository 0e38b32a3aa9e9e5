"""The processes that run the cases, seen from the harness: `tests.benchmarks.zygote`, and the C client."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from azure_torch_ckpt import TransferOptions
from tests.benchmarks.spec import GIB, MIB, Case, Job

ROOT = Path(__file__).resolve().parents[2]

# constraints.txt can name one version of a package only. 12.27.0 is the newest that azstoragetorch 0.2.0 takes.
_PACKAGES = ["azstoragetorch==0.2.0", "azure-storage-blob==12.27.0"]


class CaseFailedError(Exception):
    """A case ended with an error; the message has its traceback."""


class Zygote:
    """A `tests.benchmarks.zygote`.

    Args:
        preload: modules that it imports before its first job.
        search_first: a folder whose packages go before those of this environment.
        ca_file: certificates to trust, for libraries without such an option.
    """

    def __init__(self, preload: list[str], *, search_first: Path | None = None, ca_file: str | None = None) -> None:
        environment = dict(os.environ)
        if search_first is not None:
            environment["PYTHONPATH"] = str(search_first)
        if ca_file is not None:
            environment |= {"SSL_CERT_FILE": ca_file, "REQUESTS_CA_BUNDLE": ca_file}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.zygote", *preload],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: Job) -> dict[str, float]:
        """Carry out a job and join what its ranks measured.

        Raises:
            CaseFailedError: it raised or took too long.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job.to_json()), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the parent of the processes ended"}
        if "error" in answer:
            raise CaseFailedError(answer["error"])
        ranks: list[dict[str, float]] = answer["ranks"]
        return _joined(ranks) if "start" in ranks[0] else ranks[0]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run_climit(folder: Path, case: Case, port: int, payload: int) -> dict[str, float]:
    """The C client, with as many blocks, connections and bytes as ours."""
    block = climit_block(case, payload)
    direction = "up" if case.step == "save" else "down"
    command = [str(folder / "climit"), direction, str(port), str(case.connections), str(block), str(payload // MIB)]
    output = subprocess.run(
        [*command, *(["tls"] if "TLS" in case.regime else [])], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    seen: dict[str, Any] = json.loads(output)
    cpu = seen["user"] + seen["sys"]
    return _rates({"seconds": payload / seen["MBps"] / 1e6, "cpu": cpu, "payload": payload})


def climit_block(case: Case, payload: int) -> int:
    """MiB of a request of the C client: the same as ours."""
    return TransferOptions(concurrency=case.connections).part_size(payload) // MIB


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}


def _joined(ranks: list[dict[str, float]]) -> dict[str, float]:
    seconds = max(values["end"] for values in ranks) - min(values["start"] for values in ranks)
    sums = {name: sum(values[name] for values in ranks) for name in ("cpu", "payload")}
    counts = {name: value for name, value in ranks[0].items() if name in ("requests", "moved", "connections")}
    return _rates({"seconds": seconds, "rss": max(values["rss"] for values in ranks), **sums, **counts})


def _rates(values: dict[str, float]) -> dict[str, float]:
    payload = values["payload"]
    return values | {
        "MBps": payload / values["seconds"] / 1e6,
        "cpu_per_GiB": values["cpu"] / payload * GIB,
    }


def azstoragetorch_folder() -> Path:
    """A folder with azstoragetorch and the older azure-storage-blob that it requires, installed at the first call.

    Everything else, torch too, comes from this environment.

    Raises:
        subprocess.CalledProcessError: pip could not install them.
    """
    folder = Path(sys.prefix, "benchmark-peer")
    if not (folder / "azstoragetorch").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), *_PACKAGES], check=True)
    return folder
