"""AzureBlobCheckpointIO under a real Trainer and a real Fabric, in both of Lightning's namespaces."""

from __future__ import annotations

import contextlib
import io
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobWriter,
    BlobIO,
    BlobLocation,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    ContainerNotFoundError,
    LocationError,
    UnsupportedCheckpointError,
)
from tests.support import jobs, trainers
from tests.support.containers import KEY, blob_names, live_blobs, store_of
from tests.support.deep_equality import assert_alike, through_torch
from tests.support.faults import Call, Exchange, Kill
from tests.support.proxy import FaultProxy
from tests.support.states import DTYPES, fill
from tests.support.trainers import NAMESPACES, Namespace

pytestmark = pytest.mark.usefixtures("folder")


def mixture() -> dict[Any, Any]:
    weight = torch.nn.Parameter(torch.randn(40, 30))
    return {
        "state_dict": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict(),
        "tied": [weight, weight, weight.detach(), weight[3:7].t()],
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(5).expand(4, 5)}}}],
        "sparse": torch.eye(3).to_sparse(),
        "empty": [torch.empty(0, 3), {}, (), None],
        7: (1, "x", 2**80, np.float64(0.5)),
        "dtypes": {str(dtype): fill(torch.empty(3, 2, dtype=dtype)) for dtype in DTYPES},
    }


# ---- The plugin ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(space: Namespace, url: str) -> None:
    checkpoint = mixture()
    space.plugin().save_checkpoint(checkpoint, url)
    assert_alike(space.plugin().load_checkpoint(url, weights_only=False), through_torch(checkpoint, weights_only=False))


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "a default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("made", ["", "inference_mode"])
@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_is_saved_and_loaded_in_every_mode_of_torch(
    lightning: Namespace, container: str, made: str, async_save: bool
) -> None:
    """A validation hook saves in inference mode, and what training saves next takes the memory of that copy."""
    with MODES[made]():
        checkpoint = {"w": torch.nn.Parameter(torch.ones(3)), "view": torch.arange(20.0).reshape(4, 5).t()[1:]}
    plugin = lightning.plugin(async_save=async_save)
    for saved in [*MODES, *reversed(MODES)]:
        with MODES[saved]():
            plugin.save_checkpoint(checkpoint, f"{container}/a")
        plugin.wait()
        for loaded in MODES:
            with MODES[loaded]():
                found = plugin.load_checkpoint(f"{container}/a")
            assert found["w"].requires_grad == checkpoint["w"].requires_grad
            for name, tensor in checkpoint.items():
                assert torch.equal(found[name].detach().clone(), tensor.detach().clone()), (saved, loaded, name)
    plugin.teardown()


def test_shapes_alone_cost_no_data(lightning: Namespace, proxy: FaultProxy, proxied_container: str) -> None:
    checkpoint: dict[str, Any] = {"hyper_parameters": {"lr": 0.5}, "w": torch.nn.Parameter(torch.ones(900, 300).t())}
    lightning.plugin().save_checkpoint(checkpoint, f"{proxied_container}/a")
    before = len(proxy.log)
    found = lightning.plugin().load_checkpoint(f"{proxied_container}/a", map_location="meta")
    assert found["w"].is_meta and isinstance(found["w"], torch.nn.Parameter)
    assert (found["w"].shape, found["w"].stride()) == (checkpoint["w"].shape, checkpoint["w"].stride())
    assert found["hyper_parameters"] == checkpoint["hyper_parameters"]
    assert sum(seen.sent for seen in proxy.log[before:] if seen.kind == "Get Blob") < 20_000


def test_checkpoints_of_one_namespace_load_in_the_other(url: str) -> None:
    for saving, loading in (NAMESPACES, NAMESPACES[::-1]):
        Namespace(saving).plugin().save_checkpoint({"saved by": saving, "w": torch.ones(2)}, url)
        assert Namespace(loading).plugin().load_checkpoint(url)["saved by"] == saving


def test_a_path_of_a_url_is_understood(lightning: Namespace, url: str) -> None:
    plugin = lightning.plugin()
    mangled = Path(url)
    assert str(mangled) != url
    plugin.save_checkpoint({"w": torch.ones(1)}, mangled)
    assert plugin.load_checkpoint(url)["w"] == 1
    plugin.remove_checkpoint(mangled)
    assert blob_names(url) == set()


def test_a_url_outside_of_blob_storage_is_refused(lightning: Namespace) -> None:
    for use in (lightning.plugin().load_checkpoint, lightning.plugin().remove_checkpoint):
        with pytest.raises(LocationError):
            use("https://account.blob.core.windows.net")


def test_local_paths_are_left_to_lightnings_own_plugin(space: Namespace, tmp_path: Path) -> None:
    plugin = space.plugin(async_save=True)
    for path in (tmp_path / "a.ckpt", str(tmp_path / "b.ckpt")):
        plugin.save_checkpoint({"w": torch.ones(1)}, path)
        assert torch.load(path)["w"] == 1
        assert plugin.load_checkpoint(path)["w"] == 1
        plugin.remove_checkpoint(path)
        plugin.remove_checkpoint(path)
        assert not Path(path).exists()


def test_storage_options_are_refused_as_lightning_refuses_them(lightning: Namespace, url: str, tmp_path: Path) -> None:
    for path in (url, tmp_path / "x.ckpt"):
        with pytest.raises(TypeError, match="storage_options"):
            lightning.plugin().save_checkpoint({}, path, storage_options={"a": 1})
    assert blob_names(url) == set()


def test_a_shard_of_another_ranks_tensor_is_not_saved_for_the_whole(lightning: Namespace, url: str) -> None:
    plugin = lightning.plugin()
    plugin.save_checkpoint({"w": torch.ones(4)}, url)
    # A group of two ranks in one process: nothing here talks to the other one.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        plugin.save_checkpoint({"w": DTensor.from_local(torch.zeros(4), mesh, [Replicate()])}, url)
        with pytest.raises(CheckpointError, match="'w'"):
            plugin.save_checkpoint({"w": DTensor.from_local(torch.ones(4), mesh, [Shard(0)])}, url)
    finally:
        dist.destroy_process_group()
    assert torch.equal(plugin.load_checkpoint(url)["w"], torch.zeros(4))


def test_a_save_over_a_checkpoint_leaves_the_new_one_and_nothing_else(lightning: Namespace, url: str) -> None:
    plugin = lightning.plugin()
    for step in range(3):
        plugin.save_checkpoint({"step": step, "w": torch.full((5,), float(step))}, url)
        loaded = plugin.load_checkpoint(url)
        assert (loaded["step"], loaded["w"].tolist()) == (step, [step] * 5)
        assert blob_names(url) == live_blobs(url)
        assert len(blob_names(url)) == 2


def test_removal_takes_everything_and_a_second_one_is_nothing_to_do(lightning: Namespace, url: str) -> None:
    plugin = lightning.plugin()
    plugin.remove_checkpoint(url)
    plugin.save_checkpoint(mixture(), url)
    plugin.save_checkpoint({"w": 1}, f"{url}-v1")
    plugin.remove_checkpoint(url)
    plugin.remove_checkpoint(url)
    assert blob_names(url) == set()
    assert plugin.load_checkpoint(f"{url}-v1") == {"w": 1}
    with pytest.raises(CheckpointNotFoundError):
        plugin.load_checkpoint(url)


def test_a_blob_that_torch_save_wrote_is_loaded_and_removed(lightning: Namespace, url: str) -> None:
    with BlobIO(url, "wb", credential=KEY) as stream:
        torch.save({"w": torch.ones(3), "thing": np.float32(1)}, stream)
    plugin = lightning.plugin()
    assert plugin.load_checkpoint(url, weights_only=False)["w"].tolist() == [1, 1, 1]
    plugin.remove_checkpoint(url)
    assert not list(store_of(url).list(""))


def test_an_empty_blob_is_a_folder_and_not_a_checkpoint(lightning: Namespace, url: str) -> None:
    path, store = BlobLocation.parse(url).path, store_of(url)
    store.put(path, b"")
    with pytest.raises(CheckpointNotFoundError):
        lightning.plugin().load_checkpoint(url)
    lightning.plugin().remove_checkpoint(url)
    assert store.stat(path).size == 0


def test_a_checkpoint_of_dcp_alone_is_refused_with_what_to_do(lightning: Namespace, url: str) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=AzureBlobWriter(url, credential=KEY), no_dist=True)
    with pytest.raises(UnsupportedCheckpointError, match=r"torch\.distributed\.checkpoint\.load"):
        lightning.plugin().load_checkpoint(url)


def test_torch_alone_finds_the_tensors_under_their_usual_names(lightning: Namespace, url: str) -> None:
    lightning.plugin().save_checkpoint({"state_dict": {"layer.weight": torch.arange(3.0)}, "epoch": 1}, url)
    state = {"state_dict": {"layer.weight": torch.zeros(3)}}
    lightning_reader = lightning.plugin().reader(url)
    dcp.load(state, storage_reader=lightning_reader, no_dist=True)
    assert state["state_dict"]["layer.weight"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("nth", [1, 2], ids=["before the skeleton", "between skeleton and tensors"])
def test_a_checkpoint_that_is_replaced_while_it_is_loaded_is_not_mixed_with_the_new_one(
    lightning: Namespace, proxy: FaultProxy, proxied_container: str, container: str, nth: int
) -> None:
    plugin = lightning.plugin()
    plugin.save_checkpoint({"w": torch.zeros(1000), "step": 0}, f"{container}/last.ckpt")

    def replace() -> None:
        lightning.plugin().save_checkpoint({"w": torch.ones(1000), "step": 1}, f"{container}/last.ckpt")

    proxy.when(lambda seen: seen.kind == "Get Blob" and "distcp" in seen.path, nth=nth).do(Call(replace, "request"))
    with pytest.raises(CheckpointReplacedError):
        plugin.load_checkpoint(f"{proxied_container}/last.ckpt")
    loaded = plugin.load_checkpoint(f"{proxied_container}/last.ckpt")
    assert (loaded["step"], loaded["w"][0]) == (1, 1)


def test_errors_are_the_packages_own(lightning: Namespace, container: str) -> None:
    wrong = lightning.ours.AzureBlobCheckpointIO("A" * 86 + "==")
    with pytest.raises(AccessDeniedError):
        wrong.save_checkpoint({"w": torch.ones(1)}, f"{container}/x")
    with pytest.raises(AccessDeniedError):
        wrong.load_checkpoint(f"{container}/x")
    with pytest.raises(ContainerNotFoundError):
        lightning.plugin().save_checkpoint({}, f"{container}-gone/x")


def test_the_plugin_can_be_used_after_teardown_and_in_another_process(space: Namespace, url: str) -> None:
    plugin = space.plugin(async_save=True)
    plugin.save_checkpoint({"n": 1}, url)
    plugin.teardown()
    there = pickle.loads(pickle.dumps(plugin))
    there.save_checkpoint({"n": 2}, url)
    there.teardown()
    there.teardown()
    assert plugin.load_checkpoint(url) == {"n": 2}
    assert KEY not in repr(plugin)


def test_the_store_of_a_container_is_made_once(lightning: Namespace, container: str) -> None:
    plugin = lightning.plugin()
    location, store = plugin.store(f"{container}/a/b")
    assert location.path == "a/b"
    assert plugin.store(Path(f"{container}/c"))[1] is store
    assert plugin.store(f"{container}-other/a")[1] is not store


# ---- The namespaces ------------------------------------------------------------------------------------------------


def imported(name: str) -> set[str]:
    """In a process that has seen neither: which of the two are imported after our package for one of them."""
    assert not set(NAMESPACES) & sys.modules.keys()
    assert Namespace(name).ours
    return set(NAMESPACES) & sys.modules.keys()


def error_without(name: str) -> str:
    sys.modules[name] = None  # type: ignore[assignment]
    with pytest.raises(ImportError) as caught:
        print(Namespace(name).ours)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMESPACES)
def test_importing_one_namespace_does_not_import_the_other(name: str) -> None:
    (end,) = jobs.run(imported, (name,))
    assert end.value == {name}, end.error


@pytest.mark.parametrize(
    ("name", "hint"), [("lightning", "azure-torch-ckpt[lightning]"), ("pytorch_lightning", "pytorch-lightning>=2.5")]
)
def test_without_lightning_the_error_says_what_to_install(name: str, hint: str) -> None:
    (end,) = jobs.run(error_without, (name,))
    assert f"pip install '{hint}'" in end.value


def test_both_packages_have_the_same_names(space: Namespace) -> None:
    assert space.ours.__all__ == Namespace("lightning").ours.__all__
    assert issubclass(space.ours.AzureBlobCheckpointIO, space.pl.plugins.CheckpointIO)


# ---- Trainer and Fabric --------------------------------------------------------------------------------------------


def fitted(
    space: Namespace, root: Path, epochs: int, callbacks: Any = (), ckpt_path: str | None = None, **arguments: Any
) -> Any:
    stopping = space.pl.callbacks.EarlyStopping("val_loss", patience=50)
    trainer = space.trainer(root, stopping, *callbacks, max_epochs=epochs, plugin=space.plugin(**arguments))
    model = space.model()
    if ckpt_path is not None:  # the weights of a resumed run come from the checkpoint alone
        torch.nn.init.zeros_(model.body[0].weight)
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    space: Namespace, url: str, tmp_path: Path, async_save: bool
) -> None:
    plugin = space.plugin()
    whole = fitted(space, tmp_path, 4)
    whole.save_checkpoint(f"{url}/whole")

    fitted(space, tmp_path, 2, [trainers.save_each_epoch(space.pl, url)], async_save=async_save)
    resumed = fitted(space, tmp_path, 4, ckpt_path=url)
    assert resumed.current_epoch == 4
    assert resumed.lightning_module.losses == whole.lightning_module.losses[8:]
    resumed.save_checkpoint(f"{url}/resumed")

    one, other = plugin.load_checkpoint(f"{url}/whole"), plugin.load_checkpoint(f"{url}/resumed")
    assert_alike(other, one)
    assert one["optimizer_states"][0]["state"][0]["step"] == 16
    assert set(one) >= {"loops", "callbacks", "lr_schedulers", "hyper_parameters"}
    assert not list(tmp_path.rglob("*"))


def resumed_and_uninterrupted(url: str, root: Path) -> tuple[int, bytes, bytes]:
    """The step at the end of a run of 3 epochs that resumes from `url`; its module's state, and that of a whole run."""
    states = []
    space = Namespace("lightning")
    runs = [fitted(space, root, 3, ckpt_path=url), fitted(space, root, 3)]
    for trainer in runs:
        state = io.BytesIO()
        torch.save(trainer.lightning_module.state_dict(), state)
        states.append(state.getvalue())
    return runs[0].global_step, states[0], states[1]


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_run_killed_between_data_and_metadata_of_an_overwritten_checkpoint_resumes_from_the_old_one(
    lightning: Namespace, proxy: FaultProxy, proxied_container: str, container: str, tmp_path: Path, async_save: bool
) -> None:
    def commit(seen: Exchange) -> bool:
        return seen.kind == "Put Blob" and seen.path.endswith(".metadata")

    arguments = ("lightning", f"{proxied_container}/last.ckpt", str(tmp_path), 3, async_save)
    with jobs.Job(trainers.train, [arguments]) as job:
        proxy.when(commit, nth=2).do(Kill(job.pid(), at="request"))
        job.go()
        assert job.end(seconds=60).exitcode == -signal.SIGKILL
    url = f"{container}/last.ckpt"
    assert len(blob_names(url)) > len(live_blobs(url)) == 2  # the second save's data is there, and invisible
    old = lightning.plugin().load_checkpoint(url)
    assert (old["epoch"], old["global_step"]) == (0, 4)

    # In a process like that of the first part: the order of additions, and so the last bits, depend on its threads.
    (end,) = jobs.run(resumed_and_uninterrupted, (url, tmp_path))
    step, resumed, uninterrupted = end.value
    assert step == 12
    assert_alike(torch.load(io.BytesIO(resumed)), torch.load(io.BytesIO(uninterrupted)))


def test_testing_and_predicting_take_a_url(space: Namespace, url: str, tmp_path: Path) -> None:
    fitted(space, tmp_path, 1, [trainers.save_each_epoch(space.pl, url)])
    trainer = space.trainer(tmp_path)
    model = space.model()
    before = trainer.validate(model, verbose=False)[0]["val_loss"]
    assert trainer.validate(model, ckpt_path=url, verbose=False)[0]["val_loss"] != before
    with pytest.raises(CheckpointNotFoundError):
        trainer.validate(model, ckpt_path=f"{url}-gone")


def test_the_plugin_works_in_forked_trainers_of_several_processes(
    lightning: Namespace, url: str, tmp_path: Path
) -> None:
    model = lightning.model()
    before = model.state_dict()["body.0.weight"].clone()
    trainer = lightning.trainer(
        tmp_path,
        trainers.save_each_epoch(lightning.pl, url),
        devices=2,
        strategy="ddp_fork",
        plugin=lightning.plugin(async_save=True),
    )
    trainer.fit(model)
    saved = lightning.plugin().load_checkpoint(url)
    assert saved["global_step"] == 2  # four batches over two processes
    assert not torch.equal(model.state_dict()["body.0.weight"], before)
    assert torch.equal(model.state_dict()["body.0.weight"], saved["state_dict"]["body.0.weight"])


def test_fabric_saves_and_loads_through_the_plugin(space: Namespace, url: str) -> None:
    plugin = space.plugin(async_save=True)
    fabric = space.fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    torch.manual_seed(0)
    model, optimizer = fabric.setup(module := torch.nn.Linear(3, 2), torch.optim.Adam(module.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    fabric.save(url, {"model": model, "optimizer": optimizer, "step": 7})
    wanted = through_torch({"model": module.state_dict(), "optimizer": optimizer.state_dict()})

    torch.manual_seed(1)
    other = fabric.setup(torch.nn.Linear(3, 2))
    state = {"model": other, "step": 0}
    rest = fabric.load(url, state)
    assert state["step"] == 7
    assert_alike(through_torch(dict(other.state_dict())), dict(wanted["model"]))
    assert_alike(rest["optimizer"], wanted["optimizer"])
    assert_alike(fabric.load(url)["optimizer"], wanted["optimizer"])
    plugin.save_checkpoint(module.state_dict(), f"{url}/weights")
    fabric.load_raw(f"{url}/weights", torch.nn.Linear(3, 2))
    plugin.teardown()


def test_lightnings_own_asynchronous_plugin_takes_ours(space: Namespace, url: str, tmp_path: Path) -> None:
    trainer = space.trainer(
        tmp_path,
        trainers.save_each_epoch(space.pl, url),
        plugin=space.pl.plugins.AsyncCheckpointIO(space.plugin()),
    )
    trainer.fit(space.model())
    assert space.plugin().load_checkpoint(url)["global_step"] == 4
