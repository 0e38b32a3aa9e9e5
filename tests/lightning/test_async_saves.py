"""``async_save=True``: what the caller waits for, what happens in which order, and what a failed save leaves."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from azure_torch_ckpt import CheckpointError, CheckpointNotFoundError, RequestRefusedError
from azure_torch_ckpt.catalog import list_checkpoints
from azure_torch_ckpt.objects import Packed
from azure_torch_ckpt.objects.background_saves import BackgroundSaves, Snapshot
from tests.support import trainers
from tests.support.containers import KEY, blob_names, live_blobs
from tests.support.faults import Answer, Exchange, Gate, Hold
from tests.support.proxy import FaultProxy
from tests.support.trainers import Namespace

SPACE = Namespace("lightning")
REFUSAL = Answer(400, "InvalidInput")


@pytest.fixture
def plugin() -> Any:
    plugin = SPACE.plugin(async_save=True)
    yield plugin
    plugin.teardown()  # an unexpected failure fails the test


def data_of(name: str) -> Callable[[Exchange], bool]:
    """Requests that upload the data of one checkpoint."""
    return lambda seen: seen.kind == "Put Block" and f"/{name}/" in seen.path


def value_at(url: str) -> float | None:
    """The value of the checkpoint at a URL, loaded by a plugin without pending saves."""
    try:
        loaded: float = SPACE.plugin().load_checkpoint(url)["w"][0].item()
    except CheckpointNotFoundError:
        return None
    return loaded


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((1000,), value), "step": value}


def result_behind(gate: Gate, call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call, which ends only once the gate is open."""
    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(call, *arguments)
        gate.wait_for(1)
        with pytest.raises(TimeoutError):
            called.result(timeout=0.3)
        gate.open()
        return called.result(timeout=60)


# ---- Order ---------------------------------------------------------------------------------------------------------


def test_the_caller_waits_for_the_copy_alone(
    plugin: Any, proxy: FaultProxy, proxied_container: str, container: str
) -> None:
    proxy.when(data_of("a")).do(Hold(gate := Gate()))
    checkpoint = state(1)
    plugin.save_checkpoint(checkpoint, f"{proxied_container}/a")
    checkpoint["w"].zero_()
    checkpoint["step"] = 0
    gate.wait_for(1)
    assert value_at(f"{container}/a") is None
    gate.open()
    plugin.wait()
    assert plugin.load_checkpoint(f"{container}/a")["step"] == 1
    assert value_at(f"{container}/a") == 1


def test_a_checkpoint_is_removed_after_the_one_that_replaces_it_is_complete(
    plugin: Any, proxy: FaultProxy, proxied_container: str, container: str
) -> None:
    plugin.save_checkpoint(state(1), f"{proxied_container}/a")
    plugin.wait()
    proxy.when(data_of("b")).do(Hold(gate := Gate()))
    plugin.save_checkpoint(state(2), f"{proxied_container}/b")
    plugin.remove_checkpoint(f"{proxied_container}/a")
    gate.wait_for(1)
    assert (value_at(f"{container}/a"), value_at(f"{container}/b")) == (1, None)
    gate.open()
    plugin.wait()
    assert (value_at(f"{container}/a"), value_at(f"{container}/b")) == (None, 2)
    last_commit = [seen.path.endswith("/b/.metadata") for seen in proxy.requests("Put Blob", "Delete")].index(True)
    assert all("/a/" in seen.path for seen in proxy.requests("Put Blob", "Delete")[last_commit + 1 :])


def test_saves_of_one_url_land_in_the_order_of_the_calls(plugin: Any, container: str) -> None:
    for value in range(5):
        plugin.save_checkpoint(state(value), f"{container}/last")
    plugin.wait()
    assert value_at(f"{container}/last") == 4
    assert blob_names(f"{container}/last") == live_blobs(f"{container}/last")


def test_a_third_save_waits_for_the_first(plugin: Any, proxy: FaultProxy, proxied_container: str) -> None:
    proxy.when(data_of("a")).do(Hold(gate := Gate()))
    for name in "ab":
        plugin.save_checkpoint(state(1), f"{proxied_container}/{name}")
    result_behind(gate, plugin.save_checkpoint, state(1), f"{proxied_container}/c")
    plugin.wait()
    assert {value_at(f"{proxied_container}/{name}") for name in "abc"} == {1}


def test_a_load_waits_for_what_is_pending(plugin: Any, proxy: FaultProxy, proxied_container: str) -> None:
    plugin.save_checkpoint(state(1), f"{proxied_container}/a")
    plugin.wait()
    proxy.when(data_of("a")).do(Hold(gate := Gate()))
    plugin.save_checkpoint(state(2), f"{proxied_container}/a")
    assert result_behind(gate, plugin.load_checkpoint, f"{proxied_container}/a")["step"] == 2


def wait_for_thread() -> None:
    """Wait until the thread of the background saves has ended."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint-saves":
            thread.join(60)
            assert not thread.is_alive()


def test_no_thread_remains_when_there_is_nothing_to_do(plugin: Any, container: str) -> None:
    plugin.save_checkpoint(state(1), f"{container}/a")
    plugin.wait()
    wait_for_thread()
    plugin.save_checkpoint(state(2), f"{container}/a")
    plugin.wait()
    assert value_at(f"{container}/a") == 2


# ---- Other ways to the same place --------------------------------------------------------------------------------

WAYS: dict[str, Callable[[str, Path], Any]] = {
    "another plugin": lambda url, tmp: SPACE.plugin().load_checkpoint(url)["hyper_parameters"]["lr"],
    "one that saves in the background, too": lambda url, tmp: SPACE.plugin(async_save=True).load_checkpoint(url)[
        "hyper_parameters"
    ]["lr"],
    "load_from_checkpoint": lambda url, tmp: SPACE.ours.load_from_checkpoint(
        type(SPACE.model()), url, credential=KEY
    ).hparams["lr"],
    "Fabric": lambda url, tmp: SPACE.fabric.Fabric(accelerator="cpu", devices=1, plugins=[SPACE.plugin()]).load(url)[
        "hyper_parameters"
    ]["lr"],
    "export_checkpoint": lambda url, tmp: exported(url, tmp)["hyper_parameters"]["lr"],
    "another Trainer": lambda url, tmp: restored(url, tmp),
}


def exported(url: str, folder: Path) -> Any:
    SPACE.ours.export_checkpoint(url, folder / "exported.ckpt", credential=KEY)
    return torch.load(folder / "exported.ckpt", weights_only=True)


def restored(url: str, folder: Path) -> float:
    trainer = SPACE.trainer(folder)
    seen: list[float] = []
    model = SPACE.model()
    model.on_load_checkpoint = lambda checkpoint: seen.append(checkpoint["hyper_parameters"]["lr"])
    trainer.validate(model, ckpt_path=url, verbose=False)
    return seen[0]


@pytest.mark.parametrize("way", WAYS)
def test_every_load_in_this_process_gets_the_last_save(
    proxy: FaultProxy, proxied_container: str, tmp_path: Path, way: str
) -> None:
    plugin = SPACE.plugin(async_save=True)
    url = f"{proxied_container}/a"
    for lr in (0.25, 0.5):
        trainer = SPACE.trainer(tmp_path, plugin=plugin)
        trainer.fit(SPACE.model(lr=lr))
        if lr == 0.5:
            proxy.when(data_of("a")).do(Hold(gate := Gate()))
        trainer.save_checkpoint(url)
        if lr == 0.25:
            plugin.wait()
    gate.wait_for(1)
    assert result_behind(gate, WAYS[way], url, tmp_path) == 0.5
    plugin.teardown()


def test_another_plugins_save_lands_after_the_one_that_was_asked_for_before(
    plugin: Any, proxy: FaultProxy, proxied_container: str
) -> None:
    url = f"{proxied_container}/a"
    proxy.when(data_of("a")).do(Hold(gate := Gate()))
    plugin.save_checkpoint(state(1), url)
    result_behind(gate, SPACE.plugin().save_checkpoint, state(2), f"{url}/")
    plugin.wait()
    assert value_at(url) == 2


def test_a_load_by_another_plugin_raises_the_failure_and_so_does_the_first_plugin(
    plugin: Any, proxy: FaultProxy, proxied_container: str
) -> None:
    plugin.save_checkpoint(state(1), f"{proxied_container}/a")
    plugin.wait()
    proxy.when(data_of("a"), times=None).do(REFUSAL)
    plugin.save_checkpoint(state(2), f"{proxied_container}/a")
    other = SPACE.plugin()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="in the background failed"):
            other.load_checkpoint(f"{proxied_container}/a")
    with pytest.raises(CheckpointError, match="in the background failed"):
        plugin.wait()
    assert other.load_checkpoint(f"{proxied_container}/a")["step"] == 1


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize(
    "refusal",
    [
        Answer(403, "AuthorizationPermissionMismatch"),
        Answer(409, "BlobImmutableDueToPolicy"),
        Answer(412, "LeaseIdMissing"),
    ],
    ids=lambda refusal: refusal.code,
)
def test_a_fit_goes_on_where_nothing_may_be_deleted(
    proxy: FaultProxy,
    proxied_container: str,
    container: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    async_save: bool,
    refusal: Answer,
) -> None:
    proxy.when("Delete", times=None).do(refusal)
    trainer = SPACE.trainer(
        tmp_path,
        SPACE.checkpoint(f"{proxied_container}/run"),
        max_epochs=3,
        plugin=SPACE.plugin(async_save=async_save),
    )
    trainer.fit(SPACE.model())
    assert trainer.current_epoch == 3
    names = {f"epoch={epoch}-step={4 * (epoch + 1)}.ckpt" for epoch in range(3)}
    assert {entry.name for entry in list_checkpoints(f"{container}/run", credential=KEY)} == names
    said = [record for record in caplog.records if "does not allow removing it" in record.message]
    assert [record.levelname for record in said] == ["WARNING"] * 2
    assert all(KEY not in record.message for record in said)


# ---- Failures ------------------------------------------------------------------------------------------------------

NEXT_CALLS: dict[str, Callable[[Any, str], object]] = {
    "save": lambda plugin, url: plugin.save_checkpoint(state(3), f"{url}/c"),
    "load": lambda plugin, url: plugin.load_checkpoint(f"{url}/a"),
    "remove": lambda plugin, url: plugin.remove_checkpoint(f"{url}/a"),
    "wait": lambda plugin, url: plugin.wait(),
    "teardown": lambda plugin, url: plugin.teardown(),
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_a_failed_save_keeps_the_old_checkpoint_and_is_raised_once_by_the_next_call(
    plugin: Any, proxy: FaultProxy, proxied_container: str, container: str, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.save_checkpoint(state(1), f"{proxied_container}/a")
    plugin.save_checkpoint(state(1), f"{proxied_container}/b")
    plugin.wait()
    proxy.when(data_of("b"), times=None).do(Hold(gate := Gate()), REFUSAL)
    plugin.save_checkpoint(state(2), f"{proxied_container}/b")
    plugin.remove_checkpoint(f"{proxied_container}/a")
    gate.wait_for(1)
    gate.open()
    wait_for_thread()
    # Already now, because there may be no next call.
    assert [record.levelname for record in caplog.records if "/b in the background failed" in record.message] == [
        "ERROR"
    ]
    with pytest.raises(CheckpointError, match=r"The save of .*/b in the background failed") as caught:
        NEXT_CALLS[call](plugin, proxied_container)
    assert isinstance(caught.value.__cause__, RequestRefusedError)
    assert [value_at(f"{container}/{name}") for name in "abc"] == [1, 1, None]
    plugin.wait()
    plugin.remove_checkpoint(f"{proxied_container}/a")
    plugin.save_checkpoint(state(4), f"{proxied_container}/c")
    plugin.wait()
    assert [value_at(f"{container}/{name}") for name in "abc"] == [None, 1, 4]


def test_a_removal_that_failed_is_reported(plugin: Any, proxy: FaultProxy, proxied_container: str) -> None:
    plugin.save_checkpoint(state(1), f"{proxied_container}/a")
    proxy.when("Delete").do(REFUSAL)
    plugin.remove_checkpoint(f"{proxied_container}/a")
    with pytest.raises(CheckpointError, match="The removal of"):
        plugin.wait()
    assert value_at(f"{proxied_container}/a") == 1


def test_a_save_that_waits_for_memory_raises_a_failure(
    plugin: Any, proxy: FaultProxy, proxied_container: str, container: str
) -> None:
    proxy.when(data_of("a"), times=None).do(Hold(gate := Gate()), REFUSAL)
    for name in "ab":
        plugin.save_checkpoint(state(1), f"{proxied_container}/{name}")
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(plugin.save_checkpoint, state(1), f"{proxied_container}/c")
        gate.wait_for(1)
        gate.open()
        with pytest.raises(CheckpointError, match="/a in the background failed"):
            third.result(timeout=60)
    plugin.wait()
    assert [value_at(f"{container}/{name}") for name in "abc"] == [None, 1, None]


def test_what_cannot_be_copied_or_pickled_fails_in_the_call_and_takes_no_room(plugin: Any, container: str) -> None:
    saves = BackgroundSaves()
    for _ in range(3):
        with pytest.raises(NotImplementedError):
            saves.save(Packed({"w": torch.empty(2, device="meta")}, torch.empty(0)), "nowhere", lambda state: None)
        with pytest.raises(Exception, match="pickle"):
            plugin.save_checkpoint({"f": lambda: None}, f"{container}/a")
    done: list[int] = []
    for value in range(3):
        saves.save(Packed({"w": torch.tensor(value)}, torch.empty(0)), "x", lambda state: done.append(int(state["w"])))
    saves.wait()
    assert done == [0, 1, 2]


@pytest.mark.parametrize("last_epoch", [False, True])
def test_fit_raises_what_failed_in_the_background(
    proxy: FaultProxy, proxied_container: str, container: str, tmp_path: Path, last_epoch: bool
) -> None:
    nth = 3 if last_epoch else 2
    proxy.when(data_of("last"), nth=nth, times=None).do(REFUSAL)
    trainer = SPACE.trainer(
        tmp_path,
        trainers.save_each_epoch(SPACE.pl, f"{proxied_container}/last"),
        max_epochs=3,
        plugin=SPACE.plugin(async_save=True),
    )
    with pytest.raises(CheckpointError, match="in the background failed"):
        trainer.fit(SPACE.model())
    saved = SPACE.plugin().load_checkpoint(f"{container}/last")
    assert saved["epoch"] == nth - 2
    assert trainer.current_epoch == (3 if last_epoch else trainer.current_epoch)


# ---- Processes -----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, threading, torch
from azure_torch_ckpt.lightning import AzureBlobCheckpointIO
good, bad, key = sys.argv[1:]
plugin = AzureBlobCheckpointIO(key, async_save=True)
plugin.save_checkpoint({"w": torch.full((1000,), 5.0), "step": 5}, good)
plugin.save_checkpoint({"w": torch.ones(1)}, bad)
print("the main thread ends", flush=True)
"""


def test_the_interpreter_exits_when_the_last_save_is_done_and_a_failure_is_not_silent(
    proxy: FaultProxy, proxied_container: str, container: str
) -> None:
    proxy.when(data_of("a")).do(Hold(gate := Gate()))
    command = [sys.executable, "-c", SCRIPT, f"{proxied_container}/a", f"{container}-gone/b", KEY]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "the main thread ends\n"
        gate.wait_for(1)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        gate.open()
        _, errors = process.communicate(timeout=60)
    assert value_at(f"{container}/a") == 5
    assert "/b in the background failed" in errors
    assert KEY not in errors


def in_child(plugin: Any, url: str) -> None:
    plugin.wait()
    plugin.save_checkpoint(state(7), f"{url}/child")
    plugin.teardown()


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_forked_child_has_nothing_pending_and_leaves_the_parents_saves_alone(
    plugin: Any, proxy: FaultProxy, proxied_container: str, container: str
) -> None:
    plugin.save_checkpoint(state(1), f"{proxied_container}/a")
    plugin.wait()
    proxy.when("Put Block List").do(Hold(gate := Gate(), at="answer"))  # the data is there, and not yet a checkpoint
    plugin.save_checkpoint(state(2), f"{proxied_container}/a")
    gate.wait_for(1)
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(plugin, proxied_container))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    gate.open()
    plugin.wait()
    assert (value_at(f"{container}/a"), value_at(f"{container}/child")) == (2, 7)


# ---- Memory --------------------------------------------------------------------------------------------------------


def addresses(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_a_copy_takes_the_memory_of_the_one_before() -> None:
    snapshot = Snapshot()
    live = {"w": torch.arange(6.0).view(2, 3).t(), "n": torch.tensor(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    first = snapshot.take(live)
    assert all(torch.equal(first[name], live[name]) and first[name].is_contiguous() for name in live)
    assert all(first[name].data_ptr() != live[name].data_ptr() for name in live)
    before = addresses(first)
    live["w"].add_(1)
    second = snapshot.take(live)
    assert addresses(second) == before
    assert torch.equal(second["w"], live["w"])
    third = snapshot.take({"w": live["w"], "n": torch.tensor([1, 2])})
    assert third["w"].data_ptr() == before["w"]
    assert third["n"].tolist() == [1, 2]
    assert third.keys() == {"w", "n"}


def test_saves_one_at_a_time_take_one_copys_memory_and_teardown_gives_it_back(
    plugin: Any, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[dict[str, int]] = []
    memory: list[weakref.ref[torch.Tensor]] = []
    take = Snapshot.take

    def noted(self: Snapshot, tensors: Any) -> dict[str, torch.Tensor]:
        copies = take(self, tensors)
        taken.append(addresses(copies))
        memory.append(weakref.ref(copies["w"]))
        return copies

    monkeypatch.setattr(Snapshot, "take", noted)
    weight = torch.zeros(1000)
    for value in range(4):
        plugin.save_checkpoint({"w": weight.fill_(value)}, f"{container}/a")
        plugin.wait()
    assert len(taken) == 4
    assert taken == taken[:1] * 4
    assert memory[-1]() is not None
    plugin.teardown()
    wait_for_thread()
    gc.collect()
    assert memory[-1]() is None
