"""The same saves and loads by real processes with a gloo process group, each of torch's steps timed.

The processes share the cores of one machine, and the simulation has one to itself, so all times here are CPU seconds
of the thread that takes the step.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import DefaultLoadPlanner

from tests.benchmarks.measure import Meter
from tests.benchmarks.ranks.models import Sharding
from tests.benchmarks.ranks.sides import Side

Values = dict[str, float]

# An alarm without a handler ends a process.
_SECONDS = 1200

# What the simulation calls the pickling and unpickling of torch's collectives after each method: on the coordinator and
# on the others.
_PICKLED = {
    "prepare_local_plan": ("pickle_plan", "pickle_plan"),
    "prepare_global_plan": ("scatter_plans", ""),
    "write_data": ("pickle_results", "pickle_results"),
    "finish": ("broadcast", ""),
}
_UNPICKLED = {
    "prepare_local_plan": ("gather_plans", "finish_plan"),
    "prepare_global_plan": ("finish_plan", ""),
    "write_data": ("gather_results", "receive"),
}


def run(side: Side, sharding: Sharding, path: str) -> dict[str, Values]:
    """Save twice and load once in as many processes as the sharding has ranks.

    Returns:
        Values by names of the simulation's steps, ``first.plan`` or ``load.read_metadata``: ``seconds`` and ``bytes``
        of the coordinator, or where it is a rank's step the medians of the other ranks; and ``load.job`` with
        ``requests`` and ``moved`` of all ranks together, data included.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-ranks-") as folder:
        pipes = [_fork(rank, Path(folder), side, sharding, path) for rank in range(sharding.ranks)]
        answers: list[dict[str, Any]] = []
        for pid, pipe in pipes:
            with os.fdopen(pipe) as stream:
                text = stream.read()
            os.waitpid(pid, 0)
            answers.append(json.loads(text) if text else {"error": "a rank ended"})
    errors = [answer["error"] for answer in answers if "error" in answer]
    if errors:
        raise RuntimeError("\n".join(errors))
    leader: dict[str, Values] = answers[0]
    joined = dict(leader)
    others: list[dict[str, Values]] = answers[1:]
    for name in others[0].keys() - {"load.job"}:
        of_ranks = [answer[name] for answer in others]
        joined[name] = {key: statistics.median(values[key] for values in of_ranks) for key in of_ranks[0]}
    for name, values in leader.items():
        if name.endswith((".plan", ".read_metadata")):
            joined[name.replace(".plan", ".coordinator_plan").replace(".read_metadata", ".coordinator_read")] = values
    return joined


def _fork(rank: int, folder: Path, side: Side, sharding: Sharding, path: str) -> tuple[int, int]:
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid:
        os.close(sending)
        return pid, receiving
    signal.alarm(_SECONDS)
    answer: dict[str, Any]
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=sharding.ranks)
        answer = _save_and_load(side, sharding, path, rank)
        dist.barrier()
    except BaseException:
        answer = {"error": f"rank {rank}:\n{traceback.format_exc()}"}
    with os.fdopen(sending, "w") as stream:
        json.dump(answer, stream)
    os._exit(0)  # without waiting for the threads of libraries


def _save_and_load(side: Side, sharding: Sharding, path: str, rank: int) -> dict[str, Values]:
    state = sharding.dtensors(rank, sharding.mesh())
    clock = _Clock(rank == 0)
    writer, planner = side.writer(path), side.planner()
    clock.time(planner, "create_local_plan", "plan")
    clock.time(writer, "prepare_local_plan", "plan")
    clock.time(planner, "create_global_plan", "create_global_plan")
    clock.time(writer, "prepare_global_plan", "prepare_global_plan")
    clock.time(planner, "finish_plan", "finish_plan")
    clock.time(writer, "write_data", "write_data")
    clock.time(writer, "finish", "finish")
    for clock.prefix in ("first.", "second."):
        dist.barrier()
        begin = time.monotonic()
        dcp.save(state, checkpoint_id=side.url(f"{path}-{clock.prefix[:-1]}"), storage_writer=writer, planner=planner)
        clock.add("save", seconds=time.monotonic() - begin)
    reader, load_planner = side.reader(f"{path}-first"), DefaultLoadPlanner()
    clock.prefix = "load."
    clock.time(reader, "read_metadata", "read_metadata")
    clock.time(load_planner, "set_up_planner", "load_plan")
    clock.time(load_planner, "create_local_plan", "load_plan")
    clock.time(reader, "prepare_local_plan", "load_plan")
    clock.time(reader, "prepare_global_plan", "global_load_plan")
    meter = Meter(side.address if rank == 0 and side.address is not None and side.address.counts else None)
    dist.barrier()
    with meter:
        dcp.load(state, storage_reader=reader, planner=load_planner)
        dist.barrier()
    values = meter.values
    clock.add("job", **{key: values[key] for key in ("requests", "moved") if key in values})
    clock.add("job", seconds=values["end"] - values["start"])
    return clock.seen


class _Clock:
    """Sums the CPU seconds of methods and of torch's pickling, under the names of the simulation's steps."""

    def __init__(self, is_coordinator: bool) -> None:
        self.prefix = ""
        self.seen: dict[str, Values] = defaultdict(lambda: defaultdict(float))
        self._names = {
            pickling: {method: names[not is_coordinator] for method, names in table.items()}
            for pickling, table in (("_object_to_tensor", _PICKLED), ("_tensor_to_object", _UNPICKLED))
        }
        self._last = ""  # the method that ran last
        for function in self._names:
            self._time_pickling(function)

    def add(self, name: str, **values: float) -> None:
        for key, value in values.items():
            self.seen[self.prefix + name][key] += value

    def time(self, owner: Any, method: str, name: str) -> None:
        """Time a method of an object from now on."""
        inner = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            begin = time.thread_time()
            try:
                return inner(*args, **options)
            finally:
                self.add(name, seconds=time.thread_time() - begin)
                self._last = method

        setattr(owner, method, timed)

    def _time_pickling(self, function: str) -> None:
        inner: Callable[..., Any] = getattr(distributed_c10d, function)

        def timed(*args: Any, **options: Any) -> Any:
            begin = time.thread_time()
            result = inner(*args, **options)
            name = self._names[function].get(self._last) if self.prefix != "load." else None
            if name:
                size = result[1] if function == "_object_to_tensor" else args[1]
                self.add(name, seconds=time.thread_time() - begin, bytes=float(size))
            return result

        setattr(distributed_c10d, function, timed)
