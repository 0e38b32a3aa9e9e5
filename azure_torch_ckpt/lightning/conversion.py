"""From a ``.ckpt`` file of Lightning's own plugin to a checkpoint in Blob Storage, and back."""

from __future__ import annotations

import os
import zipfile

import torch

from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.objects.background_saves import settle
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
    """Save what a local ``.ckpt`` file holds (or any other file of ``torch.save``) as a checkpoint at `url`.

    The file is mapped, so that its tensors are read as they are sent. They are saved as CPU tensors.

    Args:
        weights_only: as for ``torch.load``: with False the file may run code. Only for one that you trust.
        overwrite: whether a checkpoint that stands at `url` may be replaced.

    Raises:
        CheckpointExistsError: a checkpoint stands there.
        AzureCheckpointError: the save failed; nothing changed at `url`.
        Whatever ``torch.load`` raises for the file.
    """
    writer = AzureBlobWriter(url, credential=credential, overwrite=overwrite, options=options, ca_file=ca_file)
    settle(writer.checkpoint_id)
    # Only files of the form that torch.save has written since 1.6 can be mapped.
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
    """Write the checkpoint at `url` as a local file that a stock Lightning loads. The file appears when it is whole.

    The tensors are in memory while it is written. They are CPU tensors in the file.

    Args:
        weights_only: as for ``torch.load``: with False the checkpoint may run code. Only for one that you trust.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        AzureCheckpointError: it cannot be read.
        OSError: the file cannot be written.
    """
    reader = AzureBlobReader(url, credential=credential, options=options, ca_file=ca_file)
    settle(reader.checkpoint_id)
    checkpoint = load_object(reader, "cpu", weights_only)
    with AtomicFile(file) as new:
        torch.save(checkpoint, new.file)
        new.publish()
