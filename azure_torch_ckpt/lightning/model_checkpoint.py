"""`AzureBlobModelCheckpoint`: Lightning's `ModelCheckpoint` for a folder in Blob Storage."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from azure_torch_ckpt.errors import AzureCheckpointError, ConfigurationError, CredentialError, LocationError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.objects.background_saves import is_being_saved, wait_for_pending
from azure_torch_ckpt.objects.resuming import ResumeCandidate, completion_time, is_empty, newest_checkpoint

from .checkpoint_io import AzureBlobCheckpointIO, blob_location, required_checkpoint_io
from .stock import AsyncCheckpointIO, pytorch, save_on_exception, uploads_checkpoints
from .strategy_check import check_strategy

__all__ = ["AzureBlobModelCheckpoint"]

_PLUGIN = AzureBlobCheckpointIO.__name__
_Answer = TypeVar("_Answer")


class AzureBlobModelCheckpoint(pytorch.callbacks.ModelCheckpoint):
    """`ModelCheckpoint` whose `dirpath` may be a URL of Blob Storage; it needs the plugin `AzureBlobCheckpointIO`.

        Trainer(plugins=[AzureBlobCheckpointIO()], callbacks=[AzureBlobModelCheckpoint(dirpath=url, save_last=True)])
        trainer.fit(model, ckpt_path="last")

    Arguments, hooks, names and the saved state are those of `ModelCheckpoint`; each continues from the state of the
    other. With a local `dirpath` it is a `ModelCheckpoint`. In Blob Storage, with the plugin's credential,

    - ``ckpt_path="last"`` and ``"best"`` work, and raise if the service cannot be asked, instead of starting from
      scratch;
    - a name that a checkpoint of another run has gets the suffix ``-v1``, as on a local disk;
    - only checkpoints in `dirpath` are removed, of this run or of the run that it continues. The checkpoint that was
      resumed from stays.

    Rank 0 asks the service, and all ranks get its answer or raise its error.

    Args:
        dirpath: a local folder, or a URL as for `AzureBlobWriter`. A SAS in it becomes the credential of a plugin
            without one. The attribute `dirpath`, the state and its paths do not have the SAS.
        filename, kwargs: as for `ModelCheckpoint`. ``save_last="link"`` is for local folders only.

    Raises:
        ConfigurationError: ``save_last="link"`` with a URL. From `setup`: the plugin is missing, or another part of the
            Trainer cannot work with URLs.
        LocationError: `dirpath` is a URL, but not one of Blob Storage, or it has ``snapshot=``. While saving:
            `filename` makes a name that the service does not allow.
        CredentialError: from `setup`: `dirpath` has a SAS, and the plugin another credential.
        StoreError: from `setup` of ``fit`` on: the service cannot be asked, or refuses.
    """

    _dirpath: str | None = None
    _sas: str | None = None
    _plugin: AzureBlobCheckpointIO | None = None

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, **kwargs: Any) -> None:
        remote = dirpath is not None and blob_location(dirpath) is not None
        # With a URL, ModelCheckpoint would make an fsspec filesystem.
        super().__init__(None if remote else dirpath, filename, **kwargs)
        self._resumed_from: set[BlobLocation] = set()
        if not remote:
            return
        self.dirpath = dirpath
        self._within(self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)  # refuses a URL that cannot be a folder
        if self.save_last == "link":
            raise ConfigurationError(
                f"save_last='link' makes a symbolic link, and Blob Storage ({self.dirpath}) has no links. Use "
                "save_last=True, which saves the last checkpoint once more"
            )

    @property
    def dirpath(self) -> str | None:
        """The folder: a local path, or a URL without a SAS."""
        return self._dirpath

    @dirpath.setter
    def dirpath(self, dirpath: str | Path | None) -> None:
        location = None if dirpath is None else blob_location(dirpath)
        if location is not None:
            self._sas = location.sas
        self._dirpath = _without_sas(dirpath)

    @property
    def _folder(self) -> BlobLocation | None:
        return None if self._dirpath is None else blob_location(self._dirpath)

    def _within(self, name: str) -> str:
        assert self._folder is not None
        return str(self._folder.join(name))

    def format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        """The path of a checkpoint, as `ModelCheckpoint` formats it; in a URL, the name is percent-encoded.

        Raises:
            LocationError: the service does not allow the name.
        """
        path = super().format_checkpoint_name(*args, **kwargs)
        if self._folder is None:
            return path
        return self._within(path.removeprefix(f"{self._dirpath}{os.sep}").replace(os.sep, "/"))

    @property
    def state_key(self) -> str:
        """The key of `ModelCheckpoint`, so that each loads the other's state. A subclass has a key of its own."""
        key = super().state_key
        if type(self) is not AzureBlobModelCheckpoint:
            return key
        return pytorch.callbacks.ModelCheckpoint.__qualname__ + key.removeprefix(type(self).__qualname__)

    def setup(self, trainer: pytorch.Trainer, pl_module: pytorch.LightningModule, stage: str) -> None:
        _refuse_remote_roots(trainer, self._dirpath)
        folder = self._folder
        if folder is None:
            super().setup(trainer, pl_module, stage)
            return
        plugin = self._plugin = self._plugin_of(trainer)
        # No rank may load a checkpoint that rank 0 has not saved yet.
        _answer_of_rank_zero(trainer, plugin.wait)
        if stage != "fit":
            return
        empty = _answer_of_rank_zero(trainer, lambda: is_empty(plugin.store(str(folder))[1], folder))
        if not empty and self.save_top_k != 0:
            pytorch.utilities.rank_zero_warn(f"Checkpoint directory {self._dirpath} exists and is not empty.")
        for logger in trainer.loggers:
            if uploads_checkpoints(logger):
                pytorch.utilities.rank_zero_warn(
                    f"{type(logger).__name__} uploads checkpoints only from a local disk, and not those in "
                    f"{self._dirpath}. Log their URL instead"
                )

    def on_load_checkpoint(
        self, trainer: pytorch.Trainer, pl_module: pytorch.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        resumed_from = blob_location(trainer.ckpt_path or "")
        # Now, because the learning-rate finder sets ckpt_path to a file of its own later.
        if resumed_from is not None and trainer.state.fn == pytorch.trainer.states.TrainerFn.FITTING:
            self._resumed_from.add(resumed_from.without_sas())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this callback or of `ModelCheckpoint`, in whichever spelling its URLs are."""
        paths = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")
        state = {**state_dict, **{name: _without_sas(state_dict[name]) for name in paths if name in state_dict}}
        if "best_k_models" in state:
            state["best_k_models"] = {_without_sas(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state)

    def on_exception(
        self, trainer: pytorch.Trainer, pl_module: pytorch.LightningModule, exception: BaseException
    ) -> None:
        """Save a checkpoint as `ModelCheckpoint` does with ``save_on_exception``, but under a name that is free."""
        if self._folder is None:
            super().on_exception(trainer, pl_module, exception)
        elif (path := save_on_exception(self, trainer)) is not None:
            pytorch.utilities.rank_zero_info(f"{type(exception).__name__}: saved a checkpoint at {path}")

    # ModelCheckpoint answers the next three with fsspec. `stock.OVERRIDES` says why the private ones are overridden.

    def file_exists(self, filepath: str | Path, trainer: pytorch.Trainer) -> bool:
        """Whether there is a checkpoint, or a save to its path is pending. All ranks get the same answer.

        Raises:
            StoreError: the service could not be asked.
        """
        location = blob_location(filepath)
        if location is None:
            return super().file_exists(filepath, trainer)
        plugin = self._plugin_of(trainer)
        return _answer_of_rank_zero(trainer, lambda: _is_taken(plugin, location))

    def _should_remove_checkpoint(self, trainer: pytorch.Trainer, previous: str, current: str) -> bool:
        location, folder = blob_location(previous), self._folder
        if location is None and folder is None:
            return super()._should_remove_checkpoint(trainer, previous, current)
        if location is None or folder is None or previous == current:
            return False
        # The folder may be a container, so its path may be empty.
        return str(location).startswith(f"{folder}/") and location not in self._resumed_from

    def _find_last_checkpoints(self, trainer: pytorch.Trainer) -> set[str]:
        """The candidates among which the Trainer chooses for ``ckpt_path="last"``."""
        folder = self._folder
        if folder is None:
            return super()._find_last_checkpoints(trainer)
        plugin = self._plugin_of(trainer)
        plugin.wait_for(str(folder))
        candidates: set[str] = set()
        newest = newest_checkpoint(plugin.store(str(folder))[1], folder, self._is_last)
        if newest is not None:
            location, modified = newest
            candidates.add(ResumeCandidate(str(location), modified))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by one of its parts
            if isinstance(callback, pytorch.callbacks.OnExceptionCheckpoint):
                candidates |= _exception_candidates(plugin, callback)
        return candidates

    def _is_last(self, name: str) -> bool:
        """Whether a checkpoint of this name is a candidate for ``ckpt_path="last"``.

        Every name that begins with `CHECKPOINT_NAME_LAST` is, as in `ModelCheckpoint`. If that has fields, so are the
        names that it formats to, which `ModelCheckpoint` saves and does not find again.
        """
        if not name.endswith(self.FILE_EXTENSION):
            return False
        stem = name.removesuffix(self.FILE_EXTENSION)
        with contextlib.suppress(re.error):  # ModelCheckpoint uses it as a pattern
            if re.match(self.CHECKPOINT_NAME_LAST, stem):
                return True
        fields = re.split(r"\{[^}]*\}", self.CHECKPOINT_NAME_LAST)
        formatted = ".*".join(re.escape(text) for text in fields)
        return re.fullmatch(rf"{formatted}({re.escape(self.CHECKPOINT_JOIN_CHAR)}v\d+)?", stem) is not None

    def to_yaml(self, filepath: str | Path | None = None) -> None:
        """Save `best_k_models` as YAML: at a local path or a URL, by default as ``best_k_models.yaml`` in `dirpath`.

        Raises:
            ConfigurationError: the path is in Blob Storage, and no Trainer has set this callback up yet.
        """
        if filepath is None and self._folder is not None:
            filepath = self._within("best_k_models.yaml")
        location = None if filepath is None else blob_location(filepath)
        if location is None:
            super().to_yaml(filepath)
            return
        if self._plugin is None:
            raise ConfigurationError(
                f"The Trainer has the credential for {location}, and none has set this callback up yet. Fit first"
            )
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "best_k_models.yaml"
            super().to_yaml(local)
            self._plugin.store(str(location))[1].put(location.path, local.read_bytes())

    def _plugin_of(self, trainer: pytorch.Trainer) -> AzureBlobCheckpointIO:
        _refuse_joined_sas(trainer)
        check_strategy(trainer.strategy, self._dirpath)
        given = trainer.strategy.checkpoint_io
        if isinstance(given, AsyncCheckpointIO):
            raise ConfigurationError(
                "AsyncCheckpointIO removes old checkpoints before the new one is stored. Pass "
                f"Trainer(plugins=[{_PLUGIN}(async_save=True)]) instead, which keeps the order"
            )
        plugin = required_checkpoint_io(given, self._dirpath)
        if self._sas is not None:
            if plugin.credential is None:
                plugin.credential = self._sas
            if plugin.credential != self._sas:
                raise CredentialError(
                    f"dirpath has a SAS, and {_PLUGIN} has another credential. Give one of them: omit the SAS, or pass "
                    f"{_PLUGIN}() without a credential"
                )
        return plugin


def _without_sas(path: str | Path | None) -> str | None:
    """A URL in normal form and without its SAS, as it is compared and stored; a local path unchanged."""
    if path is None:
        return None
    with contextlib.suppress(LocationError):  # a stock callback's state may have URLs of other services
        location = blob_location(path)
        if location is not None:
            return str(location.without_sas())
    return os.fspath(path)


def _answer_of_rank_zero(trainer: pytorch.Trainer, ask: Callable[[], _Answer]) -> _Answer:
    """Call `ask` on rank 0, and return its answer, or raise its error, on all ranks."""
    answer: _Answer | AzureCheckpointError | None = None
    if trainer.is_global_zero:
        try:
            answer = ask()
        except AzureCheckpointError as error:
            answer = error
    received: Any = trainer.strategy.broadcast(answer)
    if isinstance(received, AzureCheckpointError):
        raise received
    result: _Answer = received
    return result


def _is_taken(plugin: AzureBlobCheckpointIO, location: BlobLocation) -> bool:
    """Whether there is a checkpoint at `location`, or any callback of this process is saving one there."""
    path = str(location)
    if is_being_saved(path):
        return True
    wait_for_pending(path)  # a removal
    return completion_time(plugin.store(path)[1], location) is not None


def _refuse_remote_roots(trainer: pytorch.Trainer, dirpath: str | None) -> None:
    if blob_location(trainer.default_root_dir) is not None:
        raise ConfigurationError(
            f"Trainer(default_root_dir={_without_sas(trainer.default_root_dir)!r}) must be a local folder: Lightning "
            "keeps logs, temporary files and the checkpoints of a SLURM requeue there. Pass the URL to the callback: "
            f"{AzureBlobModelCheckpoint.__name__}(dirpath=...)"
        )
    if dirpath is None and trainer.loggers:
        save_dir = trainer.loggers[0].save_dir
        with contextlib.suppress(LocationError):
            if save_dir is not None and blob_location(save_dir) is not None:
                raise ConfigurationError(
                    f"{type(trainer.loggers[0]).__name__}(save_dir={_without_sas(save_dir)!r}) is a URL, and "
                    f"checkpoints are saved there by default. Pass {AzureBlobModelCheckpoint.__name__}(dirpath=...)"
                )


def _refuse_joined_sas(trainer: pytorch.Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by one of its parts
        if isinstance(callback, pytorch.callbacks.OnExceptionCheckpoint):
            location = blob_location(callback.dirpath)
            if location is not None and location.sas is not None:
                raise ConfigurationError(
                    "OnExceptionCheckpoint appends the file's name to the SAS of its dirpath. Omit the SAS there, and "
                    f"pass it as {_PLUGIN}(credential=...)"
                )


def _exception_candidates(plugin: AzureBlobCheckpointIO, callback: pytorch.callbacks.OnExceptionCheckpoint) -> set[str]:
    """The checkpoint that an OnExceptionCheckpoint has left, if any.

    The Trainer has its URL among its candidates already, but cannot find out that it exists. The slash at the end makes
    this candidate another element of the Trainer's set; otherwise it means the same.
    """
    location = blob_location(callback.ckpt_path)
    modified = None if location is None else completion_time(plugin.store(str(location))[1], location)
    return set() if modified is None else {ResumeCandidate(f"{location}/", modified)}
