"""`prune` removes checkpoints that no rule keeps and leftovers of failed saves; the newest and running saves stay."""

from __future__ import annotations

import datetime
import pickle
import signal
from typing import Any

import pytest

from azure_torch_ckpt import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ServiceUnavailableError,
    TransferOptions,
    UnsafeMetadataError,
)
from azure_torch_ckpt.catalog import PruneReport, inspect, list_checkpoints, prune, verify
from azure_torch_ckpt.dcp.blob_names import new_save_id
from tests.catalog.catalog_process import start
from tests.faults.tally import Tally
from tests.support.containers import paths_below, plant, plant_leftovers, put, store_of
from tests.support.faults import Answer, Call, Kill, Kind
from tests.support.mixed_checkpoint import KEY, assert_right, load, save, save_without_collectives
from tests.support.proxy import FaultProxy, meet

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

NOW = datetime.timedelta(0)
HOUR = datetime.timedelta(hours=1)
DAY = datetime.timedelta(days=1)


def names(report: PruneReport) -> tuple[list[str], list[str]]:
    return [entry.name for entry in report.removed], [entry.name for entry in report.kept]


def steps(*numbers: int) -> list[str]:
    return [f"step-{number}" for number in numbers]


@pytest.mark.parametrize(
    ("rules", "removed"),
    [
        ({}, []),
        ({"keep_last": 1}, [100, 200, 300, 1000]),
        ({"keep_last": 3}, [100, 200]),
        ({"keep_last": 9}, []),
        ({"keep_every": 1000}, [100, 200, 300]),  # and 2500 is the newest
        ({"keep_every": 200, "keep_last": 2}, [100, 300]),
        ({"keep_last": 1, "older_than": DAY}, []),
        ({"older_than": DAY}, []),
    ],
    ids=str,
)
def test_a_checkpoint_goes_only_if_no_rule_keeps_it(container: str, rules: dict[str, Any], removed: list[int]) -> None:
    every = [100, 200, 300, 1000, 2500]
    plant(container, [f"run/step-{step}" for step in every])
    kept = [step for step in every if step not in removed]
    url = f"{container}/run"
    before = paths_below(container)
    assert names(prune(url, credential=KEY, **rules)) == (steps(*removed), steps(*kept))
    assert paths_below(container) == before  # a dry run is the default
    assert names(prune(url, credential=KEY, dry_run=False, **rules)) == (steps(*removed), steps(*kept))
    assert [entry.step for entry in list_checkpoints(url, credential=KEY)] == kept
    assert len(paths_below(container)) == 2 * len(kept)
    assert names(prune(url, credential=KEY, dry_run=False, **rules)) == ([], steps(*kept))


def test_age_is_by_the_services_clock_and_the_newest_stays(container: str) -> None:
    plant(container, ["run/step-1", "run/step-2"])
    # Both are a moment old; older_than of nothing gives up all that was completed before this second.
    report = prune(container, credential=KEY, older_than=NOW)
    assert "run/step-2" in names(report)[1]
    while names(prune(container, credential=KEY, older_than=NOW))[0] != ["run/step-1"]:
        pass  # until the second is over; the test's time-out bounds it
    prune(container, credential=KEY, older_than=NOW, dry_run=False)
    assert [entry.name for entry in list_checkpoints(container, credential=KEY)] == ["run/step-2"]


def test_each_parent_folder_is_a_run_of_its_own(container: str) -> None:
    plant(container, ["a/step-1", "a/step-2", "b/step-1", "b/step-2/inner/step-7", "b/step-2/inner/step-8", "best"])
    report = prune(container, credential=KEY, keep_last=1, dry_run=False)
    assert names(report) == (
        ["a/step-1", "b/step-2/inner/step-7"],
        ["best", "a/step-2", "b/step-1", "b/step-2/inner/step-8"],
    )
    # The one at the URL itself is a run of one: nothing can be taken from it.
    assert names(prune(f"{container}/a/step-2", credential=KEY, keep_last=1, dry_run=False)) == ([], [""])


def test_checkpoints_without_a_step_are_ordered_by_time_and_kept_by_keep_every(container: str) -> None:
    plant(container, ["run/step-5", "run/step-6", "run/step-7"])
    plant(container, ["run/best"])
    report = prune(container, credential=KEY, keep_every=10, dry_run=False)
    # "best" has no step, and training goes on from step 7.
    assert names(report) == (["run/step-5", "run/step-6"], ["run/step-7", "run/best"])
    report = prune(container, credential=KEY, keep_last=1, dry_run=False)
    assert "run/step-7" in names(report)[1]


def test_an_incomplete_save_is_kept_until_its_grace_is_over(container: str) -> None:
    plant(container, ["run/step-1", "run/step-2"])
    running = f"run/step-3/{new_save_id()}/__0_0.distcp"
    put(container, running)
    report = prune(container, credential=KEY, keep_last=1, dry_run=False)
    assert names(report) == (["run/step-1"], ["run/step-2", "run/step-3"]) and report.remains == []
    assert running in paths_below(container)
    report = prune(container, credential=KEY, keep_last=1, grace=NOW, dry_run=False)
    assert names(report) == ([], ["run/step-2"])
    assert [leftovers.blobs for leftovers in report.remains] == [[running]]
    assert running not in paths_below(container)


def test_a_checkpoint_that_is_being_saved_over_is_kept(container: str) -> None:
    plant(container, ["run/step-1", "run/step-2"])
    put(container, "run/step-1/notes.txt")  # not part of a save
    assert names(prune(container, credential=KEY, keep_last=1))[0] == ["run/step-1"]
    # The times have a resolution of a second: as young as the metadata would do for old data.
    running = f"run/step-1/{new_save_id()}/__0_0.distcp"
    before = list_checkpoints(container, credential=KEY)[0].modified
    while True:
        put(container, running)
        [entry, _] = list_checkpoints(container, credential=KEY)
        if prune(container, credential=KEY, keep_last=1).removed == []:
            break
        assert entry.modified == before
    assert names(prune(container, credential=KEY, keep_last=1, dry_run=False)) == ([], ["run/step-1", "run/step-2"])
    # Once the grace is over it was a failed save, and goes with the rest.
    report = prune(container, credential=KEY, keep_last=1, grace=NOW, dry_run=False)
    assert names(report) == (["run/step-1"], ["run/step-2"]) and len(report.remains) == 1
    assert [path for path in paths_below(container) if "step-1" in path] == ["run/step-1/notes.txt"]


@pytest.mark.parametrize("kind", ["Get Blob", "Delete"])
def test_a_checkpoint_that_is_replaced_meanwhile_stays(
    proxy: FaultProxy, container: str, proxied_container: str, kind: Kind
) -> None:
    save(f"{container}/run/step-1", 1)
    save(f"{container}/run/step-2", 2)
    proxy.when(kind).do(Call(lambda: save(f"{container}/run/step-1", 3), "request"))
    report = prune(f"{proxied_container}/run", credential=KEY, keep_last=1, dry_run=False)
    assert names(report) == ([], ["step-1", "step-2"])
    assert_right(load(f"{container}/run/step-1"), 3)
    assert_right(load(f"{container}/run/step-2"), 2)


def test_metadata_goes_first_and_a_crash_leaves_only_leftovers(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/run/step-1", 1)
    save(f"{container}/run/step-2", 2)
    child = start("prune(args[0], credential=args[1], keep_last=1, dry_run=False)", f"{proxied_container}/run", KEY)
    proxy.when("Delete", nth=2).do(Kill(child.pid, "request"))
    child.communicate(b"\n", timeout=60)
    assert child.returncode == -signal.SIGKILL
    deleted = [seen.path.rpartition("/run/")[2] for seen in proxy.requests("Delete")]
    assert deleted[0] == "step-1/.metadata" and deleted[1].endswith("__0_0.distcp")
    with pytest.raises(CheckpointNotFoundError):
        inspect(f"{container}/run/step-1", credential=KEY)
    assert_right(load(f"{container}/run/step-2"), 2)
    [leftovers] = prune(container, credential=KEY, grace=NOW, dry_run=False).remains
    assert leftovers.url == f"{container}/run/step-1"
    assert all("step-2" in path for path in paths_below(container))


def test_metadata_that_cannot_be_read_stops_all_removals(container: str) -> None:
    plant(container, [f"run/step-{step}" for step in range(5)])
    put(container, "run/step-2/.metadata", b"garbage")
    before = paths_below(container)
    with pytest.raises(CorruptCheckpointError, match="step-2"):
        prune(container, credential=KEY, keep_last=1, dry_run=False)
    assert paths_below(container) == before


def test_a_dead_service_is_an_error_and_a_second_prune_finishes(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    plant(container, [f"run/step-{step}" for step in range(8)])
    rule = proxy.when("Delete", nth=3, times=None)
    rule.do(Answer(503, "ServerBusy"))
    with pytest.raises(ServiceUnavailableError):
        prune(proxied_container, credential=KEY, keep_last=1, dry_run=False, options=TransferOptions(retry_seconds=0))
    rule.do()
    prune(proxied_container, credential=KEY, keep_last=1, dry_run=False, grace=NOW)
    assert len(paths_below(container)) == 2
    assert [entry.step for entry in list_checkpoints(container, credential=KEY)] == [7]


def test_two_prunes_at_a_time_do_no_harm(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    plant(container, [f"run/step-{step}" for step in range(4)])
    other = Call(lambda: prune(container, credential=KEY, keep_last=1, dry_run=False), "request")
    proxy.when("Delete", nth=2).do(other)
    prune(proxied_container, credential=KEY, keep_last=1, dry_run=False)
    assert [entry.step for entry in list_checkpoints(container, credential=KEY)] == [3]
    assert len(paths_below(container)) == 2


def test_what_a_prune_of_many_checkpoints_costs(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    plant(container, [f"run-{number % 4}/step-{number}" for number in range(200)])
    report = prune(proxied_container, credential=KEY, keep_last=40)
    assert len(report.removed) == 40
    assert [seen.kind for seen in proxy.log] == ["List", "List"]  # the blobs, and the time
    meet(proxy, 5, "Get Blob")
    meet(proxy, 5, "Delete")
    prune(proxied_container, credential=KEY, keep_last=40, dry_run=False)
    assert proxy.count("List") == 4 and proxy.count("Get Blob") == 40 and proxy.count("Delete") == 80
    assert proxy.count() == 124
    assert len(list_checkpoints(container, credential=KEY)) == 160


def test_rules_out_of_range_are_refused(container: str) -> None:
    wrong: list[dict[str, Any]] = [{"keep_last": 0}, {"keep_every": 0}, {"older_than": -DAY}, {"grace": -DAY}]
    for rules in wrong:
        with pytest.raises(ValueError, match=next(iter(rules))):
            prune(container, credential=KEY, **rules)
    assert prune(f"{container}/nothing", credential=KEY, keep_last=1, dry_run=False) == PruneReport([], [], [])


# ---- leftovers of failed saves ---------------------------------------------------------------------------------------


LEFTOVERS = ("run", "run/alone", "run/never-committed", "run/step-1", "run/step-2/inner")


def a_full_container(container: str) -> tuple[list[str], list[str]]:
    """Put blobs that a prune must not delete, and leftovers that it must; return the paths of both."""
    save(f"{container}/run/step-1", 1)
    save(f"{container}/run/step-2", 2)
    save(f"{container}/run/step-2/inner", 3)  # a checkpoint below another
    save(f"{container}/other/step-1", 4)
    save_without_collectives(f"{container}/run/alone", 0, 1)
    save_id = new_save_id()
    foreign = [
        f"run/step-1/{save_id}/notes.txt",
        f"run/step-1/{save_id}/__0_0.distcp.bak",
        f"run/step-1/{save_id}/deeper/__0_0.distcp",
        f"run/step-1/{save_id[:-1]}/__0_0.distcp",
        f"run/step-1/{save_id[:-1]}F/__0_0.distcp",
        "run/step-1/__0_0.distcp",  # torch's FileSystemWriter
        "run/step-1/__1_0.distcp",
        f"run/{save_id}",
        "run/model.safetensors",
        f"runs/{save_id}/__0_0.distcp",  # outside the prefix "run/"
    ]
    for path in foreign:
        put(container, path)
    keep = paths_below(container)
    leftovers = [path for folder in ("run/step-1", *LEFTOVERS) for path in plant_leftovers(container, folder)]
    return keep, sorted(leftovers)


def test_prune_finds_leftovers_and_nothing_else(container: str, tally: Tally) -> None:
    keep, leftovers = a_full_container(container)
    assert prune(f"{container}/run", credential=KEY, grace=HOUR).remains == []
    found = prune(f"{container}/run", credential=KEY, grace=NOW).remains
    assert sorted(path for one in found for path in one.blobs) == leftovers
    assert len(found) == 6 and all(one.size == 20 and len(one.blobs) == 2 for one in found)
    assert {one.url for one in found} == {f"{container}/{folder}" for folder in LEFTOVERS}
    assert all(one.save_id in path for one in found for path in one.blobs)
    assert sorted(paths_below(container)) == sorted(keep + leftovers)  # that was a dry run

    assert prune(f"{container}/run", credential=KEY, grace=HOUR, dry_run=False).remains == []
    assert sorted(paths_below(container)) == sorted(keep + leftovers)

    deleted = prune(f"{container}/run", credential=KEY, grace=NOW, dry_run=False).remains
    assert deleted == found
    assert paths_below(container) == keep
    for version, name in ((1, "run/step-1"), (2, "run/step-2"), (3, "run/step-2/inner"), (4, "other/step-1")):
        assert_right(load(f"{container}/{name}"), version)
    assert verify(f"{container}/run/step-1", credential=KEY).ok
    assert prune(f"{container}/run", credential=KEY, grace=NOW).remains == []
    tally.add("prune among 5 checkpoints and 10 other files", len(leftovers), "only remains deleted", len(leftovers))


def test_prune_of_one_checkpoint_and_of_a_whole_container(container: str) -> None:
    save(f"{container}/a", 1)
    save(container, 2)  # a checkpoint at the container's root
    inside, beside, at_root = (plant_leftovers(container, folder) for folder in ("a", "b", ""))
    [found] = prune(f"{container}/a", credential=KEY, grace=NOW, dry_run=False).remains
    assert found.blobs == inside and found.url == f"{container}/a"
    everything = prune(container, credential=KEY, grace=NOW, dry_run=False).remains
    assert sorted(path for one in everything for path in one.blobs) == sorted(beside + at_root)
    assert_right(load(f"{container}/a"), 1)
    assert_right(load(container), 2)


def test_the_grace_period_is_by_the_services_clock(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    [_, last] = plant_leftovers(container, "a")
    store = store_of(container)
    age = store.now() - store.stat(last).last_modified
    assert prune(f"{container}/a", credential=KEY, grace=age + HOUR).remains == []
    assert proxy.log == []
    [found] = prune(f"{proxied_container}/a", credential=KEY, grace=age).remains  # by now it is that old
    assert found.last_modified is not None and last in found.blobs
    # The blobs, the time (one blob at most), and whether there is metadata by now.
    assert [seen.kind for seen in proxy.log] == ["List", "List", "Get Blob"]
    assert [seen.query.get("maxresults") for seen in proxy.requests("List")] == [None, "1"]


@pytest.mark.parametrize("name", [".metadata", "__1.metadata"])
def test_metadata_that_cannot_be_read_stops_a_prune_before_it_deletes(container: str, name: str) -> None:
    save(f"{container}/run/a")
    leftovers = {path for folder in ("a", "b", "b", "c") for path in plant_leftovers(container, f"run/{folder}")}
    for data, expected in ((b"garbage", CorruptCheckpointError), (pickle.dumps(print), UnsafeMetadataError)):
        put(container, f"run/b/{name}", data)
        before = paths_below(container)
        with pytest.raises(expected, match=name):
            prune(f"{container}/run", credential=KEY, grace=NOW, dry_run=False)
        assert paths_below(container) == before and leftovers <= set(before)
