"""Jobs that get in each other's way at one URL: two that save, one that saves and one that removes or reads.

In any order, the checkpoint is one of the saved ones and complete, the loser gets an error, and nothing else is left.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Literal, TypeVar

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import BlobLocation, CheckpointNotFoundError, CheckpointReplacedError, CommitConflictError
from azure_torch_ckpt.emulator import Azurite
from tests.faults.tally import Tally
from tests.support import jobs
from tests.support.containers import blob_names, contents, live_blobs, put_all, store_of
from tests.support.faults import Exchange, Gate, Hold
from tests.support.jobs import End, Job
from tests.support.proxy import FaultProxy

# Versions: of the checkpoint in the beginning, and of those that the jobs save.
OLD, FIRST, SECOND = 0, 1, 2

Point = Literal["request", "answer"]
_T = TypeVar("_T")


@pytest.fixture
def old(container: str, metadata: str) -> dict[str, bytes]:
    """The blobs of a checkpoint of two ranks, of the version OLD."""
    url = f"{container}/old"
    ends = jobs.run(jobs.save, (url, OLD), (url, OLD))
    assert [end.exitcode for end in ends] == [0, 0], ends
    return contents(url)


def is_commit(seen: Exchange) -> bool:
    return seen.kind in ("Put Blob", "Put Block List") and seen.path.endswith("/.metadata")


def commit_of(proxy: FaultProxy) -> Exchange:
    (commit,) = [seen for seen in proxy.requests() if is_commit(seen)]
    return commit


def assert_whole(url: str, version: int | None) -> None:
    """The checkpoint of this version is at `url`, and nothing else; with None, nothing at all."""
    assert jobs.version_at(url) == version
    assert blob_names(url) == live_blobs(url)


# ---- Two that save -------------------------------------------------------------------------------------------------


def outcome(ends: list[End]) -> Literal["saved", "conflict"]:
    """The outcome on all ranks of a job: it saved, or another job did."""
    if not any(end.errors for end in ends):
        assert [end.exitcode for end in ends] == [0] * len(ends)
        return "saved"
    for end in ends:
        assert list(end.errors) == [0], end
        assert isinstance(end.errors[0], CommitConflictError), end
    return "conflict"


def race(
    proxies: list[FaultProxy],
    url: str,
    world: int,
    while_they_run: Callable[[], None] = lambda: None,
) -> list[Literal["saved", "conflict"]]:
    """Save the versions FIRST and SECOND at the same time by a job each, which has a proxy of its own."""
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(Job(jobs.save, [(proxy.through(url), version)] * world))
            for proxy, version in zip(proxies, (FIRST, SECOND), strict=True)
        ]
        for job in both:
            job.go()
        while_they_run()
        return [outcome(job.ends()) for job in both]


def commit_in_turn(first: FaultProxy, second: FaultProxy, gates: dict[FaultProxy, Gate]) -> None:
    """Let no job commit before both are about to."""
    for gate in gates.values():
        gate.wait_for(1)
    gates[first].open()
    first.wait_until(lambda: commit_of(first).finished_at is not None)
    gates[second].open()


def commit_together(gates: dict[FaultProxy, Gate]) -> None:
    for gate in gates.values():
        gate.wait_for(1)
    for gate in gates.values():
        gate.open()


@pytest.mark.parametrize("overwrite", [False, True], ids=["first", "overwrite"])
@pytest.mark.parametrize(
    ("world", "metadata"),
    [(1, "plain"), (2, "plain"), (1, "columns")],
    ids=["1rank", "2ranks", "1rank-columns"],
    indirect=["metadata"],
)
def test_of_two_jobs_that_began_before_either_committed_exactly_one_wins(
    azurite: Azurite, container: str, metadata: str, old: dict[str, bytes], tally: Tally, world: int, overwrite: bool
) -> None:
    orders = ["in order", "the other way round", "together"] * 5
    outcomes: Counter[str] = Counter()
    for number, order in enumerate(orders):
        url = f"{container}/contested-{number}"
        if overwrite:
            put_all(url, old)
        with FaultProxy(azurite.endpoint) as first, FaultProxy(azurite.endpoint) as second:
            gates = {proxy: Gate() for proxy in (first, second)}
            for proxy, gate in gates.items():
                proxy.when(is_commit).do(Hold(gate))
            release = {
                "in order": functools.partial(commit_in_turn, first, second, gates),
                "the other way round": functools.partial(commit_in_turn, second, first, gates),
                "together": functools.partial(commit_together, gates),
            }[order]
            results = race([first, second], url, world, release)
            statuses = [commit_of(proxy).status for proxy in (first, second)]
        assert sorted(results) == ["conflict", "saved"]
        winner = results.index("saved")
        if order != "together":
            assert winner == (0 if order == "in order" else 1)
        assert statuses[winner] == 201
        assert statuses[1 - winner] in (409, 412)
        assert_whole(url, (FIRST, SECOND)[winner])
        outcomes["one won, the other was told; the winner's is whole and nothing else is left"] += 1
    what = f"{'overwriting' if overwrite else 'first'} saves, 2 jobs x {world} rank{'s' if world > 1 else ''}"
    tally.add_all(f"{what}{metadata}: both about to commit", outcomes)


@pytest.mark.parametrize("overwrite", [False, True], ids=["first", "overwrite"])
def test_two_jobs_that_race_leave_the_one_that_committed_last(
    azurite: Azurite, container: str, old: dict[str, bytes], tally: Tally, overwrite: bool
) -> None:
    """Nothing synchronises them, so the later one may find the checkpoint of the other and replace it."""
    outcomes: Counter[str] = Counter()
    for seed in range(15):
        chance = random.Random(seed)
        url = f"{container}/raced-{seed}"
        old_etag = None
        if overwrite:
            put_all(url, old)
            old_etag = store_of(url).stat(BlobLocation.parse(f"{url}/.metadata").path).etag
        with FaultProxy(azurite.endpoint) as first, FaultProxy(azurite.endpoint) as second:
            # One begins later, and a request of each is slow: so one is ahead here and the other there.
            chance.choice((first, second)).when("Get Blob").do(Hold(chance.uniform(0.0, 0.4)))
            for proxy in (first, second):
                proxy.when(lambda _: True, nth=chance.randrange(2, 8)).do(Hold(chance.uniform(0.0, 0.1)))
            results = race([first, second], url, 1)
            commits = [commit_of(proxy) for proxy in (first, second)]
        saved = [place for place, result in enumerate(results) if result == "saved"]
        assert saved == [place for place, commit in enumerate(commits) if commit.status == 201]
        # The later one found the other's checkpoint, not what stood here in the beginning. No clock tells: each proxy
        # looks at it when the machine lets it.
        found = [commit.headers.get("if-match") for commit in commits]
        last = next((place for place in saved if found[place] != old_etag), saved[0])
        assert_whole(url, (FIRST, SECOND)[last])
        outcomes["one won, the other was told" if len(saved) == 1 else "one replaced the other"] += 1
    what = f"{'overwriting' if overwrite else 'first'} saves, 2 jobs x 1 rank"
    tally.add_all(f"{what}: unsynchronised, requests delayed at random", outcomes)


# ---- One that saves, one that removes ------------------------------------------------------------------------------


def test_a_save_whose_predecessor_is_removed_before_it_commits_is_dropped(
    proxy: FaultProxy, container: str, old: dict[str, bytes], tally: Tally
) -> None:
    url = f"{container}/removed"
    put_all(url, old)
    gate = Gate()
    proxy.when(is_commit).do(Hold(gate))
    with Job(jobs.save, [(proxy.through(url), FIRST)]) as job:
        job.go()
        gate.wait_for(1)
        jobs.remove(url)
        gate.open()
        assert outcome(job.ends()) == "conflict"
    assert_whole(url, None)
    tally.add("removal while an overwriting save is about to commit", 1, "removed, the save was told", 1)


def test_a_removal_that_finds_another_checkpoint_leaves_it(
    proxy: FaultProxy, container: str, old: dict[str, bytes], tally: Tally
) -> None:
    url = f"{container}/removed"
    put_all(url, old)
    gate = Gate()
    proxy.when("Delete").do(Hold(gate))
    with Job(jobs.remove, [(proxy.through(url),)]) as job:
        job.go()
        gate.wait_for(1)
        jobs.save(url, FIRST)
        gate.open()
        assert isinstance(job.end().error, CheckpointReplacedError)
    assert_whole(url, FIRST)
    tally.add("overwriting save while a removal is about to begin", 1, "new whole, the removal was told", 1)


# ---- One that reads while another replaces or removes --------------------------------------------------------------


def replace(url: str) -> None:
    jobs.save(url, SECOND)


@contextlib.contextmanager
def in_thread(function: Callable[[], _T]) -> Iterator[Future[_T]]:
    result: Future[_T] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield result
    thread.join()


def what_was_read(version: int | None, error: BaseException | None) -> str:
    if error is None:
        assert version in (OLD, SECOND)
        return "old whole" if version == OLD else "new whole"
    if isinstance(error, CheckpointReplacedError):
        return "error: replaced or removed"
    assert isinstance(error, CheckpointNotFoundError), error
    return "error: not found"


def read_while(change: Callable[[str], None], azurite: Azurite, url: str, k: int, at: Point) -> str:
    """Load; hold the k-th request of the load until the checkpoint has been changed completely."""
    with FaultProxy(azurite.endpoint) as proxy:
        gate = Gate()
        proxy.when(lambda _: True, nth=k).do(Hold(gate, at=at))
        with in_thread(lambda: jobs.load(proxy.through(url))) as loading:
            gate.wait_for(1)
            change(url)
            gate.open()
        caught = loading.exception()
        error: BaseException | None = caught
        if isinstance(caught, CheckpointException):
            error, _ = caught.failures[0]
        return what_was_read(None if caught is not None else loading.result(), error)


@pytest.mark.parametrize("at", ["request", "answer"])
@pytest.mark.parametrize("change", [replace, jobs.remove], ids=["replaced", "removed"])
@pytest.mark.parametrize("metadata", ["plain", "columns"], indirect=True)
def test_a_reader_gets_the_old_or_the_new_checkpoint_or_is_told(
    azurite: Azurite,
    proxy: FaultProxy,
    container: str,
    metadata: str,
    old: dict[str, bytes],
    tally: Tally,
    change: Callable[[str], None],
    at: Point,
) -> None:
    assert jobs.load(proxy.through(f"{container}/old")) == OLD
    requests = proxy.count()
    assert requests >= 4
    outcomes: Counter[str] = Counter()
    for k in range(1, requests + 1):
        url = f"{container}/read-{k}"
        put_all(url, old)
        read = read_while(change, azurite, url, k, at)
        # The metadata alone decides what a load is about. It comes with one request, or in two parts.
        if k < (2 if metadata else 1) or (k == (2 if metadata else 1) and at == "request"):
            assert read == ("new whole" if change is replace else "error: not found")
        else:
            assert read in ("old whole", "error: replaced or removed")
        outcomes[read] += 1
        assert_whole(url, SECOND if change is replace else None)
    assert outcomes.total() == requests
    assert outcomes["error: replaced or removed"] > 0
    done = "replaced" if change is replace else "removed"
    point = {"request": "before it is carried out", "answer": "after it was carried out"}[at]
    tally.add_all(f"load{metadata}, checkpoint {done} meanwhile: at every request, {point}", outcomes)


@pytest.mark.parametrize(("slow", "metadata"), [(0, "plain"), (1, "plain"), (1, "columns")], indirect=["metadata"])
def test_all_ranks_of_a_reader_get_the_same_checkpoint_or_are_told(
    azurite: Azurite, container: str, metadata: str, old: dict[str, bytes], tally: Tally, slow: int
) -> None:
    def load(url: str, nth: int | None) -> tuple[list[End], int]:
        with FaultProxy(azurite.endpoint) as first, FaultProxy(azurite.endpoint) as second:
            proxies, gate = (first, second), Gate()
            if nth is not None:
                proxies[slow].when(lambda _: True, nth=nth).do(Hold(gate))
            with Job(jobs.load, [(proxy.through(url),) for proxy in proxies]) as job:
                job.go()
                if nth is not None:
                    gate.wait_for(1)
                    replace(url)
                    gate.open()
                return job.ends(), proxies[slow].count()

    ends, requests = load(f"{container}/old", None)
    assert [end.value for end in ends] == [OLD, OLD]
    outcomes: Counter[str] = Counter()
    for k in range(1, requests + 1):
        url = f"{container}/read-{k}"
        put_all(url, old)
        ends, _ = load(url, k)
        told = {what_was_read(end.value, next(iter(end.errors.values()), None)) for end in ends}
        assert len(told) == 1, ends
        outcomes[told.pop()] += 1
    assert outcomes.total() == requests
    assert "error: not found" not in outcomes
    tally.add_all(f"load{metadata}, 2 ranks, checkpoint replaced meanwhile: at every request of rank {slow}", outcomes)
