"""Saves and loads that get in each other's way, planners that break the protocol, and answers that are lost."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import os
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobReader,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CommitConflictError,
    CommitUnknownError,
    CorruptCheckpointError,
    IncompleteSaveError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
    prune,
    remove_checkpoint,
)
from tests.support import sharded
from tests.support.containers import KEY, content, paths_below, put, snapshot
from tests.support.failing_attempts import IMPATIENT, load, raised, raised_everywhere, save
from tests.support.faults import Action, Answer, Cut, Flip
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from tests.support.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture
def url(container: str) -> str:
    return f"{container}/run/step-1"


def last_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


# Two saves at once


class Interrupted(dcp.DefaultSavePlanner):
    """Calls a function in the middle of writing, on the last rank: after the plan, before the commit."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._meanwhile: Callable[[], object] | None = meanwhile

    def resolve_data(self, write_item: Any) -> Any:
        if self._meanwhile is not None and last_rank():
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()
        return super().resolve_data(write_item)


def other_save(url: str) -> None:
    save(url, 2, no_dist=True)


def removal(url: str) -> None:
    remove_checkpoint(url, credential=KEY)


def save_meanwhile(url: str, meanwhile: Callable[[str], None], says: str) -> None:
    """This save loses, and leaves no blob that the container did not have when the winner had finished."""
    stands: list[dict[str, tuple[str, bytes]]] = []

    def win() -> None:
        meanwhile(url)
        stands.append(snapshot(url))

    raised(CommitConflictError, lambda: save(url, 3, planner=Interrupted(win)), says)
    if stands:
        assert snapshot(url).items() <= stands[0].items()


LOST = "Another save committed .*/run/step-1"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("before", [False, True], ids=["first save", "overwrite"])
def test_loser_of_two_saves(ranks: Ranks, url: str, before: bool, size: int) -> None:
    if before:
        save(url, 1)
    if size == 1:
        save_meanwhile(url, other_save, LOST)
    else:
        ranks(size).run(save_meanwhile, url, other_save, LOST)
    sharded.assert_version(url, 2, sharded.plain)
    assert len(snapshot(url)) == 2  # the winner's metadata and data


def test_save_over_a_checkpoint_that_is_removed_meanwhile(url: str) -> None:
    save(url, 1)
    save_meanwhile(url, removal, "Another save removed .*/run/step-1")
    assert snapshot(url) == {}


# A save while a checkpoint is loaded


class Paused(dcp.DefaultLoadPlanner):
    """Calls a function on the last rank, after the plan and before the data."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    def finish_plan(self, central_plan: Any) -> Any:
        if last_rank():
            self._meanwhile()
        if dist.is_initialized():
            dist.barrier()
        return super().finish_plan(central_plan)


REPLACED = "/run/step-1 was replaced or removed .*Load again"


def load_meanwhile(url: str, meanwhile: Callable[[str], None], failed: list[int]) -> None:
    planner = Paused(lambda: meanwhile(url))
    error = raised(CheckpointReplacedError, lambda: load(url, planner=planner), REPLACED, ranks=failed)
    assert error.__cause__ is not None


@pytest.mark.parametrize("meanwhile", [other_save, removal])
def test_checkpoint_that_is_replaced_while_it_is_loaded(
    ranks: Ranks, url: str, meanwhile: Callable[[str], None]
) -> None:
    save(url, 1)
    load_meanwhile(url, meanwhile, [0])
    save(url, 1)
    ranks(2).run(load_meanwhile, url, meanwhile, [0, 1])
    if meanwhile is other_save:
        sharded.assert_version(url, 2, sharded.plain)


class Apart(AzureBlobReader):
    """The ranks read the metadata one after the other, and before the last one does, something happens."""

    def __init__(self, url: str, meanwhile: Callable[[str], None]) -> None:
        super().__init__(url, credential=KEY)
        self._meanwhile = meanwhile

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if "rank" in kwargs:
            return super().read_metadata(*args, **kwargs)
        if last_rank():
            dist.barrier()
            self._meanwhile(self.checkpoint_id)
            return super().read_metadata(*args, **kwargs)
        try:
            return super().read_metadata(*args, **kwargs)
        finally:
            dist.barrier()


def load_apart(
    url: str, meanwhile: Callable[[str], None], kind: type[BaseException], says: str, failed: list[int]
) -> None:
    def attempt() -> None:
        dcp.load(sharded.empty(sharded.rows()), storage_reader=Apart(url, meanwhile))

    raised(kind, attempt, says, ranks=failed)


def save_rank_by_rank(url: str) -> None:
    dcp.save(sharded.plain(1), storage_writer=sharded.writer(url), use_collectives=False)


def test_ranks_that_read_different_metadata(ranks: Ranks, url: str) -> None:
    save(url, 1)
    ranks(2).run(load_apart, url, other_save, CheckpointReplacedError, REPLACED, [0])
    ranks(2).run(load_apart, url, removal, CheckpointNotFoundError, r"\.metadata", [1])
    # The first rank finds only its own metadata, of a save without collectives; the second finds that of all ranks.
    ranks(2).run(save_rank_by_rank, url)
    assert [name.rpartition("/")[2] for name in paths_below(url, "metadata")] == ["__0.metadata", "__1.metadata"]
    ranks(2).run(load_apart, url, other_save, CheckpointReplacedError, REPLACED, [0])


# Planners


class Usurper(dcp.DefaultSavePlanner):
    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        return [dataclasses.replace(plan, storage_data="mine") for plan in plans], metadata


class LateUsurper(dcp.DefaultSavePlanner):
    def finish_plan(self, new_plan: Any) -> Any:
        return dataclasses.replace(super().finish_plan(new_plan), storage_data="mine")


class Dropper(dcp.DefaultSavePlanner):
    """Leaves an item out on the last rank."""

    def finish_plan(self, new_plan: Any) -> Any:
        plan = super().finish_plan(new_plan)
        return dataclasses.replace(plan, items=plan.items[1:]) if last_rank() else plan


class Liar(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        return b"no tensor"


class Hue(enum.Enum):
    RED = 1


class Keeper(dcp.DefaultSavePlanner):
    """Adds an object that the metadata's reader would refuse."""

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data = {"hue": Hue.RED}
        return plans, metadata


def save_with_planner(url: str, planner: type[dcp.DefaultSavePlanner]) -> None:
    save(url, 2, planner=planner())


@pytest.mark.parametrize("before", [False, True], ids=["first save", "overwrite"])
@pytest.mark.parametrize(
    ("planner", "kind", "says"),
    [
        (Usurper, CheckpointError, "storage_data of rank 0 .*planner_data"),
        (
            Dropper,
            IncompleteSaveError,
            "1 of the planned items .*save again",
        ),
        (Liar, CheckpointError, " gave bytes "),
        (Keeper, UnsafeMetadataError, "Hue.*add_safe_globals"),
    ],
    ids=["takes storage_data", "drops an item", "gives no tensor", "adds what is refused"],
)
def test_planner_that_breaks_the_protocol(
    ranks: Ranks, url: str, planner: type[dcp.DefaultSavePlanner], kind: type[BaseException], says: str, before: bool
) -> None:
    if before:
        save(url, 1)
    # What the coordinator finds out afterwards is its error; what stops a rank while it writes is that rank's.
    failed = [0, 1] if planner is Liar else [0]
    raised_everywhere(ranks, kind, partial(save_with_planner, planner=planner), url, says, failed=failed)


def test_planner_that_takes_storage_data_last_is_survived(ranks: Ranks, url: str) -> None:
    save(url, 1, planner=LateUsurper())
    sharded.assert_version(url, 1, sharded.plain)
    ranks(2).run(save_with_planner, url, LateUsurper)
    sharded.assert_version(url, 2, sharded.plain)
    assert len(snapshot(url)) == 3


# Answers that are lost


@pytest.mark.parametrize("before", [False, True], ids=["first save", "overwrite"])
@pytest.mark.parametrize("kind", ["Put Blob", "Put Block List", "Put Block"])
def test_one_lost_answer(proxy: FaultProxy, proxied_container: str, url: str, kind: Any, before: bool) -> None:
    if before:
        save(url, 1)
    proxy.when(kind).do(Cut("answer"))
    save(f"{proxied_container}/run/step-1", 2)
    assert proxy.count(kind) == 2
    sharded.assert_version(url, 2, sharded.plain)
    assert len(snapshot(url)) == 2


@pytest.mark.parametrize("before", [False, True], ids=["first save", "overwrite"])
def test_a_commit_that_nobody_heard_of_stands(
    proxy: FaultProxy, proxied_container: str, url: str, before: bool
) -> None:
    """Whether a commit without an answer was carried out is unknown, so its data must stay."""
    if before:
        save(url, 1)
    proxied = f"{proxied_container}/run/step-1"
    proxy.when("Put Blob", times=None).do(Cut("answer"))
    writer = sharded.writer(proxied, options=IMPATIENT)
    says = "is unknown.*could not write .*/run/step-1/.metadata: no answer"
    raised(CommitUnknownError, lambda: dcp.save(sharded.plain(2), storage_writer=writer), says)
    sharded.assert_version(url, 2, sharded.plain)
    # The same writer saves again and fails: the checkpoint must survive that.
    proxy.when("Put Block", times=None).do(Cut("request"))
    with pytest.raises(BaseException, match="could not write a block"):
        dcp.save(sharded.plain(3), storage_writer=writer)
    sharded.assert_version(url, 2, sharded.plain)


@pytest.mark.parametrize("before", [False, True], ids=["first save", "overwrite"])
@pytest.mark.parametrize(
    "look", [[Flip(300)], [Answer(403, "AuthorizationFailure")], [Answer(404, "")]], ids=["damaged", "refused", "proxy"]
)
def test_a_look_at_a_commit_that_proves_nothing_costs_nothing(
    proxy: FaultProxy, proxied_container: str, url: str, before: bool, look: Sequence[Action]
) -> None:
    """The answer is lost, the retry is refused by what it wrote itself, and the look at that arrives useless."""
    if before:
        save(url, 1)
    stood = snapshot(url)
    proxied = f"{proxied_container}/run/step-1"
    proxy.when("Put Blob").do(Cut("answer"))
    looks = proxy.when("Get Blob", nth=2, times=None)  # the first one is before the save
    looks.do(*look)
    writer = sharded.writer(proxied, options=IMPATIENT)
    says = "/run/step-1 is unknown"
    error = raised(CommitUnknownError, lambda: dcp.save(sharded.plain(2), storage_writer=writer), says)
    assert error.status in (409, 412)
    looks.do()
    assert stood.keys() <= snapshot(url).keys()
    sharded.assert_version(url, 2, sharded.plain)
    dcp.save(sharded.plain(3), storage_writer=writer)
    sharded.assert_version(url, 3, sharded.plain)
    prune(url, grace=datetime.timedelta(0), dry_run=False, credential=KEY)
    sharded.assert_version(url, 3, sharded.plain)
    assert len(snapshot(url)) == 2


def test_a_look_that_is_damaged_once_is_repeated(proxy: FaultProxy, proxied_container: str, url: str) -> None:
    proxy.when("Put Blob").do(Cut("answer"))
    proxy.when("Get Blob", nth=2, times=2).do(Flip(300))
    save(f"{proxied_container}/run/step-1", 2)
    assert proxy.count("Get Blob") == 4
    sharded.assert_version(url, 2, sharded.plain)


def test_a_commit_that_was_refused_for_sure_says_so(proxy: FaultProxy, proxied_container: str, url: str) -> None:
    """Only an attempt without an answer makes the outcome unknown."""
    proxied = f"{proxied_container}/run/step-1"
    proxy.when("Put Blob").do(Answer(403, "AuthorizationFailure"))
    error = raised(AccessDeniedError, lambda: save(proxied, 1), "403 AuthorizationFailure")
    assert not error.may_be_done
    assert ".metadata" not in {path.rpartition("/")[2] for path in snapshot(url)}
    proxy.when("Put Blob", nth=1).do(Cut("request"))
    proxy.when("Put Blob", nth=2).do(Answer(403, "AuthorizationFailure"))
    raised(CommitUnknownError, lambda: save(proxied, 1), "403 AuthorizationFailure")


def test_saves_of_nothing_are_told_apart(url: str) -> None:
    """By the save's id in their metadata: by its bytes a commit is known again."""
    seen = set()
    for _ in range(2):
        dcp.save({}, storage_writer=sharded.writer(url))
        seen.add(content(url, "run/step-1/.metadata"))
    assert len(seen) == 2


def test_a_commit_that_never_arrived(proxy: FaultProxy, proxied_container: str, url: str) -> None:
    save(url, 1)
    before = snapshot(url)
    proxy.when("Put Blob", times=None).do(Cut("request"))
    says = "is unknown.*could not write .*/run/step-1/.metadata: no answer"
    proxied = f"{proxied_container}/run/step-1"
    raised(CommitUnknownError, lambda: save(proxied, 2, options=IMPATIENT), says)
    assert snapshot(url).items() >= before.items()
    sharded.assert_version(url, 1, sharded.plain)


# Metadata that is not what it should be


class Hostile:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._marker}",)


def newer(good: bytes, _: Path) -> bytes:
    return good.replace(b"BytesStorageMetadata", b"ShinyStorageMetadata")


def hostile(good: bytes, marker: Path) -> bytes:
    metadata = pickle.loads(good)
    metadata.planner_data = Hostile(marker)
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (newer, UnsupportedCheckpointError, "ShinyStorageMetadata.*newer torch"),
        (hostile, UnsafeMetadataError, "system"),
        (lambda good, _: good[: len(good) // 2], CorruptCheckpointError, r"/run/step-1/\.metadata"),
        (lambda good, _: b"", CorruptCheckpointError, r"/run/step-1/\.metadata"),
        (lambda good, _: b"<html>Sign in</html>", CorruptCheckpointError, r"/run/step-1/\.metadata"),
    ],
    ids=["newer", "hostile", "truncated", "empty", "garbage"],
)
def test_metadata_that_is_refused(
    ranks: Ranks,
    url: str,
    tmp_path: Path,
    change: Callable[[bytes, Path], bytes],
    kind: type[BaseException],
    says: str,
) -> None:
    save(url, 1)
    marker = tmp_path / "was-here"
    [name] = paths_below(url, ".metadata")
    good = content(url, name)
    bad = change(good, marker)
    assert bad != good
    put(url, name, bad)
    before = snapshot(url)
    raised_everywhere(ranks, kind, load, url, says)
    # A save over it works; it removes nothing that bad metadata names.
    save(url, 2)
    sharded.assert_version(url, 2, sharded.plain)
    assert snapshot(url).items() >= {path: blob for path, blob in before.items() if path != name}.items()
    assert not marker.exists()


def test_metadata_of_a_newer_torch_with_one_more_field_loads(
    ranks: Ranks, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(url, 1)
    [name] = paths_below(url, ".metadata")
    good = content(url, name)
    five: Any = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*five(self), "new"))
    more = pickle.dumps(pickle.loads(good))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="too many values"):
        pickle.loads(more)
    put(url, name, more)
    sharded.assert_version(url, 1, sharded.plain)
    ranks(2).run(sharded.assert_version, url, 1)
