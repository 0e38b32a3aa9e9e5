"""Saves and loads of virtual ranks without a process group: what each step costs.

Every function of a planner, writer or reader is called as ``dcp.save`` and ``dcp.load`` call it (``_save_state_dict``
in torch's state_dict_saver.py, ``_load_state_dict`` in state_dict_loader.py), and what their collectives carry is
pickled and unpickled as they do (``gather_object``, ``scatter_object_list``, ``broadcast_object_list``). The network's
share is not in the figures.

One rank beside the coordinator is measured, with DTensors. The others take the same steps, so that the coordinator
gets real plans and real results of all ranks; they have virtual shards, and their steps are not measured. Tensors
are not moved (`without_data`), unless the caller wants a checkpoint that can be loaded.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from tests.benchmarks.ranks.models import Sharding, Sizes, State
from tests.benchmarks.ranks.sides import Side
from tests.benchmarks.ranks.steps import Steps
from tests.benchmarks.ranks.without_data import without_download, without_upload


class Coordinator:
    """Rank 0 of a job, which saves any number of times with the same writer and planner.

    Args:
        others: all other ranks of the job.
    """

    def __init__(
        self, side: Side, sharding: Sharding, path: str, steps: Steps, others: Others, with_data: bool
    ) -> None:
        self._side = side
        self._steps = steps
        self._others = others
        self._rank = _Rank(side, sharding, 0, path, with_data)

    def save(self, path: str, under: str) -> bytes:
        """Do one save; return what ``dcp.save`` would broadcast at its end.

        Steps of a rank: ``plan``, ``pickle_plan``, ``finish_plan`` (with unpickling its plan), ``write_data``,
        ``pickle_results``. Of the coordinator: ``coordinator_plan``, ``gather_plans``, ``create_global_plan``,
        ``prepare_global_plan``, ``scatter_plans``, ``gather_results``, ``finish``, ``broadcast``; ``coordinator`` has
        the memory of all of them but the first.

        Args:
            under: what the names of the steps begin with.
        """
        steps = self._steps
        steps.under(under)
        self._rank.writer.reset(self._side.url(path))
        with steps.step("coordinator_plan", self._side.address):
            plan = self._rank.local_plan()
        plans = [pickle.dumps(plan), *self._others.plans(path, under)]
        with steps.together("coordinator"):
            scattered = self._scattered(plans)
            own = pickle.dumps(self._rank.write(pickle.loads(scattered[0])))
            return self._finish([own, *self._others.results(scattered[1:])])

    def _scattered(self, plans: list[bytes]) -> list[bytes]:
        """The coordinator's part of torch's ``reduce_scatter("plan", ...)``."""
        steps, rank = self._steps, self._rank
        with steps.step("gather_plans") as record:
            record["bytes"] = sum(map(len, plans))
            all_plans = [pickle.loads(plan) for plan in plans]
        plans.clear()
        with steps.step("create_global_plan"):
            global_plans, self._metadata = rank.planner.create_global_plan(all_plans)
        with steps.step("prepare_global_plan"):
            global_plans = rank.writer.prepare_global_plan(global_plans)
        with steps.step("scatter_plans") as record:
            scattered = [pickle.dumps(plan) for plan in global_plans]
            record["bytes"] = sum(map(len, scattered))
        return scattered

    def _finish(self, results: list[bytes]) -> bytes:
        """The coordinator's part of torch's ``all_reduce("write", ...)``."""
        steps = self._steps
        with steps.step("gather_results") as record:
            record["bytes"] = sum(map(len, results))
            all_results = [pickle.loads(result) for result in results]
        results.clear()
        metadata = self._metadata
        del self._metadata
        with steps.step("finish", self._side.address):
            self._rank.writer.finish(metadata=metadata, results=all_results)
        del all_results
        with steps.step("broadcast") as record:
            data = pickle.dumps(metadata)
            record["bytes"] = len(data)
        return data


class Others(Protocol):
    """All ranks but the coordinator."""

    def plans(self, path: str, under: str) -> Iterator[bytes]:
        """Begin a save; every rank's local plan, pickled."""
        ...

    def results(self, plans: Iterable[bytes]) -> Iterator[bytes]:
        """Write what the coordinator has planned for every rank; every rank's results, pickled."""
        ...


class OtherRanks:
    """All ranks but the coordinator, in this process.

    Args:
        with_data: write the tensors too, each filled with its rank's number.
    """

    def __init__(self, side: Side, sharding: Sharding, path: str, steps: Steps, with_data: bool) -> None:
        self._side = side
        self._steps = steps
        self._measured = sharding.ranks // 2
        self._ranks = [_Rank(side, sharding, rank, path, with_data) for rank in range(1, sharding.ranks)]
        if not with_data:
            self._ranks[self._measured - 1].state = sharding.dtensors(self._measured)

    def __len__(self) -> int:
        return len(self._ranks)

    def plans(self, path: str, under: str) -> Iterator[bytes]:
        self._steps.under(under)
        for number, rank in enumerate(self._ranks, 1):
            rank.writer.reset(self._side.url(path))
            with self._turn_of(number):
                with self._step("plan", number):
                    plan = rank.local_plan()
                with self._step("pickle_plan", number) as record:
                    data = pickle.dumps(plan)
                    record["bytes"] = len(data)
            yield data

    def results(self, plans: Iterable[bytes]) -> Iterator[bytes]:
        for number, (rank, plan) in enumerate(zip(self._ranks, plans, strict=True), 1):
            with self._turn_of(number):
                with self._step("finish_plan", number) as record:
                    record["bytes"] = len(plan)
                    final = rank.finish_plan(pickle.loads(plan))
                with self._step("write_data", number):
                    written = rank.write_data(final)
                with self._step("pickle_results", number) as record:
                    data = pickle.dumps(written)
                    record["bytes"] = len(data)
                del final, written
            yield data

    @contextlib.contextmanager
    def _turn_of(self, rank: int) -> Iterator[None]:
        """Let a rank do something. One that is not measured costs as little time and memory as it can."""
        if rank == self._measured:
            # The other ranks would be in other processes, whose objects no collection here looks at.
            gc.freeze()
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            self._ranks[rank - 1].rest()

    def _step(self, name: str, rank: int) -> AbstractContextManager[dict[str, Any]]:
        return self._steps.step(name) if rank == self._measured else contextlib.nullcontext({})


class RanksProcess:
    """The same in a process of their own, so that the coordinator's memory has nothing of them.

    It ends with the process that has made it.
    """

    def __init__(self, ranks: OtherRanks) -> None:
        self._count = len(ranks)
        self._connection, other = multiprocessing.Pipe()
        if os.fork() == 0:
            self._connection.close()
            try:
                while True:
                    self._serve(ranks, other)
            except EOFError:
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        other.close()

    def plans(self, path: str, under: str) -> Iterator[bytes]:
        self._connection.send((path, under))
        return (self._connection.recv_bytes() for _ in range(self._count))

    def results(self, plans: Iterable[bytes]) -> Iterator[bytes]:
        for plan in plans:
            self._connection.send_bytes(plan)
            yield self._connection.recv_bytes()

    def _serve(self, ranks: OtherRanks, connection: Any) -> None:
        """One save."""
        for plan in ranks.plans(*connection.recv()):
            connection.send_bytes(plan)
        for result in ranks.results(connection.recv_bytes() for _ in range(self._count)):
            connection.send_bytes(result)


class _Rank:
    """One rank's writer and planner."""

    def __init__(self, side: Side, sharding: Sharding, rank: int, path: str, with_data: bool) -> None:
        def filled(sizes: Sizes) -> torch.Tensor:
            return torch.full(sizes, float(rank))

        self.writer: StorageWriter = side.writer(path)
        self.planner: SavePlanner = side.planner()
        self.state: State | None = sharding.dtensors(0) if rank == 0 and not with_data else None
        self._make_state = functools.partial(sharding.virtual, rank, filled if with_data else None)
        self._side = side
        self._rank = rank
        self._with_data = with_data
        self._rests = False

    def local_plan(self) -> SavePlan:
        self._set_up_planner()
        self.writer.set_up_storage_writer(self._rank == 0, rank=self._rank, use_collectives=True)
        return self.writer.prepare_local_plan(self.planner.create_local_plan())

    def finish_plan(self, plan: SavePlan) -> SavePlan:
        if self._rests:
            self._set_up_planner()
        return self.planner.finish_plan(plan)

    def write_data(self, plan: SavePlan) -> Any:
        """What ``write_data`` hands to torch's ``gather_object``, whatever the writer makes of it."""
        with contextlib.nullcontext() if self._with_data else without_upload():
            future = self.writer.write_data(plan, self.planner)
            future.wait()
            return future.value()

    def write(self, plan: SavePlan) -> Any:
        return self.write_data(self.finish_plan(plan))

    def rest(self) -> None:
        """Give up the memory of a planner that would keep nothing for the next save."""
        if not self._side.remembers:
            self.planner = self._side.planner()
            self._rests = True

    def _set_up_planner(self) -> None:
        self.planner.set_up_planner(
            state_dict=self.state or self._make_state(),
            storage_meta=self.writer.storage_meta(),
            is_coordinator=self._rank == 0,
        )
        self._rests = False


def receive(data: bytes, steps: Steps) -> None:
    """What every rank does with the metadata that ``dcp.save`` has broadcast."""
    with steps.step("receive") as record:
        record["bytes"] = len(data)
        pickle.loads(data)


def load(side: Side, sharding: Sharding, path: str, steps: Steps, *, coordinator: bool) -> None:
    """One rank's load of its share of every tensor, and with `coordinator` that one's steps of it.

    Steps of a rank: ``read_metadata``, ``load_plan``, ``pickle_load_plan``, ``finish_load_plan`` and of ours
    ``read_data``, which ends where the first request would be sent (torch's reader has no such place: it opens one
    item after the other); ``rank_load`` has the memory of the first two. Of the coordinator: ``gather_load_plans``,
    ``global_load_plan``, ``scatter_load_plans``: it gets the plan of the measured rank as often as there are ranks, for
    to make one takes seconds.
    """
    rank = sharding.ranks // 2
    state = sharding.dtensors(rank)
    reader, planner = side.reader(path), DefaultLoadPlanner()
    gc.collect()
    with steps.together("rank_load"):
        with steps.step("read_metadata", side.address):
            metadata = reader.read_metadata()
        with steps.step("load_plan", side.address):
            planner.set_up_planner(state, metadata, False)
            reader.set_up_storage_reader(metadata, False, rank=rank, use_collectives=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
    with steps.step("pickle_load_plan") as record:
        data = pickle.dumps(plan)
        record |= {"bytes": len(data), "items": len(plan.items)}
    if coordinator:
        with steps.step("gather_load_plans") as record:
            record["bytes"] = len(data) * sharding.ranks
            plans = [pickle.loads(data) for _ in range(sharding.ranks)]
        with steps.step("global_load_plan"):
            plans = reader.prepare_global_plan(planner.create_global_plan(plans))
        with steps.step("scatter_load_plans") as record:
            scattered = [pickle.dumps(plan) for plan in plans]
            record["bytes"] = sum(map(len, scattered))
        del plans
        data = scattered[0]
    with steps.step("finish_load_plan"):
        plan = planner.finish_plan(pickle.loads(data))
    if side.address is not None:
        with without_download(), steps.step("read_data", side.address):
            reader.read_data(plan, planner).wait()
