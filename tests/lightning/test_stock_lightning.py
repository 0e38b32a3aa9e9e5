"""What docs/lightning.md says of stock Lightning on blob URLs: each row of its table, reproduced.

The versions are those of constraints.txt. When a test here fails, Lightning has changed: change the table. The left
column of the table is the name of the test.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponseError
from azure.storage.blob import ContainerClient

from azure_torch_ckpt import AzureCheckpointError
from azure_torch_ckpt.emulator import Azurite
from tests.support.trainers import Namespace, etags

space = Namespace("lightning")
Fit = Callable[..., tuple[list[int], Any]]


@pytest.fixture(params=["https, our plugin", "az, adlfs"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def public(azurite: Azurite, container: str) -> str:
    """A container with public read access, the only kind that Lightning can read with ``https://``."""
    name = container.rpartition("/")[2]
    with ContainerClient.from_connection_string(azurite.connection_string, name) as client:
        client.set_container_access_policy(signed_identifiers={}, public_access="container")
    return container


@pytest.fixture
def root(kind: str, public: str, azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite.connection_string)
    return public if kind.startswith("https") else f"az://{public.rpartition('/')[2]}"


@pytest.fixture
def fit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Fit with the stock callback; return the steps that were trained, and the callback."""
    monkeypatch.chdir(tmp_path)
    plugin = "ours" if kind.startswith("https") else None

    def run(dirpath: str, epochs: int = 2, ckpt_path: str | None = None, **arguments: Any) -> tuple[list[int], Any]:
        checkpoint = space.stock(dirpath, **arguments)
        model = space.model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            space.trainer(tmp_path, checkpoint, max_epochs=epochs, plugin=plugin).fit(model, ckpt_path=ckpt_path)
        return model.trained, checkpoint

    return run


def checkpoints(container: str) -> set[str]:
    """Names of checkpoints, be they blobs or folders, below a container."""
    return {path[: path.index(".ckpt") + 5] for path in etags(container)}


def test_fit_with_https_and_no_plugin(public: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        space.trainer(tmp_path, space.stock(f"{public}/run"), plugin=None).fit(space.model())


def test_fit_on_a_private_container(container: str, tmp_path: Path) -> None:
    with pytest.raises(ClientResponseError, match="403"):
        space.trainer(tmp_path, space.stock(f"{container}/run")).fit(space.model())


def test_ckpt_path_last_starts_from_scratch(fit: Fit, root: str) -> None:
    fit(f"{root}/run", save_last=True)
    trained, _ = fit(f"{root}/run", 3, "last", save_last=True)
    assert trained == list(range(12))


def test_a_second_run_in_the_same_folder(fit: Fit, root: str, public: str, kind: str) -> None:
    fit(f"{root}/run", save_last=True)
    before = etags(public)
    fit(f"{root}/run", save_last=True)
    replaced = not before.items() <= etags(public).items()
    assert replaced == kind.startswith("https")


def test_a_run_that_resumes_from_another_folder_removes_the_best_of_that_one(fit: Fit, root: str, public: str) -> None:
    fit(f"{root}/first", save_last=True)
    assert "first/epoch=1-step=8.ckpt" in checkpoints(public)
    fit(f"{root}/second", 3, f"{root}/first/last.ckpt")
    assert "first/epoch=1-step=8.ckpt" not in checkpoints(public)


def test_a_run_removes_the_checkpoint_that_it_resumed_from(fit: Fit, root: str, public: str) -> None:
    _, checkpoint = fit(f"{root}/run")
    fit(f"{root}/run", 3, checkpoint.best_model_path)
    assert checkpoints(public) == {"run/epoch=2-step=12.ckpt"}


def test_save_last_link(fit: Fit, root: str) -> None:
    with pytest.raises(ValueError, match="only supported for local file paths"):
        fit(f"{root}/run", save_last="link")


def test_a_sas_in_dirpath(fit: Fit, root: str, public: str, kind: str) -> None:
    sas = "sv=2025-01-05&sig=c2VjcmV0"
    if kind.startswith("https"):
        with pytest.raises(AzureCheckpointError, match="403"):  # the name becomes a part of the SAS
            fit(f"{root}/run?{sas}")
        return
    _, checkpoint = fit(f"{root}/run?{sas}")
    assert sas in checkpoint.best_model_path
    assert all(sas in path for path in checkpoints(public))


def test_on_exception_checkpoint_resumes(root: str, kind: str, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        if model.trainer.global_step == 6:
            raise ValueError("at step 6")

    plugin = "ours" if kind.startswith("https") else None
    trained = []
    for attributes in [{"on_train_batch_start": fail}, dict[str, Any]()]:
        callback = space.pl.callbacks.OnExceptionCheckpoint(f"{root}/run")
        model = space.model(**attributes)
        trainer = space.trainer(tmp_path, callback, plugin=plugin, max_epochs=2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.fit(model)
        except ValueError:
            assert attributes
        trained.append(model.trained)
    resumed = list(range(8)) if kind.startswith("https") else [6, 7]
    assert trained == [list(range(6)), resumed]


def test_async_checkpoint_io_removes_before_it_has_saved(container: str) -> None:
    class Slow(space.ours.AzureBlobCheckpointIO):  # type: ignore[name-defined,misc]
        may_save = threading.Event()

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.may_save.wait()
            super().save_checkpoint(*args, **kwargs)

    old, new = f"{container}/old.ckpt", f"{container}/new.ckpt"
    space.plugin().save_checkpoint({"a": 1}, old)
    wrapped = space.pl.plugins.io.AsyncCheckpointIO(Slow())
    wrapped.save_checkpoint({"a": 2}, new)
    wrapped.remove_checkpoint(old)
    assert not checkpoints(container)
    Slow.may_save.set()
    wrapped.teardown()
    assert checkpoints(container) == {"new.ckpt"}
