"""`load_from_checkpoint`: a LightningModule or LightningDataModule from a checkpoint in Blob Storage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TypeVar

import torch

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.objects.codec import MapLocation
from azure_torch_ckpt.options import TransferOptions

from .checkpoint_io import AzureBlobCheckpointIO
from .stock import LOAD_TAKES_WEIGHTS_ONLY, pytorch

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
    """What ``cls.load_from_checkpoint(path, ...)`` does with a file, with the checkpoint that stands at `url` now.

    Lightning's own method keeps what it downloads from ``https://`` in a local cache by the last part of the URL, and
    takes another run's ``last.ckpt`` from there for yours; it cannot read a checkpoint of many blobs either.

    While it loads, the checkpoint is in memory twice.

    Args:
        cls: a LightningModule or LightningDataModule.
        map_location, hparams_file, strict, weights_only: as for ``cls.load_from_checkpoint``. None for `map_location`
            puts tensors where they were saved, or on the CPU where there is no such device.
        credential, options, ca_file: as for `AzureBlobCheckpointIO`.
        kwargs: for ``cls``, in place of its saved hyperparameters.

    Raises:
        LocationError: `url` names no place in Blob Storage.
        CheckpointNotFoundError: there is no checkpoint.
        AzureCheckpointError: it cannot be read.
        Whatever ``cls.load_from_checkpoint`` raises.
    """
    plugin = AzureBlobCheckpointIO(credential, options=options, ca_file=ca_file)
    where: MapLocation = _where_it_was if map_location is None else map_location
    checkpoint = plugin.load_checkpoint(url, where, weights_only)
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    del checkpoint
    stream.seek(0)
    if LOAD_TAKES_WEIGHTS_ONLY:
        kwargs["weights_only"] = weights_only
    if issubclass(cls, pytorch.LightningModule):
        kwargs["strict"] = strict
    loaded: _Loadable = cls.load_from_checkpoint(stream, map_location=None, hparams_file=hparams_file, **kwargs)
    return loaded


def _where_it_was(storage: torch.types.Storage, location: str) -> Any:
    """None lets torch.load do what it does by default."""
    kind = location.partition(":")[0]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    is_there = kind == "cpu" or (accelerator is not None and accelerator.type == kind)
    return None if is_there else storage
