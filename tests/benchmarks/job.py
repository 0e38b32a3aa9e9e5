"""Carries out one case in the process that was made for it."""

from __future__ import annotations

import warnings

import torch.distributed as dist

from tests.benchmarks import works
from tests.benchmarks.clients import Client, make
from tests.benchmarks.measure import Meter
from tests.benchmarks.spec import WARM, Case, Job


def run(job: Job) -> dict[str, float]:
    """Warm up, save or load once, and return what `Meter` measured of it and ``payload``, this rank's bytes of tensors.

    The warm-up is a save or load of 4 tensors of 64 KiB: what torch and the clients import at their first call, and
    what they set up once in a process, is not measured. Writers and readers are new for the measured call, so their
    connections are cold.
    """
    case = job.case
    assert isinstance(case, Case)
    warnings.simplefilter("ignore")
    client = make(case, job.address)
    state, warm = works.build(case.tensors), works.build(WARM)
    if case.ranks > 1:
        state, warm = works.sharded(state), works.sharded(warm)
    if case.step == "save":
        client.save(warm, job.warm)
        meter = _save(client, state, job)
    else:
        if case.client == "null":  # keeps what it saves in this process
            client.save(warm, job.warm)
            client.save(state, job.path)
        client.load(warm, job.warm, None)
        meter = _load(client, state, job, case)
    return meter


def _save(client: Client, state: works.State, job: Job) -> dict[str, float]:
    with _meter(job) as meter:
        client.save(state, job.path)
    return meter.values | {"payload": works.nbytes(state)}


def _load(client: Client, state: works.State, job: Job, case: Case) -> dict[str, float]:
    part, planner = works.narrowed(state, case.step)
    if part is not state:
        state.clear()
    works.clear(part)
    with _meter(job) as meter:
        client.load(part, job.path, planner)
    if case.client != "null":
        works.check(part)
    return meter.values | {"payload": works.nbytes(part)}


def _meter(job: Job) -> Meter:
    """The server's counts are of all ranks together, so rank 0 alone asks for them."""
    if not dist.is_initialized():
        return Meter(job.address)
    meter = Meter(job.address if dist.get_rank() == 0 else None)
    dist.barrier()
    return meter
