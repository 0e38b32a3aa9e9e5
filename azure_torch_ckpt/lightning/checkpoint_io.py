"""`AzureBlobCheckpointIO`: the plugin that saves and loads the checkpoints of a Trainer or of Fabric."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Credential, PickledCredential
from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.removal import remove_checkpoint
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError, CheckpointNotFoundError, StoreError
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.objects.background_saves import BackgroundSaves, settle
from azure_torch_ckpt.objects.codec import MapLocation, pack
from azure_torch_ckpt.objects.single_process import load_object, save_state_dict
from azure_torch_ckpt.options import TransferOptions

from .signatures import keep_signatures_out_of_logs
from .stock import LOAD_TAKES_WEIGHTS_ONLY, CheckpointIO, TorchCheckpointIO, WrappingCheckpointIO

__all__ = ["AzureBlobCheckpointIO", "blob_checkpoint_io", "blob_location"]

# Statuses of a blob that has a lease, a snapshot, a legal hold or an immutability policy.
_NOT_TO_BE_DELETED = (409, 412)

_log = logging.getLogger(__name__)

_OURS = re.compile(r"(https?|azblob):/", re.IGNORECASE)


keep_signatures_out_of_logs()


def blob_location(path: str | Path) -> BlobLocation | None:
    """The place in Blob Storage that Lightning means by `path`; None for a path of any other kind.

    ``Path("https://...")``, which Fabric and the strategies make of a URL, has lost a slash; it is understood.

    Raises:
        LocationError: it is a URL, and names no place in Blob Storage.
    """
    text = os.fspath(path)
    return BlobLocation.parse(text) if _OURS.match(text) else None


def blob_checkpoint_io(plugin: CheckpointIO | None) -> AzureBlobCheckpointIO | None:
    """Our plugin, if it is the one or the one within Lightning's wrappers."""
    while isinstance(plugin, WrappingCheckpointIO):
        plugin = plugin.checkpoint_io
    return plugin if isinstance(plugin, AzureBlobCheckpointIO) else None


class AzureBlobCheckpointIO(CheckpointIO):
    """Save and load a Trainer's or Fabric's checkpoints in Blob Storage.

        Trainer(plugins=[AzureBlobCheckpointIO()], callbacks=[AzureBlobModelCheckpoint(dirpath=url)])

    A checkpoint at ``<url>/epoch=1.ckpt`` is one of `torch.distributed.checkpoint`: ``.metadata`` and data blobs below
    that prefix. What it holds comes back as ``torch.save`` and ``torch.load`` would bring it back, object for object. A
    save over an existing checkpoint replaces it at once and whole, or not at all.

    Paths that are no URL of Blob Storage go to Lightning's own plugin: some of its tools keep checkpoints of their own
    on the local disk.

    Args:
        credential: as for `AzureBlobWriter`.
        async_save: let a save return when the checkpoint has been copied to host memory (two copies at most: a third
            save waits), and upload it in a thread while training goes on. Saves and removals keep their order. A save
            that failed leaves the old checkpoint where it is, keeps removals that were asked for since from being
            carried out, and is raised by the next call, the end of ``fit`` included. Fabric does not tear its plugins
            down: call `teardown` (or `wait`) at the end, or a failure is only logged.
        options: limits of connections, memory and time.
        ca_file: a PEM file with certificates to trust besides the platform's.

    Attributes:
        credential, options, ca_file: as given.

    Pickling works; the pickle holds the credential, and nothing of what waits to be uploaded.
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
        keep_signatures_out_of_logs()
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

    # What Lightning calls

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save `checkpoint` at `path`, which one process does.

        Raises:
            TypeError: there are `storage_options`; Lightning's own plugin knows none either.
            AzureCheckpointError: the save failed; what stood at the URL still stands. With ``async_save``, an earlier
                save failed.
        """
        location = blob_location(path)
        if location is None:
            self._local.save_checkpoint(checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise TypeError(
                f"{type(self).__name__} takes no storage_options. The credential, the options and the certificates of "
                "the plugin hold for all of its saves"
            )
        settle(str(location), besides=self._saves)
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
        """Load the checkpoint at `path`, once everything that ``async_save`` has in hand is done.

        A save of another plugin of this process that is on its way to `path` is waited for, too.

        A blob that ``torch.save`` wrote (a checkpoint of Lightning's own plugin) is understood as well.

        Args:
            map_location: as for ``torch.load``; Lightning's own plugin loads to the CPU by default, too.
            weights_only: as for ``torch.load``. None means what it means to the Lightning that is installed: True from
                2.6 on, False before.

        Raises:
            CheckpointNotFoundError: there is none.
            UnsupportedCheckpointError: it holds more than ``weights_only`` allows.
            AzureCheckpointError: it cannot be read; with ``async_save``, an earlier save failed.
        """
        location = blob_location(path)
        if not LOAD_TAKES_WEIGHTS_ONLY and weights_only is None:
            weights_only = False
        if location is None:
            return self._load_local(path, map_location, weights_only)
        self.wait_for(path)
        loaded: dict[str, Any]
        try:
            loaded = load_object(self.reader(path), map_location, weights_only)
        except CheckpointNotFoundError:
            if not self._is_blob(path):
                raise
            with BlobIO(path, "rb", credential=self.credential, options=self.options, ca_file=self.ca_file) as stream:
                loaded = torch.load(stream, map_location=map_location, weights_only=weights_only)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint at `path`. If there is none, there is nothing to do.

        Where the service does not allow it (a SAS without the right to delete, a lease, an immutability policy) the
        checkpoint stays, which is logged as a warning: training is worth more than the space.

        Raises:
            AzureCheckpointError: it could not be removed; with ``async_save``, an earlier save failed.
        """
        location = blob_location(path)
        if location is None:
            self._local.remove_checkpoint(path)
            return
        settle(str(location), besides=self._saves)
        if self._async_save:
            self._background().remove(str(location), lambda: self._remove(path))
        else:
            self._remove(path)

    def teardown(self) -> None:
        """Wait for what is pending and let go of the memory of the copies. The plugin can be used again.

        Raises:
            CheckpointError: a save of ``async_save`` failed.
        """
        try:
            self.wait()
        finally:
            self._saves = None

    # For whoever works with the same storage

    def wait(self) -> None:
        """Wait until all saves and removals of ``async_save`` are done.

        Raises:
            CheckpointError: one of them failed, and no call has said so yet.
        """
        if self._saves is not None:
            self._saves.wait()

    def wait_for(self, path: str | Path) -> None:
        """Wait until all saves of this plugin are done, and those that another one has on their way to `path`.

        Raises:
            CheckpointError: one of them failed, and no call has said so yet.
        """
        self.wait()
        settle(str(BlobLocation.parse(path)))

    def store(self, path: str | Path) -> tuple[BlobLocation, BlobStore]:
        """The place that a remote `path` names, and the store of its container, the same for all calls."""
        location = BlobLocation.parse(path)
        root = location.container_root()
        if root not in self._stores:
            self._stores[root] = BlobStore(root, Access(self.credential, self.options, self.ca_file))
        return location, self._stores[root]

    def reader(self, path: str | Path) -> AzureBlobReader:
        return AzureBlobReader(path, credential=self.credential, options=self.options, ca_file=self.ca_file)

    def writer(self, path: str | Path) -> AzureBlobWriter:
        return AzureBlobWriter(path, credential=self.credential, options=self.options, ca_file=self.ca_file)

    def _background(self) -> BackgroundSaves:
        if self._saves is None:
            self._saves = BackgroundSaves()
        return self._saves

    def _writer_at(self, path: str | Path) -> AzureBlobWriter:
        """One writer for all saves: it keeps its connections, and knows the blobs of the save that it replaces."""
        if self._kept_writer is None or self._kept_writer[0] != os.getpid():
            # Not the parent's after a fork: it may be in the middle of a save, and would take that for a failed one.
            self._kept_writer = (os.getpid(), self.writer(path))
        _, writer = self._kept_writer
        writer.reset(path)
        return writer

    def _remove(self, path: str | Path) -> None:
        try:
            self._remove_whatever_it_is(path)
        except StoreError as error:
            if not isinstance(error, AccessDeniedError) and error.status not in _NOT_TO_BE_DELETED:
                raise
            _log.warning("%s stays, for the service does not let it be removed: %s", BlobLocation.parse(path), error)

    def _remove_whatever_it_is(self, path: str | Path) -> None:
        try:
            remove_checkpoint(path, credential=self.credential, options=self.options, ca_file=self.ca_file)
        except CheckpointNotFoundError:
            if self._is_blob(path):
                location, store = self.store(path)
                store.delete(location.path)

    def _is_blob(self, path: str | Path) -> bool:
        """Whether a blob of this very name is there: a checkpoint that Lightning's own plugin has written.

        In an account with a hierarchical namespace a folder is an empty blob
        (https://learn.microsoft.com/azure/storage/blobs/data-lake-storage-namespace).
        """
        location, store = self.store(path)
        try:
            return bool(location.path) and store.stat(location.path).size > 0
        except BlobNotFoundError:
            return False

    def _load_local(self, path: str | Path, map_location: MapLocation, weights_only: bool | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"map_location": map_location}
        if LOAD_TAKES_WEIGHTS_ONLY:
            arguments["weights_only"] = weights_only
        return self._local.load_checkpoint(path, **arguments)
