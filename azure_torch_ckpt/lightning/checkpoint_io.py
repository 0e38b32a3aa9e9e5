"""`AzureBlobCheckpointIO`: the plugin that saves and loads the checkpoints of a Trainer or of Fabric."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential, PickledCredential
from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.removal import remove_checkpoint
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.errors import AccessDeniedError, CheckpointNotFoundError, ConfigurationError, StoreError
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.objects.background_saves import BackgroundSaves, wait_for_pending
from azure_torch_ckpt.objects.codec import MapLocation, pack
from azure_torch_ckpt.objects.resuming import torch_file_time
from azure_torch_ckpt.objects.single_process import load_object, save_state_dict
from azure_torch_ckpt.options import TransferOptions

from .stock import (
    CheckpointIO,
    TorchCheckpointIO,
    WrappingCheckpointIO,
    default_weights_only,
    pytorch,
    weights_only_argument,
)

__all__ = ["AzureBlobCheckpointIO", "blob_location", "required_checkpoint_io"]

# Statuses of a deletion if the blob has a lease, a snapshot, a legal hold or an immutability policy.
_DELETION_FORBIDDEN = (409, 412)

_log = logging.getLogger(__name__)

_BLOB_URL = re.compile(r"(https?|azblob):/", re.IGNORECASE)
# The query of a URL that has a signature.
_SIGNED_QUERY = re.compile(r"\?[^\s?\"'`]*\bsig=[^\s\"'`]*", re.IGNORECASE)


def _remove_signature(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if _SIGNED_QUERY.search(message) is not None:
        record.msg, record.args = _SIGNED_QUERY.sub("", message), ()
    return True


def _keep_signatures_out_of_logs() -> None:
    """From now on, remove queries with a signature from the URLs in Lightning's log.

    Lightning logs the ``ckpt_path`` that it was given ("Restoring states from the checkpoint path at ...") before it
    calls a plugin, a strategy or a callback. So the signature can only be removed here.
    """
    roots = {module.partition(".")[0] for module in (pytorch.__name__, CheckpointIO.__module__)}
    for name, logger in list(logging.root.manager.loggerDict.items()):
        # A logger's filters do not apply to the loggers below it.
        if name.partition(".")[0] in roots and isinstance(logger, logging.Logger):
            logger.addFilter(_remove_signature)  # a second time changes nothing


_keep_signatures_out_of_logs()


def blob_location(path: str | Path) -> BlobLocation | None:
    """The location in Blob Storage that `path` names; None for any other kind of path.

    ``Path("https://...")``, which Fabric and the strategies make of a URL, has lost a slash; it is accepted.

    Raises:
        LocationError: `path` is a URL, but not one of Blob Storage.
    """
    text = os.fspath(path)
    return BlobLocation.parse(text) if _BLOB_URL.match(text) else None


def required_checkpoint_io(plugin: CheckpointIO | None, path: str | Path | None) -> AzureBlobCheckpointIO:
    """Our plugin: `plugin` itself, or the one in Lightning's wrappers.

    Args:
        path: of the checkpoints, for the error.

    Raises:
        ConfigurationError: it is another plugin.
    """
    while isinstance(plugin, WrappingCheckpointIO):
        plugin = plugin.checkpoint_io
    if not isinstance(plugin, AzureBlobCheckpointIO):
        raise ConfigurationError(
            f"{type(plugin).__name__} cannot save checkpoints to {blob_location(path or '') or 'Blob Storage'}. Give "
            "the Trainer or Fabric plugins=[AzureBlobCheckpointIO(...)] of azure_torch_ckpt.lightning"
        )
    return plugin


class AzureBlobCheckpointIO(CheckpointIO):
    """Save and load a Trainer's or Fabric's checkpoints in Blob Storage.

        Trainer(plugins=[AzureBlobCheckpointIO()], callbacks=[AzureBlobModelCheckpoint(dirpath=url)])

    A checkpoint at ``<url>/epoch=1.ckpt`` is one of `torch.distributed.checkpoint`: ``.metadata`` and data blobs below
    that prefix. Loading returns what ``torch.save`` and ``torch.load`` would return, object for object. A save over an
    existing checkpoint replaces all of it at once, or nothing.

    Lightning's own plugin handles all other paths: some of Lightning's tools keep temporary checkpoints on the local
    disk.

    Args:
        credential: as for `AzureBlobWriter`.
        async_save: return from a save when the checkpoint has been copied to host memory (at most two copies: a third
            save waits), and upload it in a thread while training continues. Saves and removals keep their order. A
            failed save leaves the old checkpoint in place, and later removals are skipped. The next call, or the end of
            ``fit``, raises its error. Fabric does not tear its plugins down: call `teardown` (or `wait`) at the end, or
            a failure is only logged.
        options: limits of connections, memory and time.
        ca_file: a PEM file with certificates to trust besides the platform's.

    Attributes:
        credential, options, ca_file: as given.

    A pickle has the credential, and no pending saves.
    """

    def __init__(
        self,
        credential: Credential = None,
        *,
        async_save: bool = False,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
    ) -> None:
        super().__init__()
        _keep_signatures_out_of_logs()
        self.credential = credential
        self.options = options
        self.ca_file = ca_file
        self._local = TorchCheckpointIO()
        self._async_save = async_save
        self._saves: BackgroundSaves | None = None
        self._kept_writer: tuple[int, AzureBlobWriter] | None = None
        self._stores: dict[BlobLocation, BlobStore] = {}

    def __getstate__(self) -> dict[str, Any]:
        credential = PickledCredential.of(self.credential)
        return {**self.__dict__, "credential": credential, "_saves": None, "_kept_writer": None, "_stores": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, credential=state["credential"].restore())

    # Lightning calls these methods.

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save `checkpoint` at `path`. One process calls it.

        Raises:
            TypeError: there are `storage_options`, which Lightning's own plugin does not accept either.
            AzureCheckpointError: the save failed; the checkpoint at the URL has not changed. With ``async_save``, an
                earlier save failed.
        """
        location = blob_location(path)
        if location is None:
            self._local.save_checkpoint(checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise TypeError(
                f"{type(self).__name__} takes no storage_options. Give credential, options and ca_file to the plugin, "
                "for all of its saves"
            )
        wait_for_pending(str(location), besides=self._saves)
        if not self._async_save:
            save_state_dict(pack(checkpoint).state_dict(), self._writer_at(path))
            return
        self._background().save(
            pack(checkpoint), str(location), lambda state_dict: save_state_dict(state_dict, self._writer_at(path))
        )

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: MapLocation = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load the checkpoint at `path`, or the blob there that ``torch.save`` wrote, as Lightning's own plugin does.

        It first waits for all pending saves of this plugin, and for pending saves of other plugins of this process to
        `path`.

        Args:
            map_location: as for ``torch.load``. The default is that of Lightning's own plugin.
            weights_only: as for ``torch.load``. None means the default of the installed Lightning: True from 2.6 on,
                False before.

        Raises:
            CheckpointNotFoundError: there is no checkpoint at `path`.
            UnsupportedCheckpointError: ``weights_only`` does not allow the objects in the checkpoint.
            AzureCheckpointError: the checkpoint cannot be read; with ``async_save``, an earlier save failed.
        """
        location = blob_location(path)
        weights_only = default_weights_only(weights_only)
        if location is None:
            arguments: dict[str, Any] = {"map_location": map_location, **weights_only_argument(weights_only)}
            return self._local.load_checkpoint(path, **arguments)
        self.wait_for(path)
        loaded: dict[str, Any]
        try:
            loaded = load_object(self.reader(path), map_location, weights_only)
        except CheckpointNotFoundError:
            if not self._is_torch_file(path):
                raise
            with BlobIO(path, "rb", **self._connection) as stream:
                loaded = torch.load(stream, map_location=map_location, weights_only=weights_only)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint at `path`, if there is one.

        If the service does not allow it (a SAS without the right to delete, a lease, an immutability policy), the
        checkpoint stays, and a warning is logged: training is worth more than the space.

        Raises:
            AzureCheckpointError: the removal failed; with ``async_save``, an earlier save failed.
        """
        location = blob_location(path)
        if location is None:
            self._local.remove_checkpoint(path)
            return
        wait_for_pending(str(location), besides=self._saves)
        if self._async_save:
            self._background().remove(str(location), lambda: self._remove(path))
        else:
            self._remove(path)

    def teardown(self) -> None:
        """Wait for all pending saves and removals, and free the memory of the copies. The plugin can be used again.

        Raises:
            CheckpointError: a save of ``async_save`` failed.
        """
        try:
            self.wait()
        finally:
            self._saves = None

    # The callback, the strategies and users call these methods.

    def wait(self) -> None:
        """Wait until all saves and removals of ``async_save`` are done.

        Raises:
            CheckpointError: one of them failed, and no call has raised that yet.
        """
        if self._saves is not None:
            self._saves.wait()

    def wait_for(self, path: str | Path) -> None:
        """Wait for all pending saves of this plugin, and for those of other plugins to `path`.

        Raises:
            CheckpointError: one of them failed, and no call has raised that yet.
        """
        self.wait()
        wait_for_pending(str(BlobLocation.parse(path)))

    def store(self, path: str | Path) -> tuple[BlobLocation, BlobStore]:
        """The location of a URL, and the store of its container, which is the same in all calls."""
        location = BlobLocation.parse(path)
        root = location.container_root()
        if root not in self._stores:
            self._stores[root] = BlobStore(root, Access(**self._connection))
        return location, self._stores[root]

    def reader(self, path: str | Path) -> AzureBlobReader:
        """A reader of the checkpoint at `path`, with the plugin's credential."""
        return AzureBlobReader(path, **self._connection)

    def writer(self, path: str | Path) -> AzureBlobWriter:
        """A writer of a checkpoint at `path`, with the plugin's credential."""
        return AzureBlobWriter(path, **self._connection)

    @property
    def _connection(self) -> dict[str, Any]:
        return {"credential": self.credential, "options": self.options, "ca_file": self.ca_file}

    def _background(self) -> BackgroundSaves:
        if self._saves is None:
            self._saves = BackgroundSaves()
        return self._saves

    def _writer_at(self, path: str | Path) -> AzureBlobWriter:
        """One writer for all saves: it keeps its connections, and knows the blobs of the save that it replaces."""
        if self._kept_writer is None or self._kept_writer[0] != os.getpid():
            # After a fork, not the parent's writer: it may be in the middle of a save, and would treat that as failed.
            self._kept_writer = (os.getpid(), self.writer(path))
        _, writer = self._kept_writer
        writer.reset(path)
        return writer

    def _remove(self, path: str | Path) -> None:
        try:
            try:
                remove_checkpoint(path, **self._connection)
            except CheckpointNotFoundError:
                if self._is_torch_file(path):
                    location, store = self.store(path)
                    store.delete(location.path)
        except StoreError as error:
            if not isinstance(error, AccessDeniedError) and error.status not in _DELETION_FORBIDDEN:
                raise
            _log.warning(
                "%s stays, because the service does not allow removing it: %s", BlobLocation.parse(path), error
            )

    def _is_torch_file(self, path: str | Path) -> bool:
        location, store = self.store(path)
        return torch_file_time(store, location) is not None
