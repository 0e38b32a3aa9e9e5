"""``progress=`` of saves and loads, and their log lines."""

from __future__ import annotations

import functools
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, TransferOptions, catalog
from azure_torch_ckpt import progress as progress_module
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import MissingDependencyError
from azure_torch_ckpt.progress import AllRanks, Meter, Progress, TqdmBar
from tests.support import sharded
from tests.support.faults import Answer, Gate, Hold
from tests.support.proxy import FaultProxy
from tests.support.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEY = Azurite.account_key
BLOCKS = TransferOptions(block_size=64 * 1024)


def state() -> dict[str, Any]:
    return {"weight": torch.arange(600_000.0), "matrix": torch.ones(300, 400), "step": 7}


def blank() -> dict[str, Any]:
    return {"weight": torch.zeros(600_000), "matrix": torch.zeros(300, 400), "step": 0}


class Notes:
    """A callback that keeps its reports, and notices a second call while the first is running."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []
        self.overlapped = False
        self._inside = threading.Lock()

    def __call__(self, progress: Progress) -> None:
        if not self._inside.acquire(blocking=False):
            self.overlapped = True
            return
        self.seen.append(progress)
        self._inside.release()


def check_course(notes: Notes, operation: str, url: str) -> None:
    """From nothing to everything, never back."""
    assert not notes.overlapped
    done = [progress.done for progress in notes.seen]
    assert done[0] == 0 and done == sorted(done) and done[-1] > 600_000 * 4
    assert {(progress.operation, progress.url, progress.rank) for progress in notes.seen} == {(operation, url, 0)}
    assert all(progress.total is None or progress.total >= progress.done for progress in notes.seen)
    assert notes.seen[-1].total == notes.seen[-1].done
    assert notes.seen[-1].seconds > 0


def test_a_callback_sees_a_save_and_a_load_from_nothing_to_everything(container: str) -> None:
    url = f"{container}/run/step-1"
    saving, loading = Notes(), Notes()
    dcp.save(state(), storage_writer=AzureBlobWriter(url, credential=KEY, options=BLOCKS, progress=saving))
    loaded = blank()
    dcp.load(loaded, storage_reader=AzureBlobReader(url, credential=KEY, options=BLOCKS, progress=loading))
    check_course(saving, "save", url)
    check_course(loading, "load", url)
    assert torch.equal(loaded["weight"], state()["weight"])


def test_a_report_in_the_middle_tells_how_much_there_will_be(
    proxy: FaultProxy, proxied_container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is held until the callback has seen others arrive."""
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN", 0.0)
    url = f"{proxied_container}/run/step-1"
    dcp.save(state(), storage_writer=AzureBlobWriter(url, credential=KEY, options=BLOCKS))
    gate = Gate()
    middle: list[Progress] = []

    def look(progress: Progress) -> None:
        if progress.done and not middle:
            middle.append(progress)
            gate.open()

    proxy.when(lambda exchange: exchange.path.endswith(".distcp") and exchange.kind == "Get Blob", nth=12).do(
        Hold(until=gate)
    )
    dcp.load(blank(), storage_reader=AzureBlobReader(url, credential=KEY, options=BLOCKS, progress=look))
    assert middle[0].total is not None and 0 < middle[0].done < middle[0].total


def test_reports_come_one_at_a_time_and_ten_a_second_at_most() -> None:
    notes = Notes()
    began = time.monotonic()
    with Meter(notes, Progress("save", "", 0, 0, 16 * 20_000, 0.0)) as meter, ThreadPoolExecutor(16) as pool:

        def move() -> None:
            for _ in range(20_000):
                meter.moved(1)

        for future in [pool.submit(move) for _ in range(16)]:
            future.result()
    seconds = time.monotonic() - began
    assert not notes.overlapped
    assert notes.seen[-1].done == notes.seen[-1].total == meter.done == 16 * 20_000
    assert 2 <= len(notes.seen) <= seconds / 0.1 + 2


def test_a_slow_callback_holds_up_one_thread_and_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN", 0.0)
    inside, leave = threading.Event(), threading.Event()

    def slow(progress: Progress) -> None:
        if progress.done == 1:
            inside.set()
            assert leave.wait(60)

    with Meter(slow, Progress("save", "", 0, 0, None, 0.0)) as meter, ThreadPoolExecutor(1) as pool:
        moving = pool.submit(meter.moved, 1)
        try:
            assert inside.wait(60)
            for _ in range(50):
                meter.moved(1)  # would wait for the callback
            assert meter.done == 51 and not moving.done()
        finally:
            leave.set()
        moving.result(60)


def test_a_callback_that_raises_is_logged_once_and_costs_no_checkpoint(
    container: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{container}/run/step-1"
    calls = []

    def broken(progress: Progress) -> None:
        calls.append(progress)
        raise ZeroDivisionError("no screen")

    dcp.save(state(), storage_writer=AzureBlobWriter(url, credential=KEY, options=BLOCKS, progress=broken))
    assert len(calls) == 1
    assert caplog.text.count("the progress callback failed and is not called again; the save continues") == 1
    assert "ZeroDivisionError: no screen" in caplog.text
    dcp.load(blank(), storage_reader=AzureBlobReader(url, credential=KEY))


def test_a_save_that_fails_does_not_report_its_end(proxy: FaultProxy, proxied_container: str) -> None:
    proxy.when("Put Block", nth=3, times=None).do(Answer(403, "AuthorizationFailure"))
    notes = Notes()
    writer = AzureBlobWriter(f"{proxied_container}/run", credential=KEY, options=BLOCKS, progress=notes)
    with pytest.raises(CheckpointException):
        dcp.save(state(), storage_writer=writer)
    assert notes.seen and all(progress.total is not None for progress in notes.seen)
    assert notes.seen[-1].done < 600_000 * 4 < (notes.seen[-1].total or 0)


def test_true_shows_a_tqdm_bar(container: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{container}/run/step-1"
    dcp.save(state(), storage_writer=AzureBlobWriter(url, credential=KEY, progress=True))
    dcp.load(blank(), storage_reader=AzureBlobReader(url, credential=KEY, progress=True))
    shown = capsys.readouterr().err
    for operation in ("save", "load"):
        last = [part for part in re.split(r"[\r\n]", shown) if part.startswith(f"{operation} step-1: ")][-1]
        assert re.search(r"100%\|.*\| 2\.\d\dM/2\.\d\dM \[.*B/s\]", last), last


def test_the_catalog_shows_the_same_bars(container: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{container}/run/step-1"
    dcp.save(state(), storage_writer=AzureBlobWriter(url, credential=KEY))
    catalog.verify(url, credential=KEY, progress=True)
    catalog.diff(url, url, credential=KEY, progress=True)  # reads nothing, so that there is no bar
    catalog.consolidate(url, tmp_path / "a.pt", credential=KEY, progress=True)
    with TqdmBar("nightly copy") as bar:
        catalog.copy(url, tmp_path / "copy", credential=KEY, progress=bar)
    shown = capsys.readouterr().err
    for description in ("verify step-1", "consolidate step-1", "nightly copy"):
        assert re.search(rf"{description}: 100%\|.*\| 2\.\d\dM/2\.\d\dM \[.*B/s\]", shown), shown
    assert "diff" not in shown


def test_a_tqdm_bar_takes_numbers_too(capsys: pytest.CaptureFixture[str]) -> None:
    with TqdmBar("copy") as bar:
        bar(1_000, None)
        bar(2_000, 4_000)
    last = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]
    assert last.startswith("copy:  50%|") and "2.00k/4.00k" in last


def test_without_tqdm_true_is_refused_before_anything_else(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # makes the import fail
    calls: list[Callable[..., object]] = [AzureBlobWriter, AzureBlobReader, catalog.verify]
    calls += [functools.partial(call, container) for call in (catalog.copy, catalog.consolidate, catalog.diff)]
    for call in calls:
        with pytest.raises(MissingDependencyError, match=r"pip install tqdm"):
            call(container, credential=KEY, progress=True)


def test_an_invalid_option_is_refused(container: str) -> None:
    with pytest.raises(TypeError, match=r"AllRanks\(callback\), not 'yes'"):
        AzureBlobWriter(container, credential=KEY, progress="yes")  # type: ignore[arg-type]


def takes_two_numbers(done: int, total: int) -> None:
    """A callback of the catalog in earlier versions."""


@pytest.mark.parametrize("option", [takes_two_numbers, AllRanks(takes_two_numbers), AllRanks(True)])  # type: ignore[arg-type]
def test_a_callback_that_does_not_take_a_progress_is_refused(container: str, option: Any) -> None:
    with pytest.raises(TypeError, match=r"Progress|callback"):
        catalog.copy(f"{container}/a", f"{container}/b", credential=KEY, progress=option)
    accepts: list[Callable[..., object]] = [print, [].append, lambda *reports: None]
    for accepted in accepts:
        AzureBlobWriter(container, credential=KEY, progress=accepted)


def note(path: Path, progress: Progress) -> None:
    """A callback that goes to other processes: a line for each report."""
    with path.with_suffix(f".{progress.rank}").open("a") as file:
        file.write(f"{progress.operation} {progress.done} {progress.total}\n")


def save_on_ranks(url: str, path: Path) -> None:
    callback = functools.partial(note, path / "one")
    dcp.save(sharded.rows(1), storage_writer=sharded.writer(url, progress=callback))
    dcp.save(
        sharded.rows(2), storage_writer=sharded.writer(url, progress=AllRanks(functools.partial(note, path / "all")))
    )
    process = AsyncCheckpointerType.PROCESS
    writer = sharded.writer(url, progress=functools.partial(note, path / "process"))
    dcp.async_save(sharded.rows(3), storage_writer=writer, async_checkpointer_type=process).result(90)  # type: ignore[union-attr]
    sharded.assert_version(url, 3)
    dist.barrier()


def test_rank_0_alone_is_shown_unless_all_are_wanted_and_a_checkpoint_process_reports_too(
    ranks: Ranks, container: str, tmp_path: Path
) -> None:
    ranks(2).run(save_on_ranks, f"{container}/run", tmp_path, seconds=90)
    assert {path.name for path in tmp_path.iterdir()} == {"one.0", "all.0", "all.1", "process.0"}
    for path in tmp_path.iterdir():
        operation, done, total = path.read_text().splitlines()[-1].split()
        assert operation == "save" and int(done) == int(total) > 0, path.name


LINE = r"in [\d.]+ m?s \([\d.]+ [kMG]?B/s, \d+ requests, 0 retries\)"


def test_a_save_and_a_load_are_a_line_each_in_the_log(container: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "azure_torch_ckpt")
    url = f"{container}/run/step-1"
    dcp.save(state(), storage_writer=AzureBlobWriter(url, credential=KEY))
    dcp.load(blank(), storage_reader=AzureBlobReader(url, credential=KEY))
    saved, loaded = [record.getMessage() for record in caplog.records if record.name == "azure_torch_ckpt"]
    assert re.fullmatch(rf"saved 2\.9 MB {LINE} to {re.escape(url)}", saved), saved
    assert re.fullmatch(rf"loaded 2\.9 MB {LINE} from {re.escape(url)}", loaded), loaded


def lines_of_this_rank(url: str) -> list[tuple[str, str]]:
    """Level and text of what a save and a load log."""
    heard: list[tuple[str, str]] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: heard.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    log = logging.getLogger("azure_torch_ckpt")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        dcp.save(sharded.rows(1), storage_writer=sharded.writer(url))
        dcp.load(sharded.empty(sharded.rows(1)), storage_reader=sharded.reader(url))
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return [line for line in heard if "requests" in line[1]]


def test_rank_0_logs_the_whole_save_and_the_others_their_share_at_debug(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    first, second = ranks(2).run(lines_of_this_rank, url)
    (save_level, saved), (load_level, loaded) = first
    assert save_level == load_level == "INFO"
    assert re.fullmatch(
        rf"saved [\d.]+ kB in .* to {re.escape(url)}; rank 0 sent [\d.]+ kB of it \(\d+ requests, 0 retries\)", saved
    ), saved
    assert loaded.startswith("rank 0 loaded ")
    (save_level, saved), (load_level, loaded) = second
    assert save_level == load_level == "DEBUG"
    assert saved.startswith("rank 1 saved ") and loaded.startswith("rank 1 loaded ")
