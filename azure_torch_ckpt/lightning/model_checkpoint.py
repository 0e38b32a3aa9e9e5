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
from azure_torch_ckpt.objects.background_saves import is_being_saved, settle
from azure_torch_ckpt.objects.folder import is_empty, modified_at, newest_of
from azure_torch_ckpt.objects.found import FoundCheckpoint

from .checkpoint_io import AzureBlobCheckpointIO, blob_checkpoint_io, blob_location
from .stock import AsyncCheckpointIO, pytorch
from .strategy_check import check_strategy

__all__ = ["AzureBlobModelCheckpoint"]

_PLUGIN = AzureBlobCheckpointIO.__name__
# Attributes of Lightning's loggers (Wandb, MLflow, Lit; Neptune): whether they upload the files of checkpoints.
_LOGS_MODELS = ("_log_model", "_log_model_checkpoints")
_Answer = TypeVar("_Answer")


class AzureBlobModelCheckpoint(pytorch.callbacks.ModelCheckpoint):
    """`ModelCheckpoint` whose `dirpath` may be a URL of Blob Storage; it needs the plugin `AzureBlobCheckpointIO`.

        Trainer(plugins=[AzureBlobCheckpointIO()], callbacks=[AzureBlobModelCheckpoint(dirpath=url, save_last=True)])
        trainer.fit(model, ckpt_path="last")

    Arguments, hooks, names and the saved state are those of `ModelCheckpoint`; each goes on from the state of the
    other. With a local `dirpath` it is a `ModelCheckpoint`. In Blob Storage, with the plugin's credential,

    - ``ckpt_path="last"`` and ``"best"`` work, and raise if the service cannot be asked, rather than start anew;
    - a name that is taken by a checkpoint of another run gets the suffix ``-v1``, as on a local disk;
    - nothing is removed but what this run saved, or the run that it goes on from, in `dirpath`; the very checkpoint
      that was resumed from stays.

    All ranks follow what rank 0 was told by the service, its errors included.

    Args:
        dirpath: a local folder, or a URL as for `AzureBlobWriter`. A SAS in it becomes the credential of a plugin that
            has none; the attribute `dirpath`, the state, and the paths in it do not have it.
        filename, kwargs: as for `ModelCheckpoint`. ``save_last="link"`` is for local folders only.

    Raises:
        ConfigurationError: ``save_last="link"`` with a URL. From `setup`: the plugin is missing, or something else of
            the Trainer cannot work with URLs.
        LocationError: `dirpath` is a URL that names no place in Blob Storage, or one with ``snapshot=``. While saving:
            `filename` made a name that the service does not allow.
        CredentialError: from `setup`: `dirpath` has a SAS, and the plugin another credential.
        StoreError: the service cannot be asked, or refuses; from `setup` of ``fit`` on.
    """

    _dirpath: str | None = None
    _sas: str | None = None
    _plugin: AzureBlobCheckpointIO | None = None

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, **kwargs: Any) -> None:
        remote = dirpath is not None and blob_location(dirpath) is not None
        # A URL would make an fsspec filesystem for it.
        super().__init__(None if remote else dirpath, filename, **kwargs)
        self._resumed_from: set[BlobLocation] = set()
        if not remote:
            return
        self.dirpath = dirpath
        self._within(self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)  # refuses what nothing can lie below
        if self.save_last == "link":
            raise ConfigurationError(
                f"save_last='link' makes a symbolic link, and Blob Storage ({self.dirpath}) has none. Use "
                "save_last=True, which saves the last checkpoint once more"
            )

    # Where

    @property
    def dirpath(self) -> str | None:
        """The folder: a local path, or a URL without a SAS."""
        return self._dirpath

    @dirpath.setter
    def dirpath(self, dirpath: str | Path | None) -> None:
        location = None if dirpath is None else blob_location(dirpath)
        if location is not None:
            self._sas = location.sas
        self._dirpath = _plain(dirpath)

    @property
    def _folder(self) -> BlobLocation | None:
        return None if self._dirpath is None else blob_location(self._dirpath)

    def _within(self, name: str) -> str:
        assert self._folder is not None
        return str(self._folder.join(name))

    def format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        """As `ModelCheckpoint` has it; in a URL, the name is percent-encoded.

        Raises:
            LocationError: the service does not allow the name.
        """
        path = super().format_checkpoint_name(*args, **kwargs)
        if self._folder is None:
            return path
        return self._within(path.removeprefix(f"{self._dirpath}{os.sep}").replace(os.sep, "/"))

    # The Trainer

    @property
    def state_key(self) -> str:
        """That of `ModelCheckpoint`: to its checkpoints, this is one."""
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
        # Nobody loads a checkpoint that rank 0 has not saved yet.
        _told_by_rank_zero(trainer, plugin.wait)
        if stage != "fit":
            return
        empty = _told_by_rank_zero(trainer, lambda: is_empty(plugin.store(str(folder))[1], folder))
        if not empty and self.save_top_k != 0:
            pytorch.utilities.rank_zero_warn(f"Checkpoint directory {self._dirpath} exists and is not empty.")
        for logger in trainer.loggers:
            if any(getattr(logger, name, False) for name in _LOGS_MODELS):
                pytorch.utilities.rank_zero_warn(
                    f"{type(logger).__name__} uploads checkpoints only from a local disk. Those in {self._dirpath} "
                    "will not be in it; log their URL instead"
                )

    def on_load_checkpoint(
        self, trainer: pytorch.Trainer, pl_module: pytorch.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        resumed_from = blob_location(trainer.ckpt_path or "")
        # Not later: the LR finder leaves a ckpt_path of its own behind.
        if resumed_from is not None and trainer.state.fn == "fit":
            self._resumed_from.add(resumed_from.without_sas())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of this callback or of `ModelCheckpoint`, however that one's URLs are spelled."""
        paths = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")
        state = {**state_dict, **{name: _plain(state_dict[name]) for name in paths if name in state_dict}}
        if "best_k_models" in state:
            state["best_k_models"] = {_plain(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state)

    def on_exception(
        self, trainer: pytorch.Trainer, pl_module: pytorch.LightningModule, exception: BaseException
    ) -> None:
        """As `ModelCheckpoint` has it, but under a name that is free."""
        if self._folder is None:
            super().on_exception(trainer, pl_module, exception)
        elif getattr(self, "save_on_exception", False) and self._should_save_on_exception(trainer):  # new in 2.6
            candidates = self._monitor_candidates(trainer)
            path = self._get_metric_interpolated_filepath_name(candidates, trainer)
            self._save_checkpoint(trainer, path)
            self._save_last_checkpoint(trainer, candidates)
            pytorch.utilities.rank_zero_info(f"{type(exception).__name__}: saved a checkpoint at {path}")

    # What ModelCheckpoint asks of the filesystem, and of fsspec. The names with an underscore are its own; a test
    # tells if a version of Lightning has them no more.

    def file_exists(self, filepath: str | Path, trainer: pytorch.Trainer) -> bool:
        """Whether a checkpoint is there, be it only on its way; every rank is told the same.

        Raises:
            StoreError: the service could not be asked.
        """
        location = blob_location(filepath)
        if location is None:
            return super().file_exists(filepath, trainer)
        plugin = self._plugin_of(trainer)
        return _told_by_rank_zero(trainer, lambda: _is_taken(plugin, location))

    def _should_remove_checkpoint(self, trainer: pytorch.Trainer, previous: str, current: str) -> bool:
        location, folder = blob_location(previous), self._folder
        if location is None and folder is None:
            return super()._should_remove_checkpoint(trainer, previous, current)
        if location is None or folder is None or previous == current:
            return False
        # Without a join, for the folder may be a container.
        within = str(location).startswith(f"{folder}/")
        return within and location not in self._resumed_from

    def _find_last_checkpoints(self, trainer: pytorch.Trainer) -> set[str]:
        """What the Trainer chooses from for ``ckpt_path="last"``, which it does before any hook is called."""
        folder = self._folder
        if folder is None:
            return super()._find_last_checkpoints(trainer)
        plugin = self._plugin_of(trainer)
        plugin.wait_for(str(folder))
        found: set[str] = set()
        newest = newest_of(plugin.store(str(folder))[1], folder, self._is_last)
        if newest is not None:
            location, modified = newest
            found.add(FoundCheckpoint(str(location), modified))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by one of its parts
            if isinstance(callback, pytorch.callbacks.OnExceptionCheckpoint):
                found |= _of_exception(plugin, callback)
        return found

    def _is_last(self, name: str) -> bool:
        """Whether a checkpoint of this name is one for ``ckpt_path="last"``.

        Whatever begins with `CHECKPOINT_NAME_LAST` is, as `ModelCheckpoint` has it. Where that has fields, which
        `ModelCheckpoint` saves by and does not find again, so are the names that it makes.
        """
        if not name.endswith(self.FILE_EXTENSION):
            return False
        stem = name.removesuffix(self.FILE_EXTENSION)
        with contextlib.suppress(re.error):  # it is taken for a pattern
            if re.match(self.CHECKPOINT_NAME_LAST, stem):
                return True
        fields = re.split(r"\{[^}]*\}", self.CHECKPOINT_NAME_LAST)
        made = ".*".join(re.escape(text) for text in fields)
        return re.fullmatch(rf"{made}({re.escape(self.CHECKPOINT_JOIN_CHAR)}v\d+)?", stem) is not None

    def to_yaml(self, filepath: str | Path | None = None) -> None:
        """Save `best_k_models` as YAML: at a local path or a URL, by default as ``best_k_models.yaml`` in `dirpath`.

        Raises:
            ConfigurationError: it is to go to Blob Storage, and no Trainer has set this callback up yet.
        """
        if filepath is None and self._folder is not None:
            filepath = self._within("best_k_models.yaml")
        location = None if filepath is None else blob_location(filepath)
        if location is None:
            super().to_yaml(filepath)
            return
        if self._plugin is None:
            raise ConfigurationError(
                f"No Trainer has used this callback yet, so it has no way to {location}. Fit first"
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
        plugin = blob_checkpoint_io(given)
        assert plugin is not None
        if self._sas is not None:
            if plugin.credential is None:
                plugin.credential = self._sas
            if plugin.credential != self._sas:
                raise CredentialError(
                    f"dirpath has a SAS, and {_PLUGIN} has another credential. Give one of them: leave the SAS away, "
                    f"or pass {_PLUGIN}() without a credential"
                )
        return plugin


def _plain(path: str | Path | None) -> str | None:
    """A local path as it is; a URL in the one spelling that is compared and stored, without its SAS."""
    if path is None:
        return None
    with contextlib.suppress(LocationError):  # in the state of a stock callback: another service's URL
        location = blob_location(path)
        if location is not None:
            return str(location.without_sas())
    return os.fspath(path)


def _told_by_rank_zero(trainer: pytorch.Trainer, ask: Callable[[], _Answer]) -> _Answer:
    """What rank 0 finds out, on all ranks. If it fails, all of them raise: none is left waiting for the others."""
    answer: _Answer | AzureCheckpointError | None = None
    if trainer.is_global_zero:
        try:
            answer = ask()
        except AzureCheckpointError as error:
            answer = error
    told: Any = trainer.strategy.broadcast(answer)
    if isinstance(told, AzureCheckpointError):
        raise told
    result: _Answer = told
    return result


def _is_taken(plugin: AzureBlobCheckpointIO, location: BlobLocation) -> bool:
    """Whether the name is one of a checkpoint, be it that it is only on its way: of any callback of this process."""
    path = str(location)
    if is_being_saved(path):
        return True
    settle(path)  # a removal
    return modified_at(plugin.store(path)[1], location) is not None


def _refuse_remote_roots(trainer: pytorch.Trainer, dirpath: str | None) -> None:
    if blob_location(trainer.default_root_dir) is not None:
        raise ConfigurationError(
            f"Trainer(default_root_dir={_plain(trainer.default_root_dir)!r}) must be a local folder: Lightning keeps "
            "logs, temporary files and the checkpoints of a SLURM requeue there. Give the URL to the callback: "
            f"{AzureBlobModelCheckpoint.__name__}(dirpath=...)"
        )
    if dirpath is None and trainer.loggers:
        save_dir = trainer.loggers[0].save_dir
        with contextlib.suppress(LocationError):
            if save_dir is not None and blob_location(save_dir) is not None:
                raise ConfigurationError(
                    f"{type(trainer.loggers[0]).__name__}(save_dir={_plain(save_dir)!r}) is where checkpoints go that "
                    f"have no place of their own. Pass {AzureBlobModelCheckpoint.__name__}(dirpath=...)"
                )


def _refuse_joined_sas(trainer: pytorch.Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by one of its parts
        if isinstance(callback, pytorch.callbacks.OnExceptionCheckpoint):
            location = blob_location(callback.dirpath)
            if location is not None and location.sas is not None:
                raise ConfigurationError(
                    "OnExceptionCheckpoint puts the file's name behind the SAS of its dirpath. Leave the SAS away and "
                    f"pass it as {_PLUGIN}(credential=...)"
                )


def _of_exception(plugin: AzureBlobCheckpointIO, callback: pytorch.callbacks.OnExceptionCheckpoint) -> set[str]:
    """What an OnExceptionCheckpoint has left. The Trainer has its URL already, but cannot find out that it is there.

    The slash at the end makes another element of the Trainer's set of it; to everybody else it means the same.
    """
    location = blob_location(callback.ckpt_path)
    modified = None if location is None else modified_at(plugin.store(str(location))[1], location)
    return set() if modified is None else {FoundCheckpoint(f"{location}/", modified)}
