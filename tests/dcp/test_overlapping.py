"""One writer in several saves at once, one reader in several loads, as a second ``async_save`` makes of them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from azure_torch_ckpt import (
    AzureBlobHuggingFaceReader,
    AzureBlobHuggingFaceWriter,
    AzureBlobReader,
    AzureBlobWriter,
    CommitConflictError,
)
from tests.support.containers import KEY, blob_names

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

SECONDS = 60.0

PAIRS = pytest.mark.parametrize(
    ("writes", "reads"),
    [(AzureBlobWriter, AzureBlobReader), (AzureBlobHuggingFaceWriter, AzureBlobHuggingFaceReader)],
    ids=["dcp", "hf"],
)


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((300, 7), value), "x": torch.full((5,), value + 0.5)}


def loaded(reader: AzureBlobReader, **arguments: Any) -> list[float]:
    target = state(-1)
    dcp.load(target, storage_reader=reader, **arguments)
    return [value for tensor in target.values() for value in tensor.unique().tolist()]


class Stops:
    """A place in the code that says when it is reached, and goes on when it is told to."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.go.wait(SECONDS)


class PausedSave(dcp.DefaultSavePlanner):
    """Calls `pause` before it gives anything to be written."""

    def __init__(self, pause: Callable[[], None]) -> None:
        super().__init__()
        self._pause = pause

    def resolve_data(self, write_item: WriteItem) -> Any:
        self._pause()
        return super().resolve_data(write_item)


class PausedLoad(dcp.DefaultLoadPlanner):
    """Calls `pause` when the metadata is there, and nothing else."""

    def __init__(self, pause: Callable[[], None]) -> None:
        super().__init__()
        self._pause = pause

    def create_local_plan(self) -> Any:
        self._pause()
        return super().create_local_plan()


def paused_before_commit(base: Any, pauses: dict[str, Stops]) -> Any:
    class Paused(base):  # type: ignore[misc]
        """When all data is there, and before the commit."""

        def finish(self, metadata: Any, results: Any) -> None:
            if self.checkpoint_id in pauses:
                pauses[self.checkpoint_id]()
            super().finish(metadata, results)

    return Paused


def begin(writer: AzureBlobWriter, value: float, **arguments: Any) -> Future[Any]:
    future = dcp.async_save(state(value), storage_writer=writer, **arguments)
    assert isinstance(future, Future)
    return future


@PAIRS
def test_a_save_that_begins_before_the_last_one_is_done(container: str, writes: Any, reads: Any) -> None:
    writer, stops = writes(container, credential=KEY, overwrite=True), Stops()
    for slot in "ab":
        dcp.save(state(0), storage_writer=writes(f"{container}/{slot}", credential=KEY, overwrite=True))
    first = begin(writer, 1, checkpoint_id=f"{container}/a", planner=PausedSave(stops))
    assert stops.reached.wait(SECONDS)
    begin(writer, 2, checkpoint_id=f"{container}/b").result(SECONDS)
    stops.go.set()
    first.result(SECONDS)
    for slot, value in ("a", 1), ("b", 2):
        assert loaded(reads(f"{container}/{slot}", credential=KEY)) == [value, value + 0.5]
        assert len(blob_names(f"{container}/{slot}")) == 2  # nothing of the replaced ones is left


@PAIRS
def test_data_of_a_save_that_goes_on_is_not_taken_for_leftovers(container: str, writes: Any, reads: Any) -> None:
    a, stops = f"{container}/a", Stops()
    writer = paused_before_commit(writes, {a: stops})(container, credential=KEY, overwrite=True)
    first = begin(writer, 1, checkpoint_id=a)
    assert stops.reached.wait(SECONDS)
    for url in (f"{container}/b", f"{container}/c"):  # one in a thread of its own, one in this thread
        begin(writer, 2, checkpoint_id=url).result(SECONDS)
        dcp.save(state(3), storage_writer=writer, checkpoint_id=url)
        assert loaded(reads(url, credential=KEY)) == [3, 3.5]
    stops.go.set()
    first.result(SECONDS)
    assert loaded(reads(a, credential=KEY)) == [1, 1.5]


@PAIRS
def test_of_two_saves_to_one_url_one_wins_and_the_other_is_told(container: str, writes: Any, reads: Any) -> None:
    url, stops = f"{container}/a", Stops()
    writer = writes(url, credential=KEY, overwrite=True)
    first = begin(writer, 1, planner=PausedSave(stops))
    assert stops.reached.wait(SECONDS)
    begin(writer, 2).result(SECONDS)
    stops.go.set()
    error = first.exception(SECONDS)
    assert isinstance(error, CheckpointException)
    assert isinstance(error.failures[0][0], CommitConflictError)
    assert loaded(reads(url, credential=KEY)) == [2, 2.5]
    assert len(blob_names(url)) == 2


class Broken(dcp.DefaultSavePlanner):
    """Raises in the step that it is told."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def create_local_plan(self) -> SavePlan:
        self._raise("local plan")
        return super().create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        self._raise("global plan")
        return super().create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self._raise("finish plan")
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Any:
        self._raise("resolve")
        return super().resolve_data(write_item)

    def _raise(self, where: str) -> None:
        if where == self._where:
            raise ZeroDivisionError("on purpose")


@PAIRS
@pytest.mark.parametrize("where", ["local plan", "global plan", "finish plan", "resolve"])
def test_a_writer_is_free_after_a_save_that_torch_broke_off(
    container: str, writes: Any, reads: Any, where: str
) -> None:
    writer = writes(f"{container}/a", credential=KEY, overwrite=True)
    for value in (1, 2):
        with pytest.raises(CheckpointException):
            dcp.save(state(0), storage_writer=writer, planner=Broken(where))
        assert isinstance(begin(writer, 0, planner=Broken(where)).exception(SECONDS), CheckpointException)
        begin(writer, value).result(SECONDS)
        assert loaded(reads(f"{container}/a", credential=KEY)) == [value, value + 0.5]
        dcp.save(state(value + 10), storage_writer=writer)
        assert loaded(reads(f"{container}/a", credential=KEY)) == [value + 10, value + 10.5]
        assert len(blob_names(f"{container}/a")) == 2


class LosesItsResults(AzureBlobWriter):
    """Writes, and then fails as a rank does whose result never arrives: `finish` is not called."""

    lose = False

    def write_data(self, plan: Any, planner: Any) -> Any:
        future = super().write_data(plan, planner)
        if self.lose:
            raise ZeroDivisionError("on purpose")
        return future


@pytest.mark.parametrize("threads", ["the same thread", "another thread"])
def test_what_a_broken_save_left_is_removed_by_the_next(container: str, threads: str) -> None:
    url = f"{container}/a"
    writer = LosesItsResults(url, credential=KEY)
    writer.lose = True
    with pytest.raises(CheckpointException):
        if threads == "the same thread":
            dcp.save(state(1), storage_writer=writer)
        else:
            thread = threading.Thread(target=lambda: future.append(begin(writer, 1).exception(SECONDS)))
            future: list[Any] = []
            thread.start()
            thread.join(SECONDS)
            raise future[0]
    (left,) = blob_names(url)
    for thread in threading.enumerate():
        if thread.name.startswith("AsyncCheckpointExecutor"):
            thread.join(SECONDS)
    writer.lose = False
    dcp.save(state(2), storage_writer=writer)
    assert left not in blob_names(url)
    assert len(blob_names(url)) == 2


@PAIRS
def test_one_reader_in_two_loads_at_once(container: str, writes: Any, reads: Any) -> None:
    for slot, value in ("a", 1), ("b", 2):
        dcp.save(state(value), storage_writer=writes(f"{container}/{slot}", credential=KEY, overwrite=True))
    reader, stops, got = reads(container, credential=KEY), Stops(), list[float]()

    def load_a() -> None:
        got.extend(loaded(reader, checkpoint_id=f"{container}/a", planner=PausedLoad(stops)))

    thread = threading.Thread(target=load_a)
    thread.start()
    assert stops.reached.wait(SECONDS)
    assert loaded(reader, checkpoint_id=f"{container}/b") == [2, 2.5]
    stops.go.set()
    thread.join(SECONDS)
    assert got == [1, 1.5]


def test_a_thread_goes_on_with_the_metadata_that_another_has_read(container: str) -> None:
    dcp.save(state(1), storage_writer=AzureBlobWriter(f"{container}/a", credential=KEY))
    reader = AzureBlobReader(f"{container}/a", credential=KEY)
    metadata = reader.read_metadata()
    target = state(-1)

    def load() -> None:
        planner = dcp.DefaultLoadPlanner()
        reader.set_up_storage_reader(metadata, True)
        planner.set_up_planner(target, metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        reader.read_data(reader.prepare_global_plan([plan])[0], planner).wait()

    thread = threading.Thread(target=load)
    thread.start()
    thread.join(SECONDS)
    assert target["w"].unique().tolist() == [1]


def test_a_thread_stays_where_it_has_turned_to(container: str) -> None:
    writer = AzureBlobWriter(f"{container}/a", credential=KEY)
    begin(writer, 1, checkpoint_id=f"{container}/b").result(SECONDS)
    assert writer.checkpoint_id == f"{container}/b"  # as torch's writers: this thread has turned to none itself
    writer.reset(f"{container}/c")
    begin(writer, 2, checkpoint_id=f"{container}/d").result(SECONDS)
    assert writer.checkpoint_id == f"{container}/c"
    dcp.save(state(3), storage_writer=writer)
    for slot, value in ("b", 1), ("c", 3), ("d", 2):
        assert loaded(AzureBlobReader(f"{container}/{slot}", credential=KEY)) == [value, value + 0.5]


@PAIRS
def test_a_copy_of_a_busy_writer_knows_nothing_of_its_saves(container: str, writes: Any, reads: Any) -> None:
    writer, stops = writes(container, credential=KEY, overwrite=True), Stops()
    first = begin(writer, 1, checkpoint_id=f"{container}/a", planner=PausedSave(stops))
    assert stops.reached.wait(SECONDS)
    for value, copied in enumerate((pickle.loads(pickle.dumps(writer)), copy.copy(writer)), start=2):
        dcp.save(state(value), storage_writer=copied, checkpoint_id=f"{container}/b")
        assert loaded(reads(f"{container}/b", credential=KEY)) == [value, value + 0.5]
    stops.go.set()
    first.result(SECONDS)
    assert loaded(reads(f"{container}/a", credential=KEY)) == [1, 1.5]
