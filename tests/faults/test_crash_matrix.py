"""If a process dies at any request of a save or a removal, the URL holds the old checkpoint or the new one, complete.

Every case runs a job behind proxies that kill one of its ranks at its k-th request: when the request has come and the
service has seen nothing of it (``"request"``), or when the service has carried it out and no answer has gone back
(``"answer"``). k goes from 1 to one more than an undisturbed run makes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import pytest

from azure_torch_ckpt import prune, verify
from azure_torch_ckpt.emulator import Azurite
from tests.faults.tally import Tally
from tests.support import jobs
from tests.support.containers import KEY, blob_names, contents, live_blobs, put_all
from tests.support.faults import Exchange, Gate, Hold, Kill
from tests.support.jobs import Job
from tests.support.proxy import FaultProxy

OLD, NEW, NEXT = 0, 1, 2
Point = Literal["request", "answer"]
POINTS: dict[Point, str] = {"request": "before it is carried out", "answer": "after it was carried out"}


@dataclass(frozen=True)
class Site:
    """A container, and the checkpoint of two ranks that a test may find at a URL in the beginning."""

    azurite: Azurite
    container: str
    old: dict[str, bytes]

    def url(self, name: str, *, overwrite: bool) -> str:
        """Of a checkpoint of the version OLD, or of one that is not there yet."""
        url = f"{self.container}/{name}"
        if overwrite:
            put_all(url, self.old)
        return url


@pytest.fixture
def site(azurite: Azurite, container: str, metadata: str) -> Site:
    url = f"{container}/old"
    ends = jobs.run(jobs.save, (url, OLD), (url, OLD))
    assert [end.exitcode for end in ends] == [0, 0], ends
    return Site(azurite, container, contents(url))


@contextlib.contextmanager
def proxies(azurite: Azurite, count: int) -> Iterator[list[FaultProxy]]:
    """One for each rank, so that its requests can be counted."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(FaultProxy(azurite.endpoint)) for _ in range(count)]


def anything(_: Exchange) -> bool:
    return True


def carried_out(proxy: FaultProxy, *kinds: Literal["Put Blob", "Put Block List", "Delete"]) -> bool:
    """Whether the service has written (or deleted) the metadata."""
    return any(
        PurePosixPath(seen.path).name == ".metadata" and seen.status is not None and seen.status < 300
        for kind in kinds
        for seen in proxy.requests(kind)
    )


def pruned(url: str, *, dry_run: bool) -> set[str]:
    """Names below `url` of what prune finds, and deletes unless ``dry_run``."""
    found = prune(url, grace=datetime.timedelta(0), dry_run=dry_run, credential=KEY).remains
    folder = url.rpartition("/")[2]
    return {path.removeprefix(f"{folder}/") for remains in found for path in remains.blobs}


def check(url: str, version: int | None) -> None:
    """The complete checkpoint of this version is at `url`, and prune finds everything else below it."""
    assert jobs.version_at(url) == version
    if version is not None:
        report = verify(url, credential=KEY)
        assert report.ok, report.problems
    assert pruned(url, dry_run=True) == blob_names(url) - live_blobs(url)


def check_recovery(url: str, version: int | None) -> None:
    """After `check`: the checkpoint can be replaced, and prune removes everything else."""
    check(url, version)
    jobs.save(url, NEXT)
    live = live_blobs(url)
    stray = blob_names(url) - live
    assert pruned(url, dry_run=True) == stray
    assert pruned(url, dry_run=False) == stray  # so the dry run deleted nothing
    assert blob_names(url) == live
    assert jobs.version_at(url) == NEXT


# ---- Saves ---------------------------------------------------------------------------------------------------------


def requests_of_a_save(site: Site, world: int, victim: int, overwrite: bool) -> int:
    url = site.url("undisturbed", overwrite=overwrite)
    with proxies(site.azurite, world) as between:
        ends = jobs.run(jobs.save, *((proxy.through(url), NEW) for proxy in between))
        assert not any(end.errors for end in ends), ends
        return between[victim].count()


def killed_save(site: Site, url: str, world: int, victim: int, k: int, at: Point, overwrite: bool) -> str:
    """Kill a rank at its k-th request, then the rest of the job; check; return the outcome."""
    with proxies(site.azurite, world) as between:
        with Job(jobs.save, [(proxy.through(url), NEW) for proxy in between]) as job:
            between[victim].when(anything, nth=k).do(Kill(job.pid(victim), at=at))
            job.go()
            ends = job.ends()
        for proxy in between:
            proxy.wait_until(lambda proxy=proxy: proxy.in_flight == 0)  # type: ignore[misc]
        committed = carried_out(between[0], "Put Blob", "Put Block List")
        killed = between[victim].count() >= k
    if killed:
        assert ends[victim].exitcode == -signal.SIGKILL
        # gloo reports to the others that their peer is gone; none of them hangs, none returns from the save.
        assert all(end.errors for rank, end in enumerate(ends) if rank != victim), ends
    else:
        assert committed
        assert not any(end.errors or end.exitcode for end in ends), ends
    version = NEW if committed else OLD if overwrite else None
    check_recovery(url, version)
    return {OLD: "old whole", NEW: "new whole", None: "nothing"}[version] + ("" if killed else ", not killed")


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("overwrite", [False, True], ids=["first", "overwrite"])
@pytest.mark.parametrize(
    ("world", "victim", "metadata"),
    [(1, 0, "plain"), (2, 0, "plain"), (2, 1, "plain"), (2, 0, "columns")],
    ids=["1rank", "2ranks-0", "2ranks-1", "2ranks-0-columns"],
    indirect=["metadata"],
)
def test_a_save_killed_at_any_request_leaves_the_old_or_the_new_checkpoint(
    site: Site, tally: Tally, world: int, victim: int, metadata: str, overwrite: bool, at: Point
) -> None:
    requests = requests_of_a_save(site, world, victim, overwrite)
    outcomes: Counter[str] = Counter()
    for k in range(1, requests + 2):
        url = site.url(f"killed-{k}", overwrite=overwrite)
        outcomes[killed_save(site, url, world, victim, k, at, overwrite)] += 1
    assert outcomes["new whole, not killed"] == 1
    assert outcomes.total() == requests + 1
    saved = f"{'overwriting' if overwrite else 'first'} save, rank {victim} of {world}{metadata}"
    tally.add_all(f"{saved}: SIGKILL at every request, {POINTS[at]}", outcomes)


# ---- Removals ------------------------------------------------------------------------------------------------------


def killed_removal(site: Site, url: str, k: int, at: Point) -> str:
    with FaultProxy(site.azurite.endpoint) as proxy:
        with Job(jobs.remove, [(proxy.through(url),)]) as job:
            proxy.when(anything, nth=k).do(Kill(job.pid(), at=at))
            job.go()
            end = job.end()
        proxy.wait_until(lambda: proxy.in_flight == 0)
        gone = carried_out(proxy, "Delete")
        killed = proxy.count() >= k
    assert end.exitcode == (-signal.SIGKILL if killed else 0), end
    check_recovery(url, None if gone else OLD)
    return ("gone" if gone else "whole") + ("" if killed else ", not killed")


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("metadata", ["plain", "columns"], indirect=True)
def test_a_removal_killed_at_any_request_leaves_the_checkpoint_whole_or_gone(
    site: Site, tally: Tally, metadata: str, at: Point
) -> None:
    url = site.url("undisturbed", overwrite=True)
    with FaultProxy(site.azurite.endpoint) as proxy:
        jobs.remove(proxy.through(url))
        requests = proxy.count()
    assert blob_names(url) == set()
    outcomes: Counter[str] = Counter()
    for k in range(1, requests + 2):
        outcomes[killed_removal(site, site.url(f"killed-{k}", overwrite=True), k, at)] += 1
    assert outcomes["gone, not killed"] == 1
    assert outcomes.total() == requests + 1
    tally.add_all(f"removal{metadata}: SIGKILL at every request, {POINTS[at]}", outcomes)


# ---- SIGTERM -------------------------------------------------------------------------------------------------------

# Below the 60 s after which a request without an answer fails, and far more than the end takes.
_PROMPTLY = 45.0


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize(
    ("save", "exitcode"), [(jobs.save, -signal.SIGTERM), (jobs.save_until_told_to_stop, 1)], ids=["default", "handler"]
)
def test_a_save_ends_promptly_on_sigterm_while_a_request_hangs(
    site: Site, tally: Tally, save: Callable[[str, int], None], exitcode: int, at: Point
) -> None:
    outcomes: Counter[str] = Counter()
    requests = requests_of_a_save(site, 1, 0, overwrite=True)
    for k in range(1, requests + 1):
        url = site.url(f"ended-{k}", overwrite=True)
        with FaultProxy(site.azurite.endpoint) as proxy:
            held = Hold(at=at)
            with Job(save, [(proxy.through(url), NEW)]) as job:
                proxy.when(anything, nth=k).do(held)
                job.go()
                assert isinstance(held.until, Gate)
                held.until.wait_for(1)
                # A signal just before a system call would not interrupt it: Python's handlers run between bytecodes.
                job.wait_until_blocked()
                os.kill(job.pid(), signal.SIGTERM)
                end = job.end(seconds=_PROMPTLY)
            assert end.exitcode == exitcode, end
            committed = carried_out(proxy, "Put Blob", "Put Block List")
        check(url, NEW if committed else OLD)
        outcomes["new whole" if committed else "old whole"] += 1
    assert outcomes.total() == requests
    handled = "with a handler that raises SystemExit" if save is jobs.save_until_told_to_stop else "unhandled"
    tally.add_all(f"overwriting save: SIGTERM ({handled}) while a request hangs, every one, {POINTS[at]}", outcomes)


def test_a_clean_up_of_many_blobs_ends_promptly_on_sigterm_while_its_requests_hang(
    proxy: FaultProxy, container: str
) -> None:
    names = [f"{'0' * 32}/__{rank}_0.distcp" for rank in range(20)]
    put_all(f"{container}/url", {name: b"shard" for name in names})
    gate = Gate()
    proxy.when("Delete", times=None).do(Hold(gate))
    with Job(jobs.clean_up_until_told_to_stop, [(proxy.through(f"{container}/url"), names)]) as job:
        job.go()
        gate.wait_for(jobs.OPTIONS.concurrency)
        job.wait_until_blocked()
        os.kill(job.pid(), signal.SIGTERM)
        assert job.end(seconds=_PROMPTLY).exitcode == 1
    assert blob_names(f"{container}/url") == set(names)
