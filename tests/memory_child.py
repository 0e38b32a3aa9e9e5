"""A process that saves and loads a checkpoint and prints how much memory each step took beside the state dict.

Run as ``python -m tests.memory_child URL KEY BUDGET``. Prints one line of JSON: bytes by the name of the step.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from azure_torch_ckpt import TransferOptions
from tests.shards import ShardPlanner
from tests.states import Place

MIB = 1 << 20
TENSORS = 8
ROWS, COLUMNS = 1024, 4096  # of float32: 16 MiB a tensor


def status(field: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def growth(step: Callable[..., None], *args: Any) -> int:
    """How far the process' resident memory rose above its level before `step`."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
    before = status("VmRSS")
    step(*args)
    return status("VmHWM") - before


def full(rows: int, columns: int, value: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((rows, columns), value, dtype=dtype)


def check(state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        assert bool((value == float(name)).all()), name


def main(url: str, key: str, budget: int) -> None:
    warnings.simplefilter("ignore")
    options = TransferOptions(memory_budget=budget, concurrency=4)
    plain, strided = Place(url + "/plain", key), Place(url + "/strided", key)
    # What a first save and load leave behind once: imports, threads' stacks, connections, torch's own caches.
    warm_up = {"x": full(1024, 1024), "strided": full(1024, 1024).t()}
    plain.save(warm_up, options)
    plain.load(warm_up, options)

    result = {}
    state = {str(number): full(ROWS, COLUMNS, number) for number in range(TENSORS)}
    result["save contiguous tensors"] = growth(plain.save, state, options)
    result["load contiguous tensors"] = growth(plain.load, state, options)
    check(state)

    state = {"1": full(TENSORS * ROWS // 2, COLUMNS, 1).t()}
    result["save a transposed tensor"] = growth(strided.save, state, options)
    state["1"].zero_()
    result["load a transposed tensor"] = growth(strided.load, state, options)
    check(state)

    state = {str(number): full(ROWS, COLUMNS // 8) for number in range(TENSORS)}
    planner = ShardPlanner(dict.fromkeys(state, (0, COLUMNS // 2)))
    result["load an eighth of the columns"] = growth(plain.load, state, options, planner)
    check(state)

    state = {str(number): full(ROWS, COLUMNS, dtype=torch.bfloat16) for number in range(TENSORS)}
    result["load as another dtype"] = growth(plain.load, state, options)
    check(state)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
