"""Converts a ``.ckpt`` file of Lightning's own plugin to a checkpoint in Blob Storage, and back."""

from __future__ import annotations

import os
import zipfile

import torch

from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.objects.background_saves import wait_for_pending
from azure_torch_ckpt.objects.single_process import load_object, save_object
from azure_torch_ckpt.options import TransferOptions

__all__ = ["export_checkpoint", "import_checkpoint"]


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
