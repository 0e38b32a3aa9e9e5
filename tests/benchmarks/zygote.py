"""A process that has imported everything and forks one fresh process for every job.

Importing torch takes seconds, and a benchmark has hundreds of jobs. The parent of all jobs runs no thread and no
transfer, so that each begins with the same state of memory, connections and caches.

Run as ``python -m tests.benchmarks.zygote MODULE...``: imports the modules, then reads jobs from stdin, one JSON object
a line, and answers each with a line ``{"ranks": [values, ...]}`` or ``{"error": text}``.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.benchmarks import job as transfer
from tests.benchmarks import loops
from tests.benchmarks.spec import AsyncCase, Job

# An alarm without a handler ends the process.
_SECONDS = 180


def serve() -> None:
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_carry_out(Job.from_json(json.loads(line)))), file=answers, flush=True)


def _carry_out(job: Job) -> dict[str, Any]:
    ranks = 1 if isinstance(job.case, AsyncCase) else job.case.ranks
    with tempfile.TemporaryDirectory(prefix="benchmark-ranks-") as folder:
        pipes = [_fork(job, rank, ranks, Path(folder)) for rank in range(ranks)]
        answers = []
        for pid, pipe in pipes:
            with os.fdopen(pipe) as stream:
                text = stream.read()
            _, status = os.waitpid(pid, 0)
            answers.append(json.loads(text) if text else {"error": f"the process ended with {_ending(status)}"})
    errors = [answer["error"] for answer in answers if "error" in answer]
    return {"error": "\n".join(errors)} if errors else {"ranks": answers}


def _fork(job: Job, rank: int, ranks: int, folder: Path) -> tuple[int, int]:
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid:
        os.close(sending)
        return pid, receiving
    signal.alarm(_SECONDS)
    if isinstance(job.case, AsyncCase):
        # torch's checkpoint process logs every request, and that its parent ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    answer: dict[str, Any]
    try:
        if ranks > 1 or isinstance(job.case, AsyncCase):  # a checkpoint process needs a group of its parent
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        answer = loops.run(job) if isinstance(job.case, AsyncCase) else transfer.run(job)
        if ranks > 1:
            dist.barrier()
    except BaseException:
        answer = {"error": f"{job.case.name}, rank {rank}:\n{traceback.format_exc()}"}
    with os.fdopen(sending, "w") as stream:
        json.dump(answer, stream)
    # Without waiting for the threads of libraries.
    os._exit(0)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    serve()
