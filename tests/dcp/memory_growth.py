"""A process that saves and loads a checkpoint and prints how much memory each step took beside the state dict.

Run as ``python -m tests.dcp.memory_growth URL KEY BUDGET``. Prints one line of JSON: bytes by the name of the step.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from azure_torch_ckpt import TransferOptions
from tests.support.sharded import ShardPlanner
from tests.support.states import Place

# Of such a process: glibc gives memory back at once, and sets no address space aside for each thread.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

_T = TypeVar("_T")
MIB = 1 << 20
TENSORS = 8
ROWS, COLUMNS = 1024, 4096  # of float32: 16 MiB a tensor


def status(field: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def child_result(module: str, *arguments: object) -> Any:
    """Run a module in a process whose memory can be measured, and return what it prints as JSON."""
    child = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        check=True,
    )
    return json.loads(child.stdout)


def settle() -> None:
    """With `ENVIRONMENT`, let the address space grow with what is allocated and with little else. Call this first."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # what is forked has no other
    threading.stack_size(256 * 1024)


def measured(step: Callable[..., _T], *args: Any) -> tuple[int, _T]:
    """By how many bytes the address space grew at most in `step`, which must leave no trace here; what it returned.

    Not resident memory: how much of what a process has allocated or mapped is resident, the system decides, by what
    else runs on the machine. The step is taken in a fork, whose high-water mark begins with the size that it has.
    """
    gc.collect()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # A forked process makes the pool of threads of torch anew, which fails now and then if two threads do it.
            torch.set_num_threads(torch.get_num_threads())
            before = status("VmSize")
            returned = step(*args)
            os.write(write, pickle.dumps((status("VmPeak") - before, returned)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    _, state = os.waitpid(child, 0)
    assert state == 0, step
    grown, returned = pickle.loads(said)
    return grown, returned


def full(rows: int, columns: int, value: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((rows, columns), value, dtype=dtype)


def check(state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        assert bool((value == float(name)).all()), name


def main(url: str, key: str, budget: int) -> None:
    settle()
    options = TransferOptions(memory_budget=budget, concurrency=4)
    plain, strided = Place(url + "/plain", key), Place(url + "/strided", key)
    # What a first save and load leave behind once: imports, threads' stacks, connections, torch's own caches.
    warm_up = {"x": full(1024, 1024), "strided": full(1024, 1024).t()}
    plain.save(warm_up, options)
    plain.load(warm_up, options)

    result = {}

    def load(place: Place, state: dict[str, torch.Tensor], planner: ShardPlanner | None = None) -> None:
        place.load(state, options, planner)
        check(state)

    state = {str(number): full(ROWS, COLUMNS, number) for number in range(TENSORS)}
    result["save contiguous tensors"], _ = measured(plain.save, state, options)
    for value in state.values():
        value.fill_(-1)
    result["load contiguous tensors"], _ = measured(plain.load, state, options)
    measured(load, plain, state)

    state = {"1": full(TENSORS * ROWS // 2, COLUMNS, 1).t()}
    result["save a transposed tensor"], _ = measured(strided.save, state, options)
    state["1"].zero_()
    result["load a transposed tensor"], _ = measured(strided.load, state, options)
    measured(load, strided, state)

    state = {str(number): full(ROWS, COLUMNS // 8, -1) for number in range(TENSORS)}
    planner = ShardPlanner(dict.fromkeys(state, (0, COLUMNS // 2)))
    result["load an eighth of the columns"], _ = measured(plain.load, state, options, planner)
    measured(load, plain, state, planner)

    state = {str(number): full(ROWS, COLUMNS, -1, torch.bfloat16) for number in range(TENSORS)}
    result["load as another dtype"], _ = measured(plain.load, state, options)
    measured(load, plain, state)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
