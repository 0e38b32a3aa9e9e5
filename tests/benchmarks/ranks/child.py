"""The process of one measurement: takes an order from its command line, and prints a line of JSON for each step.

`tests.benchmarks.ranks.run` starts it, with this version of the package or with an earlier one.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from azure.storage.blob import ContainerClient

from tests.benchmarks.ranks import processes
from tests.benchmarks.ranks.models import Sharding, check_virtual
from tests.benchmarks.ranks.sides import Side, make_side
from tests.benchmarks.ranks.simulation import Coordinator, OtherRanks, RanksProcess, load, receive
from tests.benchmarks.ranks.steps import Report, Steps
from tests.benchmarks.spec import KIB, Address

_SMALL = 16 * KIB


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers

    def emit(report: Report) -> None:
        print(json.dumps(report), file=answers, flush=True)

    side = make_side(order["side"], Address(**order["address"]), Path(order["folder"]))
    _JOBS[order["job"]](order, side, Steps(emit))


def _save(order: dict[str, Any], side: Side, steps: Steps) -> None:
    sharding = Sharding(**order["sharding"])
    check_virtual(sharding, sharding.ranks // 2)
    path = order["path"]
    others = RanksProcess(OtherRanks(side, sharding, path, steps, False))
    coordinator = Coordinator(side, sharding, path, steps, others, False)
    for number in ("first", "second")[: order["saves"]]:
        data = coordinator.save(f"{path}-{number}", number)
        steps.note("stored", **_stored(side, f"{path}-{number}"))
        Path(f"{order['broadcast']}-{number}").write_bytes(data)
        del data


def _receive(order: dict[str, Any], side: Side, steps: Steps) -> None:
    steps.under(order["under"])
    receive(Path(f"{order['broadcast']}-{order['under']}").read_bytes(), steps)


def _load(order: dict[str, Any], side: Side, steps: Steps) -> None:
    steps.under(order["under"])
    load(side, Sharding(**order["sharding"]), order["path"], steps, coordinator=order["under"] == "load")


def _real(order: dict[str, Any], side: Side, steps: Steps) -> None:
    for name, values in processes.run(side, Sharding(**order["sharding"]), order["path"]).items():
        steps.note(name, **values)
    steps.note("first.stored", **_stored(side, f"{order['path']}-first"))


def _small(order: dict[str, Any], side: Side, steps: Steps) -> None:
    """Whole saves and loads of one rank, without a process group, a few times each."""
    for count in order["counts"]:
        state = {f"layer.{number}.weight": torch.ones(_SMALL // 4) for number in range(count)}
        for number in range(1 + order["repeats"]):
            path = f"{order['path']}-{count}-{number}"
            clocks = [_clocks()]
            dcp.save(state, storage_writer=side.writer(path), planner=side.planner())
            clocks.append(_clocks())
            dcp.load(state, storage_reader=side.reader(path))
            clocks.append(_clocks())
            if number:  # the first one imports and sets up what the others find
                for step, begin, end in zip(("save", "load"), clocks[:-1], clocks[1:], strict=True):
                    values = {name: end[name] - begin[name] for name in begin}
                    steps.note(f"small.{count}.{step}", **values)


def _clocks() -> dict[str, float]:
    return {"seconds": time.monotonic(), "cpu": time.process_time()}


def _stored(side: Side, path: str) -> dict[str, float]:
    """Bytes of ``.metadata``, of the blobs or files with tensors, and of all others."""
    if side.address is None:
        folder = Path(side.url(path))
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    else:
        address = side.address
        with ContainerClient(
            address.account, address.container, credential=address.key, connection_verify=address.ca_file
        ) as client:
            sizes = {blob.name[len(path) + 1 :]: blob.size for blob in client.list_blobs(name_starts_with=path + "/")}
    data = sum(size for name, size in sizes.items() if name.endswith(".distcp"))
    return {
        "metadata": sizes[".metadata"],
        "data": data,
        "index": sum(sizes.values()) - sizes[".metadata"] - data,
    }


_JOBS = {"save": _save, "receive": _receive, "load": _load, "real": _real, "small": _small}
