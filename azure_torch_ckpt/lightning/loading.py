"""`load_from_checkpoint`: makes a LightningModule or LightningDataModule from a checkpoint in Blob Storage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TypeVar

import torch

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.objects.codec import MapLocation
from azure_torch_ckpt.options import TransferOptions

from .checkpoint_io import AzureBlobCheckpointIO
from .stock import pytorch, weights_only_argument

__all__ = ["load_from_checkpoint"]

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
