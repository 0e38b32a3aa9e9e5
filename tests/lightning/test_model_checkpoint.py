"""AzureBlobModelCheckpoint leaves in Blob Storage what ModelCheckpoint leaves in a local folder, and finds it again."""

from __future__ import annotations

import base64
import datetime
import logging
import pickle
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
import torch

from azure_torch_ckpt import AccessDeniedError
from azure_torch_ckpt.dcp.verification import verify
from azure_torch_ckpt.errors import ConfigurationError
from azure_torch_ckpt.location import BlobLocation
from tests.support import containers
from tests.support.containers import store_of
from tests.support.deep_equality import assert_alike
from tests.support.trainers import NAMESPACES, Namespace, etags, names

pytestmark = pytest.mark.usefixtures("folder")


SCORES = (5.0, 3.0, 4.0, 2.0, 6.0, 1.0)
WRONG_KEY = base64.b64encode(b"wrong" * 13).decode()


@pytest.fixture
def container_sas(container: str) -> str:
    return containers.container_sas(container, "rcwdl")


def state_of(url: str) -> Any:
    return Namespace("lightning").plugin().load_checkpoint(url)


def local_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.ckpt")}


def relative(state: dict[str, Any], folder: str) -> Any:
    """The state of a callback, with its paths relative to `folder`, and as they are in a local folder."""
    prefix = BlobLocation.parse(folder).path if folder.startswith("http") else folder

    def short(path: str) -> str:
        return (BlobLocation.parse(path).path if path.startswith("http") else path).removeprefix(f"{prefix}/")

    scores = {short(path): score for path, score in state["best_k_models"].items()}
    paths = {name: short(state[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
    return {**state, **paths, "best_k_models": scores, "dirpath": None}


# ---- The stock callback is the measure -----------------------------------------------------------------------------

ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top 1": {"monitor": "val_loss"},
    "top 2": {"monitor": "val_loss", "save_top_k": 2, "save_last": True},
    "top 2 by max": {"monitor": "val_loss", "save_top_k": 2, "mode": "max"},
    "all": {"save_top_k": -1, "save_last": True},
    "only last": {"save_top_k": 0, "save_last": True},
    "no checkpoint": {"save_top_k": 0},
    "every 3 steps": {"every_n_train_steps": 3, "save_top_k": -1, "save_last": True},
    "by time": {"train_time_interval": datetime.timedelta(0), "save_top_k": -1},
    "every 2 epochs": {"every_n_epochs": 2, "save_top_k": -1},
    "at the epoch's end": {"save_on_train_epoch_end": True, "save_top_k": -1},
    "after validation": {"save_on_train_epoch_end": False, "monitor": "val_loss", "save_top_k": 3},
    "weights only": {"save_weights_only": True, "save_last": True},
    "names that a URL must encode": {"filename": "a b%c#d?/é{epoch}", "save_top_k": -1, "save_last": True},
    "one name": {"filename": "best", "monitor": "val_loss", "save_top_k": 3},
    "one name, no counter": {"filename": "best", "monitor": "val_loss", "enable_version_counter": False},
}


@pytest.mark.parametrize(
    ("kind", "async_save"),
    [(kind, False) for kind in ARGUMENTS] + [(kind, True) for kind in ("top 2", "all", "one name", "every 3 steps")],
)
def test_two_runs_leave_what_they_leave_in_a_local_folder(
    container: str, folder: Path, kind: str, async_save: bool
) -> None:
    arguments = ARGUMENTS[kind]
    space = Namespace(NAMESPACES[async_save])
    url, local = f"{container}/a run/checkpoints", folder / "local"
    for _ in range(2):
        ours, stock = space.checkpoint(url, **arguments), space.stock(local, **arguments)
        plugin = space.plugin(async_save=async_save)
        before = etags(url)
        space.trainer(folder, ours, max_epochs=4, plugin=plugin).fit(space.model(SCORES))
        space.trainer(folder, stock, max_epochs=4, plugin=None).fit(space.model(SCORES))
        assert names(url) == local_names(local)
        if arguments.get("enable_version_counter", True):
            assert before.items() <= etags(url).items()
        assert ours.state_key == stock.state_key
        assert_alike(relative(ours.state_dict(), url), relative(stock.state_dict(), str(local)))
    for name in names(url):
        assert verify(BlobLocation.parse(url).join(name)).ok


def test_two_callbacks_share_a_folder(space: Namespace, container: str, folder: Path) -> None:
    url = f"{container}/run"
    for epochs, best in ((3, {1, 2}), (6, {3, 5})):
        callbacks = [
            space.checkpoint(url, "best-{epoch}", monitor="val_loss", save_top_k=2),
            space.checkpoint(url, "newest-{epoch}", save_last=True),
        ]
        trainer = space.trainer(folder, *callbacks, max_epochs=epochs)
        trainer.fit(model := space.model(SCORES), ckpt_path="last")
        assert len(model.trained) == 12
        wanted = {f"best-epoch={epoch}.ckpt" for epoch in best}
        assert names(url) == wanted | {f"newest-epoch={epochs - 1}.ckpt", "last.ckpt"}
        assert callbacks[0].best_model_path == f"{url}/best-epoch={max(best, key=lambda n: -SCORES[n])}.ckpt"


@pytest.mark.parametrize("async_save", [False, True])
def test_two_callbacks_that_make_the_same_names_do_not_take_them_from_each_other(
    container: str, folder: Path, async_save: bool
) -> None:
    """A name is taken from the call that saves there, even if the save is still pending."""
    space = Namespace(NAMESPACES[async_save])
    url, local = f"{container}/run", folder / "local"
    scores = (0.9, 0.5, 0.4)  # the first is the best, and the second callback has no use for it afterwards
    plugin = space.plugin(async_save=async_save)
    for root, make, io in ((url, space.checkpoint, plugin), (local, space.stock, None)):
        best = make(root, monitor="val_loss", mode="max", save_last=True)
        newest = make(root, save_last=True)
        trainer = space.trainer(folder, best, newest, max_epochs=3, plugin=io)
        trainer.fit(space.model(scores))
        assert Path(best.best_model_path).name == "epoch=0-step=4.ckpt"
        trainer.test(space.model(), ckpt_path="best", verbose=False)
    assert names(url) == local_names(local)
    assert state_of(f"{url}/epoch=0-step=4.ckpt")["epoch"] == 0


# ---- Who owns a checkpoint -----------------------------------------------------------------------------------------


def test_a_run_from_another_folder_leaves_that_one_alone(space: Namespace, container: str, folder: Path) -> None:
    first, second = f"{container}/first", f"{container}/second"
    space.trainer(folder, space.checkpoint(first, save_last=True), max_epochs=2).fit(space.model())
    before = etags(first)
    for source in ("epoch=1-step=8.ckpt", "last.ckpt"):
        checkpoint = space.checkpoint(second, save_last=True)
        trainer = space.trainer(folder, checkpoint, max_epochs=4)
        with pytest.warns(UserWarning, match="The dirpath has changed"):
            trainer.fit(model := space.model(), ckpt_path=f"{first}/{source}")
        assert model.trained[0] == 8
        assert etags(first) == before
    assert names(second) == {"epoch=3-step=16.ckpt", "epoch=3-step=16-v1.ckpt", "last.ckpt", "last-v1.ckpt"}


def test_the_checkpoint_that_was_resumed_from_stays_and_those_after_it_are_counted(
    space: Namespace, container: str, folder: Path
) -> None:
    url = f"{container}/run"
    space.trainer(folder, space.checkpoint(url), max_epochs=2).fit(space.model())
    resumed_from = f"{url}/epoch=1-step=8.ckpt"
    before = etags(resumed_from)
    checkpoint = space.checkpoint(url)
    trainer = space.trainer(folder, checkpoint, max_epochs=3)
    trainer.fit(space.model(), ckpt_path=resumed_from)
    assert names(url) == {"epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"}
    trainer.fit_loop.max_epochs = 4
    trainer.fit(space.model())  # the same run goes on, without a ckpt_path
    assert names(url) == {"epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt"}
    assert etags(resumed_from) == before


def test_a_folder_whose_name_begins_like_ours_is_another_one(space: Namespace, container: str, folder: Path) -> None:
    space.trainer(folder, space.checkpoint(f"{container}/run-2"), max_epochs=1).fit(space.model())
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        space.trainer(folder, space.checkpoint(f"{container}/run"), max_epochs=2).fit(
            space.model(), ckpt_path=f"{container}/run-2/epoch=0-step=4.ckpt"
        )
    assert names(container) == {"run-2/epoch=0-step=4.ckpt", "run/epoch=1-step=8.ckpt"}


def test_a_container_can_be_the_folder(space: Namespace, container: str, folder: Path) -> None:
    for epochs in (2, 3):
        trainer = space.trainer(folder, space.checkpoint(container, save_last=True), max_epochs=epochs)
        trainer.fit(space.model(), ckpt_path="last")
    assert names(container) == {"epoch=2-step=12.ckpt", "last.ckpt"}


def test_a_checkpoint_of_an_exception_takes_no_name_of_another_run(
    space: Namespace, container: str, folder: Path
) -> None:
    def fail_at_step_6(*_: Any) -> None:
        if model.trainer.global_step == 6:
            raise ValueError("at step 6")

    url = f"{container}/run"
    before: dict[str, str] = {}
    model = space.model()
    for suffix in ("", "-v1"):
        model = space.model(on_train_batch_start=fail_at_step_6)
        checkpoint = space.checkpoint(url, save_on_exception=True, save_last=True)
        with pytest.raises(ValueError, match="at step 6"):
            space.trainer(folder, checkpoint, max_epochs=3).fit(model)
        assert {f"epoch=1-step=6{suffix}.ckpt", f"last{suffix}.ckpt"} <= names(url)
        assert before.items() <= etags(url).items()
        before = etags(url)
    assert state_of(f"{url}/last-v1.ckpt")["global_step"] == 6


# ---- Finding them again --------------------------------------------------------------------------------------------


def test_every_stage_takes_last_best_and_a_url(space: Namespace, container: str, folder: Path) -> None:
    url = f"{container}/run"
    checkpoint = space.checkpoint(url, monitor="val_loss", save_last=True)
    trainer = space.trainer(folder, checkpoint, max_epochs=3)
    trainer.fit(space.model((2.0, 1.0, 3.0)))
    best, last = f"{url}/epoch=1-step=8.ckpt", f"{url}/last.ckpt"
    assert checkpoint.best_model_path == best and checkpoint.last_model_path == last
    for stage in (trainer.validate, trainer.test, trainer.predict):
        arguments = {} if stage == trainer.predict else {"verbose": False}
        for ckpt_path, wanted in (("best", best), ("last", last), (best, best), (f"{last}/", f"{last}/")):
            model = space.model((2.0, 1.0, 3.0, 3.0))
            stage(model, ckpt_path=ckpt_path, **arguments)
            assert trainer.ckpt_path == wanted
            assert_alike(dict(model.state_dict()), dict(state_of(wanted)["state_dict"]))


def test_last_is_the_newest_that_is_complete(space: Namespace, container: str, folder: Path) -> None:
    url = f"{container}/run"
    for epochs in (1, 2, 3):
        checkpoint = space.checkpoint(url, save_last=True, save_top_k=0)
        space.trainer(folder, checkpoint, max_epochs=epochs).fit(space.model())
    assert names(url) == {"last.ckpt", "last-v1.ckpt", "last-v2.ckpt"}
    store = store_of(url)
    store.put("run/last-v3.ckpt/0123456789abcdef0123456789abcdef/__0_0.distcp", b"of a save that died")
    store.put("run/at-last.ckpt/.metadata", b"of something else")
    model = space.model()
    space.trainer(folder, space.checkpoint(url), max_epochs=4).fit(model, ckpt_path="last")
    assert model.trained == list(range(12, 16))


def test_last_may_be_named_after_the_epoch(space: Namespace, container: str, folder: Path) -> None:
    url = f"{container}/run"
    for epochs in (1, 2):
        checkpoint = space.checkpoint(url, save_last=True, save_top_k=0)
        checkpoint.CHECKPOINT_NAME_LAST = "{epoch}-end"
        model = space.model()
        space.trainer(folder, checkpoint, max_epochs=epochs).fit(model, ckpt_path="last")
        assert len(model.trained) == 4
        # The one that was resumed from stays.
        assert names(url) == {f"epoch={number}-end.ckpt" for number in range(1, epochs + 1)}


LAST_NAMES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "a name that begins with last": ({}, {"filename": "last-{epoch}"}),
    "no separator": ({}, {"filename": "lastepoch{epoch}"}),
    "another join character": ({"CHECKPOINT_JOIN_CHAR": "_"}, {"save_last": True, "save_top_k": 0}),
    "another word": ({"CHECKPOINT_NAME_LAST": "newest"}, {"save_last": True, "save_top_k": 0}),
    "a word with a dot": ({"CHECKPOINT_NAME_LAST": "last.one"}, {"save_last": True, "save_top_k": 0}),
    "a word that is a pattern": ({"CHECKPOINT_NAME_LAST": "las[t"}, {"save_last": True, "save_top_k": 0}),
    "another equals sign": (
        {"CHECKPOINT_EQUALS_CHAR": ":", "CHECKPOINT_NAME_LAST": "{epoch}_last", "CHECKPOINT_JOIN_CHAR": "+"},
        {"save_last": True, "save_top_k": 0},
    ),
    "another extension": ({"FILE_EXTENSION": ".model"}, {"save_last": True, "save_top_k": 0}),
}


@pytest.mark.parametrize("kind", LAST_NAMES)
def test_last_is_what_begins_with_last_whatever_the_names_are_made_of(
    space: Namespace, container: str, folder: Path, kind: str
) -> None:
    attributes, arguments = LAST_NAMES[kind]
    trained: dict[str, list[int]] = {}
    for root, make, plugin in ((f"{container}/run", space.checkpoint, "ours"), (folder / "local", space.stock, None)):
        begins = []
        for epochs, ckpt_path in ((1, None), (2, None), (3, "last")):
            checkpoint = make(root, **arguments)
            for name, value in attributes.items():
                setattr(checkpoint, name, value)
            model = space.model()
            try:
                trainer = space.trainer(folder, checkpoint, max_epochs=epochs, plugin=plugin)
                trainer.fit(model, ckpt_path=ckpt_path)
            except re.error:
                assert plugin is None
            begins.append(model.trained[0] if model.trained else -1)
        trained["ours" if plugin else "stock"] = begins
    # The second run has made a name of its own beside the first one's.
    assert trained["ours"] == [0, 0, 8]
    # Stock Lightning takes its word for a pattern, and so does not find all that it has saved.
    assert trained["stock"] == ([0, 0, 8] if "pattern" not in kind and "equals" not in kind else trained["stock"])


def test_last_of_an_empty_folder_starts_anew_and_says_so(space: Namespace, container: str, folder: Path) -> None:
    trainer = space.trainer(folder, space.checkpoint(f"{container}/run", save_last=True))
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        trainer.fit(space.model(), ckpt_path="last")
    assert names(f"{container}/run") == {"epoch=0-step=4.ckpt", "last.ckpt"}


def test_last_does_not_start_anew_if_the_service_refuses(space: Namespace, container: str, folder: Path) -> None:
    url = f"{container}/run"
    space.trainer(folder, space.checkpoint(url, save_last=True)).fit(space.model())
    before = etags(url)
    plugin = space.plugin(WRONG_KEY)
    trainer = space.trainer(folder, space.checkpoint(url, save_last=True), plugin=plugin)
    model = space.model()
    with pytest.raises(AccessDeniedError):
        trainer.fit(model, ckpt_path="last")
    assert not model.trained and etags(url) == before


def test_a_wrong_credential_is_noticed_before_training(space: Namespace, container: str, folder: Path) -> None:
    model = space.model()
    for plugin in (False, WRONG_KEY):
        io = space.plugin(plugin)
        with pytest.raises(AccessDeniedError):
            space.trainer(folder, space.checkpoint(f"{container}/run"), plugin=io).fit(model)
    assert not model.trained


# ---- A secret in the URL -------------------------------------------------------------------------------------------


def test_a_sas_opens_the_folder_and_is_nowhere_to_be_seen(
    space: Namespace,
    container: str,
    folder: Path,
    container_sas: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    [signature] = parse_qs(container_sas)["sig"]
    url = f"{container}/run"
    for epochs in (2, 3):
        checkpoint = space.checkpoint(f"{url}?{container_sas}", monitor="val_loss", save_last=True, verbose=True)
        trainer = space.trainer(folder, checkpoint, max_epochs=epochs, plugin=space.plugin(None))
        trainer.fit(model := space.model(SCORES), ckpt_path="last")
        assert trainer.strategy.checkpoint_io.credential == container_sas
        trainer.test(ckpt_path="best", verbose=False)
        checkpoint.to_yaml()
        assert len(model.trained) == (8 if epochs == 2 else 4)
        assert str(checkpoint.dirpath) == url
        assert repr(checkpoint.state_dict()).count(url) >= 5
        seen = [repr(checkpoint.state_dict()), repr(trainer.ckpt_path), caplog.text, *capfd.readouterr()]
        assert signature not in unquote("".join(seen))
    blobs = store_of(url)
    for path in etags(url):
        assert signature.encode() not in blobs.read(path, limit=1 << 30)[0]


def test_a_sas_in_a_path_is_in_no_line_of_the_log(
    space: Namespace,
    container: str,
    folder: Path,
    container_sas: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Lightning logs ckpt_path before it asks anybody for anything, and once more at the end."""
    caplog.set_level(logging.DEBUG)
    [signature] = parse_qs(container_sas)["sig"]
    url = f"{container}/run/last.ckpt"
    trainer = space.trainer(folder, enable_checkpointing=False)
    trainer.fit(space.model())
    trainer.save_checkpoint(f"{url}?{container_sas}")
    for ckpt_path in (f"{url}?{container_sas}", Path(f"{url}?{container_sas}")):
        trainer = space.trainer(folder, enable_checkpointing=False, max_epochs=2)
        trainer.fit(model := space.model(), ckpt_path=ckpt_path)
        assert model.trained == [4, 5, 6, 7]
        trainer.test(model, ckpt_path=ckpt_path, verbose=False)
    old = {**state_of(url), "pytorch-lightning_version": "1.9.0"}  # Lightning names the file that it has upgraded
    space.plugin().save_checkpoint(old, url)
    trainer.validate(model, ckpt_path=f"{url}?{container_sas}", verbose=False)
    assert f"Restoring states from the checkpoint path at {url}\n" in caplog.text
    assert f"Loaded model weights from the checkpoint at {url}\n" in caplog.text
    assert "upgrade_checkpoint" in caplog.text
    assert signature not in unquote("".join([caplog.text, *capfd.readouterr()]))


# ---- The state -----------------------------------------------------------------------------------------------------


def test_a_stock_callback_goes_on_from_our_state_and_we_from_its(
    space: Namespace, container: str, folder: Path
) -> None:
    url, local = f"{container}/run", folder / "local"
    arguments = {"monitor": "val_loss", "save_top_k": 2}
    ours, stock = space.checkpoint(url, **arguments), space.stock(local, **arguments)
    space.trainer(folder, ours, max_epochs=3).fit(space.model(SCORES))
    space.trainer(folder, stock, max_epochs=3).fit(space.model(SCORES))
    before = etags(url)
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        goes_on = space.stock(local, **arguments)
        space.trainer(folder, goes_on, max_epochs=4).fit(space.model(SCORES), ckpt_path=ours.best_model_path)
    assert etags(url) == before
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        local_before = local_names(local)
        goes_on = space.checkpoint(url, **arguments)
        trainer = space.trainer(folder, goes_on, max_epochs=4)
        trainer.fit(model := space.model(SCORES), ckpt_path=stock.best_model_path)
    assert len(model.trained) == 8 and local_names(local) == local_before
    # Where the folder is the same, the states are exchangeable word for word. Nobody restores the current score.
    twin, again = space.stock(**arguments), space.checkpoint(url, **arguments)
    twin.dirpath = url
    for callback in (twin, again):
        callback.load_state_dict(ours.state_dict())
        assert_alike(callback.state_dict(), {**ours.state_dict(), "current_score": None})


def test_the_same_folder_is_the_same_however_it_is_spelled(space: Namespace) -> None:
    spelled = "azblob://account/container/run%20of%20today"
    url = "https://account.blob.core.windows.net/container/run%20of%20today"
    ours = space.checkpoint(url, monitor="a")
    state = {
        **ours.state_dict(),
        "dirpath": f"{spelled}/?sv=1&sig=secret",
        "best_model_path": f"{spelled}/a.ckpt?sv=1&sig=secret",
        "kth_best_model_path": f"{spelled}/a.ckpt",
        "best_k_models": {f"{spelled}/a.ckpt": torch.tensor(1.0)},
    }
    ours.load_state_dict(state)
    assert ours.state_dict()["dirpath"] == url
    assert ours.best_model_path == ours.kth_best_model_path == f"{url}/a.ckpt"
    assert list(ours.best_k_models) == [f"{url}/a.ckpt"]
    assert space.checkpoint(Path(url)).dirpath == space.checkpoint(spelled).dirpath == url


def test_a_subclass_has_a_state_of_its_own(space: Namespace) -> None:
    class Mine(space.ours.AzureBlobModelCheckpoint):  # type: ignore[name-defined,misc]
        pass

    assert Mine("https://account.blob.core.windows.net/container").state_key.startswith(Mine.__qualname__)


def test_a_pickled_callback_is_as_good(space: Namespace, container: str, folder: Path, container_sas: str) -> None:
    checkpoint = pickle.loads(pickle.dumps(space.checkpoint(f"{container}/run?{container_sas}", save_last=True)))
    trainer = space.trainer(folder, checkpoint, plugin=space.plugin(None))
    trainer.fit(space.model())
    assert trainer.strategy.checkpoint_io.credential == container_sas
    assert names(f"{container}/run") == {"epoch=0-step=4.ckpt", "last.ckpt"}


def test_to_yaml_goes_to_the_folder_or_where_it_is_told(space: Namespace, container: str, folder: Path) -> None:
    url = f"{container}/run"
    checkpoint = space.checkpoint(url, monitor="val_loss", save_top_k=2)
    with pytest.raises(ConfigurationError, match="Fit first"):
        checkpoint.to_yaml()
    space.trainer(folder, checkpoint, max_epochs=2).fit(space.model(SCORES))
    checkpoint.to_yaml()
    checkpoint.to_yaml(f"{container}/other.yaml")
    checkpoint.to_yaml(folder / "local.yaml")
    store = store_of(url)
    wanted = f"{url}/epoch=0-step=4.ckpt: 5.0\n{url}/epoch=1-step=8.ckpt: 3.0\n"
    for text in (
        store.read("run/best_k_models.yaml", limit=1000)[0].decode(),
        store.read("other.yaml", limit=1000)[0].decode(),
        (folder / "local.yaml").read_text(),
    ):
        assert text == wanted
