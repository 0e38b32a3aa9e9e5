"""Jobs that save, load or remove a checkpoint in processes of their own, cheap enough to kill hundreds of them.

    with Job(save, [(url,), (url,)]) as job:  # two ranks with a gloo group between them
        proxy.when("Put Block", nth=2).do(Kill(job.pid(1), at="answer"))
        job.go()
        assert job.end(1).exitcode == -signal.SIGKILL

A process with torch costs seconds to start, so these are forked from multiprocessing's fork server, which has imported
all of it and has neither a second thread nor a connection.

This module also has the functions that such jobs run, and finds which version of the checkpoint is at a URL.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    BlobLocation,
    CheckpointNotFoundError,
    TransferOptions,
    remove_checkpoint,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.dcp.removal import remove_blobs
from tests.support import columns
from tests.support.containers import KEY as KEY
from tests.support.sharded import same_bits, sharded_tensor, values

OPTIONS = TransferOptions(concurrency=2, block_size=64 * 1024)

# Longer than the 60 s after which a client repeats a request without an answer: Azurite never answers one of some
# thousands, a Get Blob of a blob that is replaced just then.
_SECONDS = 150.0
_context = multiprocessing.get_context("forkserver")


# ---- Processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a rank ended.

    Attributes:
        exitcode: of its process; negative for a signal.
        value: what the function returned.
        errors: what it raised, by rank where torch collected the errors of all ranks; empty where it returned.
    """

    exitcode: int
    value: Any
    errors: dict[int, BaseException]

    @property
    def error(self) -> BaseException | None:
        """The only error, or None."""
        assert len(self.errors) < 2, self.errors
        return next(iter(self.errors.values()), None)


class Job:
    """``function(*args)`` on as many ranks as `args` has entries; leaving the block kills those that still run.

    The ranks are there, with their group, before `go` lets them begin.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[tuple[Any, ...]]) -> None:
        _warm_up()
        self._folder = tempfile.TemporaryDirectory(prefix="job-")
        self._ranks = []
        for rank, own in enumerate(args):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_work,
                args=(theirs, rank, len(args), self._folder.name, columns.settings(), function, own),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def __enter__(self) -> Job:
        for _, connection in self._ranks:
            assert connection.poll(_SECONDS), "a rank did not start"
            assert connection.recv() == "ready"
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._print_stacks()
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._folder.cleanup()

    def _print_stacks(self) -> None:
        """Print where the ranks are, for a test that failed because one of them hangs."""
        for rank, (process, _) in enumerate(self._ranks):
            stacks = Path(self._folder.name) / f"stacks-{rank}"
            if process.is_alive() and process.pid is not None and stacks.exists():
                os.kill(process.pid, signal.SIGUSR1)
                deadline = time.monotonic() + 5
                while not stacks.stat().st_size and process.is_alive() and time.monotonic() < deadline:
                    time.sleep(0.05)
                print(f"rank {rank}:\n{stacks.read_text()}")

    def pid(self, rank: int = 0) -> int:
        pid = self._ranks[rank][0].pid
        assert pid is not None
        return pid

    def go(self) -> None:
        for _, connection in self._ranks:
            connection.send("go")

    def wait_until_blocked(self, rank: int = 0) -> None:
        """Wait until all threads of a rank sleep, and stay asleep, because no answer comes."""
        tasks = Path(f"/proc/{self.pid(rank)}/task")
        deadline = time.monotonic() + _SECONDS
        before: dict[str, str] = {}
        alike = 0
        while alike < 3:
            now: dict[str, str] = {}  # with the state, and how often a thread gave its core away
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread has just ended
                now = {task.name: (task / "status").read_text() for task in tasks.iterdir()}
            same = now and now == before and all("State:\tS" in status for status in now.values())
            alike = alike + 1 if same else 0
            assert time.monotonic() < deadline, f"rank {rank} goes on"
            before = now
            time.sleep(0.01)

    def end(self, rank: int = 0, seconds: float = _SECONDS) -> End:
        """Wait for the end of a rank.

        Raises:
            AssertionError: it did not come within so many seconds.
        """
        process, connection = self._ranks[rank]
        deadline = time.monotonic() + seconds
        value, errors = None, {}
        assert connection.poll(seconds), f"rank {rank} still runs after {seconds} s"
        with contextlib.suppress(EOFError, ConnectionResetError):
            value, errors = connection.recv()
        process.join(max(deadline - time.monotonic(), 0))
        assert process.exitcode is not None, f"rank {rank} still runs after {seconds} s, and has done its work"
        return End(process.exitcode, value, errors)

    def ends(self) -> list[End]:
        return [self.end(rank) for rank in range(len(self._ranks))]


def run(function: Callable[..., Any], *args: tuple[Any, ...]) -> list[End]:
    """Run a job to its end, with a rank for each tuple of arguments."""
    with Job(function, args) as job:
        job.go()
        return job.ends()


def _warm_up() -> None:
    """Start the fork server, which goes on until this process ends."""
    _context.set_forkserver_preload([__name__, "pytest"])
    # It does not inherit sys.path. More threads than one per rank would only compete for the cores.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, environment):
        multiprocessing.forkserver.ensure_running()


def _work(
    connection: multiprocessing.connection.Connection,
    rank: int,
    world_size: int,
    folder: str,
    settings: columns.Settings,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    columns.set_columns(settings)
    faulthandler.register(signal.SIGUSR1, (Path(folder) / f"stacks-{rank}").open("w"))
    if world_size > 1:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=_SECONDS)
        )
    connection.send("ready")
    connection.recv()
    value, errors = None, {}
    try:
        value = function(*args)
    except CheckpointException as caught:
        errors = {failed: error for failed, (error, _) in caught.failures.items()}
    except BaseException as error:
        errors = {rank: error}
    connection.send((value, errors))
    sys.exit(1 if errors else 0)


def threads() -> int:
    """Number of threads of this process, including those of libraries."""
    return len(os.listdir("/proc/self/task"))


# ---- What a rank does ----------------------------------------------------------------------------------------------

# Large enough for several blocks of 64 KiB on each of two ranks, and sharded by rows over them where there are two.
SHARDED = {"weight": ((160, 256), torch.float32), "moment": ((97, 256), torch.bfloat16)}
WHOLE = {"bias": ((100,), torch.float64), "counts": ((7,), torch.int64)}


def state(version: int) -> dict[str, Any]:
    made: dict[str, Any] = {name: values(name, *kind, version) for name, kind in {**SHARDED, **WHOLE}.items()}
    if dist.is_initialized():
        for name in SHARDED:  # no DTensor: the first one of a process imports torch.compile, which takes seconds
            made[name] = sharded_tensor(made[name])
    return {**made, "version": version}


def save(url: str, version: int) -> None:
    writer = AzureBlobWriter(url, credential=KEY, options=OPTIONS)
    dcp.save(state(version), storage_writer=writer)


def load(url: str) -> int:
    """Load the checkpoint at `url`, every rank all of it, and return its version.

    Raises:
        AssertionError: no version that `save` saves has these bits.
    """
    loaded: dict[str, Any] = {
        name: torch.zeros(sizes, dtype=dtype) for name, (sizes, dtype) in {**SHARDED, **WHOLE}.items()
    }
    loaded["version"] = None
    reader = AzureBlobReader(url, credential=KEY, options=OPTIONS)
    dcp.load(loaded, storage_reader=reader)
    version: int = loaded["version"]
    for name, kind in {**SHARDED, **WHOLE}.items():
        assert same_bits(loaded[name], values(name, *kind, version)), f"{name} is not what version {version} had"
    return version


def remove(url: str) -> None:
    remove_checkpoint(url, credential=KEY, options=OPTIONS)


def exit_on_sigterm() -> None:
    """As a trainer does that wants its ``finally`` blocks to run when the scheduler ends it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"signal {number}"))


def save_until_told_to_stop(url: str, version: int) -> None:
    exit_on_sigterm()
    save(url, version)


def clean_up_until_told_to_stop(url: str, names: list[str]) -> None:
    """What follows the commit of an overwriting save, with the data blobs of so many ranks."""
    exit_on_sigterm()
    location = BlobLocation.parse(url)
    remove_blobs(BlobStore(location, Access(KEY, options=OPTIONS)), location, names)


# ---- The checkpoint at a URL ---------------------------------------------------------------------------------------


def version_at(url: str) -> int | None:
    """The version of the checkpoint that loads from `url` bit for bit; None where there is no checkpoint."""
    try:
        return load(url)
    except CheckpointException as caught:
        error, _ = caught.failures[0]
        if isinstance(error, CheckpointNotFoundError):
            return None
        raise error from caught
