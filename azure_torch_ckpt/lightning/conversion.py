"""Without a Trainer: loads a module from a checkpoint in Blob Storage, and converts ``.ckpt`` files to one and back."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import torch

from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.objects.background_saves import wait_for_pending
from azure_torch_ckpt.objects.codec import MapLocation
from azure_torch_ckpt.objects.single_process import load_object, save_object
from azure_torch_ckpt.options import TransferOptions

from .checkpoint_io import AzureBlobCheckpointIO
from .stock import pytorch, weights_only_argument

__all__ = ["export_checkpoint", "import_checkpoint", "load_from_checkpoint"]


def import_checkpoint(
    file: str | os.PathLike[str],
    url: str | os.PathLike[str] | BlobLocation,
    *,
    weights_only: bool | None = None,
    overwrite: bool = False,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> None:
    """Save the contents of a local ``.ckpt`` file, or of any other file of ``torch.save``, as a checkpoint at `url`.

    The file is mapped into memory, so that its tensors are read as they are sent. They are saved as CPU tensors.

    Args:
        weights_only: as for ``torch.load``: with False the file may run code. Use it only for a file that you trust.
        overwrite: whether to replace a checkpoint at `url`.

    Raises:
        CheckpointExistsError: there is a checkpoint at `url`, and `overwrite` is False.
        AzureCheckpointError: the save failed; nothing changed at `url`.
        Whatever ``torch.load`` raises for the file.
    """
    writer = AzureBlobWriter(url, credential=credential, overwrite=overwrite, options=options, ca_file=ca_file)
    wait_for_pending(writer.checkpoint_id)
    # Only the format that torch.save writes since torch 1.6 can be mapped.
    mapped = zipfile.is_zipfile(file)
    save_object(torch.load(file, map_location="cpu", mmap=mapped, weights_only=weights_only), writer)


def export_checkpoint(
    url: str | os.PathLike[str] | BlobLocation,
    file: str | os.PathLike[str],
    *,
    weights_only: bool | None = None,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> None:
    """Write the checkpoint at `url` to a local file that a stock Lightning loads. The file appears once it is complete.

    All tensors are in memory while the file is written. They are CPU tensors in the file.

    Args:
        weights_only: as for ``torch.load``: with False the checkpoint may run code. Use it only for a checkpoint that
            you trust.

    Raises:
        CheckpointNotFoundError: there is no checkpoint at `url`.
        AzureCheckpointError: the checkpoint cannot be read.
        OSError: the file cannot be written.
    """
    reader = AzureBlobReader(url, credential=credential, options=options, ca_file=ca_file)
    wait_for_pending(reader.checkpoint_id)
    checkpoint = load_object(reader, "cpu", weights_only)
    with AtomicFile(file) as new:
        torch.save(checkpoint, new.file)
        new.publish()


_Loadable = TypeVar("_Loadable", pytorch.LightningModule, pytorch.LightningDataModule)


def load_from_checkpoint(
    cls: type[_Loadable],
    url: str | Path,
    map_location: MapLocation = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    *,
    credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
    **kwargs: Any,
) -> _Loadable:
    """Do what ``cls.load_from_checkpoint(path, ...)`` does with a file, for the present checkpoint at `url`.

    Lightning's own method caches downloads from ``https://`` under the last part of the URL, so that it may return
    another run's ``last.ckpt`` from the cache. It cannot read a checkpoint of many blobs either.

    While this loads, the checkpoint is in memory twice.

    Args:
        cls: a LightningModule or LightningDataModule.
        map_location, hparams_file, strict, weights_only: as for ``cls.load_from_checkpoint``. None for `map_location`
            restores tensors to the device that they were saved from, or to the CPU if there is no such device.
        credential, options, ca_file: as for `AzureBlobCheckpointIO`.
        kwargs: for ``cls``; they replace saved hyperparameters.

    Raises:
        LocationError: `url` is not a URL of Blob Storage.
        CheckpointNotFoundError: there is no checkpoint at `url`.
        AzureCheckpointError: the checkpoint cannot be read.
        Whatever ``cls.load_from_checkpoint`` raises.
    """
    plugin = AzureBlobCheckpointIO(credential, options=options, ca_file=ca_file)
    restore: MapLocation = _saved_device if map_location is None else map_location
    checkpoint = plugin.load_checkpoint(url, restore, weights_only)
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    del checkpoint
    stream.seek(0)
    kwargs |= weights_only_argument(weights_only)
    if issubclass(cls, pytorch.LightningModule):
        kwargs["strict"] = strict
    loaded: _Loadable = cls.load_from_checkpoint(stream, map_location=None, hparams_file=hparams_file, **kwargs)
    return loaded


def _saved_device(storage: torch.types.Storage, location: str) -> Any:
    """For ``map_location``: None restores a storage to its saved device, as ``torch.load`` does by default."""
    kind = location.partition(":")[0]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    is_there = kind == "cpu" or (accelerator is not None and accelerator.type == kind)
    return None if is_there else storage
