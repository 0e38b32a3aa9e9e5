"""What cannot work is refused before training starts, with a message that says what to do."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from azure_torch_ckpt import AccessDeniedError, CredentialError, LocationError
from azure_torch_ckpt.errors import ConfigurationError
from tests.support.trainers import Namespace, names

URL = "https://account.blob.core.windows.net/container/run"
SAS = "sv=2025-01-05&sr=c&sp=rwdl&sig=c2VjcmV0"


def refusal(trainer: Any, space: Namespace, error: type[Exception] = ConfigurationError, **arguments: Any) -> str:
    """The message with which a fit ends before its first step."""
    model = space.model()
    with pytest.raises(error) as raised:
        trainer.fit(model, **arguments)
    assert not model.trained and "sig=" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("ckpt_path", [None, "last"])
def test_a_trainer_without_the_plugin(space: Namespace, tmp_path: Path, ckpt_path: str | None) -> None:
    trainer = space.trainer(tmp_path, space.checkpoint(f"{URL}?{SAS}"), plugin=None)
    message = refusal(trainer, space, ckpt_path=ckpt_path)
    assert URL in message and "plugins=[AzureBlobCheckpointIO(" in message


def test_the_plugin_within_lightnings_asynchronous_one(space: Namespace, tmp_path: Path) -> None:
    plugin = space.pl.plugins.io.AsyncCheckpointIO(space.plugin())
    message = refusal(space.trainer(tmp_path, space.checkpoint(URL), plugin=plugin), space)
    assert "AzureBlobCheckpointIO(async_save=True)" in message


def test_a_sas_beside_another_credential(space: Namespace, tmp_path: Path) -> None:
    plugin = space.plugin("sv=1&sig=b3RoZXI=")
    message = refusal(space.trainer(tmp_path, space.checkpoint(f"{URL}?{SAS}"), plugin=plugin), space, CredentialError)
    assert "Give one of them" in message


def test_links(space: Namespace) -> None:
    with pytest.raises(ConfigurationError, match="save_last=True"):
        space.checkpoint(URL, save_last="link")


@pytest.mark.parametrize(
    "url", [f"{URL}?snapshot=2026-01-31T12:00:00.1234567Z", "https://account.blob.core.windows.net"]
)
def test_urls_that_cannot_be_a_folder(space: Namespace, url: str) -> None:
    with pytest.raises(LocationError):
        space.checkpoint(url)


@pytest.mark.parametrize("filename", ["/{epoch}", "a//{epoch}", "../{epoch}"])
def test_names_that_the_service_does_not_allow(space: Namespace, container: str, tmp_path: Path, filename: str) -> None:
    trainer = space.trainer(tmp_path, space.checkpoint(f"{container}/run", filename=filename), max_epochs=1)
    with pytest.raises(LocationError):
        trainer.fit(space.model())
    assert not names(container)


@pytest.mark.parametrize("dirpath", [URL, None])
def test_a_url_as_default_root_dir(
    space: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dirpath: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = space.trainer(tmp_path, space.checkpoint(dirpath), default_root_dir=f"{URL}?{SAS}")
    assert "must be a local folder" in refusal(trainer, space)
    assert not list(tmp_path.iterdir())


def test_a_url_as_the_save_dir_of_the_logger_that_names_the_folder(space: Namespace, tmp_path: Path) -> None:
    class Remote(space.pl.loggers.logger.DummyLogger):  # type: ignore[name-defined,misc]
        save_dir = f"{URL}?{SAS}"

    trainer = space.trainer(tmp_path, space.checkpoint(), logger=[Remote()])
    assert "AzureBlobModelCheckpoint(dirpath=...)" in refusal(trainer, space)


def test_a_sas_in_the_folder_of_an_on_exception_checkpoint(space: Namespace, container: str, tmp_path: Path) -> None:
    other = space.pl.callbacks.OnExceptionCheckpoint(f"{container}/run?{SAS}")
    model = space.model()
    # Lightning lets the other callback try to save even then; what it gets is raised.
    with pytest.raises(AccessDeniedError) as raised:
        space.trainer(tmp_path, other, space.checkpoint(f"{container}/run")).fit(model)
    refusal: BaseException = raised.value
    while not isinstance(refusal, ConfigurationError):
        assert refusal.__context__ is not None
        refusal = refusal.__context__
    assert "AzureBlobCheckpointIO(credential=...)" in str(refusal) and not model.trained


def test_arguments_are_those_of_model_checkpoint(space: Namespace, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        space.checkpoint(URL, save_top=3)
    with pytest.raises(space.pl.utilities.exceptions.MisconfigurationException):
        space.checkpoint(URL, every_n_epochs=1, train_time_interval=datetime.timedelta(1))
    local = space.checkpoint(tmp_path / "here", "{epoch}", monitor="val_loss", save_last="link")
    assert local.dirpath == str(tmp_path / "here") and local.filename == "{epoch}"


def test_a_local_folder_is_handled_as_by_model_checkpoint(
    space: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for dirpath in ("here", None):
        for epochs in (1, 2):
            checkpoint = space.checkpoint(dirpath, save_last="link")
            trainer = space.trainer(tmp_path, checkpoint, max_epochs=epochs, plugin=None)
            trainer.fit(model := space.model(), ckpt_path="last")
            assert len(model.trained) == 4
            assert (
                Path(str(checkpoint.dirpath)) / "last.ckpt"
            ).resolve().name == f"epoch={epochs - 1}-step={4 * epochs}.ckpt"
        checkpoint.to_yaml()
    assert {path.name for path in tmp_path.iterdir()} == {"here", "checkpoints"}
