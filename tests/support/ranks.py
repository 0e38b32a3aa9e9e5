"""Groups of real processes under torchrun that run functions for a test: ``ranks(4).run(function, *args)``.

Starting a group costs seconds, so one group of each size serves all tests. A group whose function failed or hung is
killed, for its collectives may be out of step, and the next call starts another one.

`tests/conftest.py` has the fixture `ranks`. This file is also the script that each rank runs.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import pickle
import queue
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_START_SECONDS = 100.0
_RUN_SECONDS = 100.0
# Once a rank has failed, the others have this long to end by themselves rather than in a collective without it.
_GRACE_SECONDS = 5.0
_DUMP_SECONDS = 60.0


class RankError(Exception):
    """A function failed on a rank, or did not end in time. The message holds the stacks of all ranks."""


# The result of a function on a rank: its value, or a formatted traceback. A tuple, because a class of the script that
# a rank runs would be in the module `__main__` there.
_Outcome = tuple[Any, str | None]


class _Peer:
    """The other end of a socket: pickles both ways."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rwb")

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, data: bytes) -> None:
        self._stream.write(len(data).to_bytes(8, "big") + data)
        self._stream.flush()

    def receive(self) -> bytes:
        """Raises EOFError when the other process has ended."""
        try:
            header = self._stream.read(8)
            data = self._stream.read(int.from_bytes(header, "big"))
        except ConnectionError as error:
            raise EOFError from error
        if len(header) < 8 or len(data) < int.from_bytes(header, "big"):
            raise EOFError
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        self._connection.close()


class RankGroup:
    """`world_size` processes under one torchrun, with a gloo process group among them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.alive = True
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._peers: dict[int, _Peer] = {}
        self._pids: dict[int, int] = {}
        folder = Path(self._folder.name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(world_size), __file__, self._folder.name]
        # The ranks import what this process does, be it a source tree or an installed package.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        with socket.socket(socket.AF_UNIX) as server, (folder / "log").open("wb") as log:
            server.bind(str(folder / "socket"))
            server.listen(world_size)
            self._agent = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                self._await_hellos(server)
            except BaseException:
                self.close()
                raise

    def _await_hellos(self, server: socket.socket) -> None:
        deadline = time.monotonic() + _START_SECONDS
        server.settimeout(1.0)
        while len(self._peers) < self.world_size:
            if self._agent.poll() is not None or time.monotonic() > deadline:
                raise RankError(f"{self.world_size} ranks did not start.\n{self._log()}")
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                connection.settimeout(None)
                peer = _Peer(connection)
                rank, pid = pickle.loads(peer.receive())
                self._peers[rank], self._pids[rank] = peer, pid

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = _RUN_SECONDS) -> list[Any]:
        """Call ``function(*args)`` on every rank; return what each of them returned, by rank.

        Both must pickle, the function by its name in a module of this folder.

        Raises:
            RankError: a rank raised, ended, or took longer than `seconds`.
        """
        task = pickle.dumps((function, args))
        for peer in self._peers.values():
            peer.send(task)
        done: dict[int, _Outcome] = {}
        deadline = time.monotonic() + seconds
        while len(done) < self.world_size:
            waiting = [rank for rank in self._peers if rank not in done]
            left = max(deadline - time.monotonic(), 0.0)
            ready, _, _ = select.select([self._peers[rank] for rank in waiting], [], [], left)
            if not ready:
                break
            for rank in waiting:
                if self._peers[rank] not in ready:
                    continue
                try:
                    done[rank] = pickle.loads(self._peers[rank].receive())
                except EOFError:
                    done[rank] = (None, f"the process ended\n{self._stack(rank)}")
                if done[rank][1] is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        hung = [rank for rank in self._peers if rank not in done]
        if not hung and all(error is None for _, error in done.values()):
            return [done[rank][0] for rank in range(self.world_size)]
        self._dump_stacks(hung)
        report = [f"{function.__module__}.{function.__qualname__} on {self.world_size} ranks"]
        for rank in range(self.world_size):
            if rank in hung:
                report.append(f"---- rank {rank} did not end; its threads were at\n{self._stack(rank)}")
            elif done[rank][1] is not None:
                report.append(f"---- rank {rank} raised\n{done[rank][1]}")
        report.append(self._log())
        self.close()
        raise RankError("\n".join(report))

    def close(self) -> None:
        """Kill all processes of the group and wait for their end."""
        self.alive = False
        # A rank leads a process group of its own, which its children (a checkpoint process) belong to.
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._agent.pid, signal.SIGKILL)
        self._agent.wait()
        for peer in self._peers.values():
            peer.close()
        self._folder.cleanup()

    def _dump_stacks(self, ranks: list[int]) -> None:
        """End ranks with SIGABRT, on which faulthandler writes the stacks of all threads."""
        with contextlib.suppress(ProcessLookupError):
            self._agent.send_signal(signal.SIGSTOP)  # it would end the others as soon as one has gone
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[rank], signal.SIGABRT)
        deadline = time.monotonic() + _DUMP_SECONDS
        for rank in ranks:
            # Readable means the end of the process here, or a result that came too late.
            left = max(deadline - time.monotonic(), 0.0)
            while select.select([self._peers[rank]], [], [], left)[0]:
                try:
                    self._peers[rank].receive()
                except EOFError:
                    break

    def _stack(self, rank: int) -> str:
        return (Path(self._folder.name) / f"stack-{rank}").read_text(errors="replace") or "(no stack)"

    def _log(self) -> str:
        text = (Path(self._folder.name) / "log").read_text(errors="replace")
        return f"---- output of the ranks\n{text[-4000:]}"


class Ranks:
    """All groups of a test session: ``ranks(3)`` is the one of three ranks, started when it is first asked for."""

    def __init__(self) -> None:
        self._groups: dict[int, RankGroup] = {}

    def __call__(self, world_size: int) -> RankGroup:
        group = self._groups.get(world_size)
        if group is None or not group.alive:
            group = self._groups[world_size] = RankGroup(world_size)
        return group

    def close(self) -> None:
        for group in self._groups.values():
            if group.alive:
                group.close()


# ---- What a rank runs ----------------------------------------------------------------------------------------------


def _serve(folder: Path) -> None:
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (folder / f"stack-{rank}").open("w") as stack, socket.socket(socket.AF_UNIX) as connection:
        faulthandler.enable(stack)
        connection.connect(str(folder / "socket"))
        peer = _Peer(connection)
        tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=_START_SECONDS))
        peer.send(pickle.dumps((rank, os.getpid())))
        threading.Thread(target=_receive, args=(peer, tasks), daemon=True).start()
        while True:
            task = tasks.get()
            try:
                function, args = pickle.loads(task)
                answer = pickle.dumps((function(*args), None))
            except BaseException:
                answer = pickle.dumps((None, traceback.format_exc()))
            peer.send(answer)


def _receive(peer: _Peer, tasks: queue.SimpleQueue[bytes]) -> None:
    with contextlib.suppress(EOFError):
        while True:
            tasks.put(peer.receive())
    # The process of the tests has ended, perhaps by SIGKILL. The main thread may hang, and children may be left.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
