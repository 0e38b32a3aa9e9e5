"""`verify`: of a sharded checkpoint, or of a model in the layout of Hugging Face."""

from __future__ import annotations

import os

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.bytemeter import ByteProgress
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.verification import BlobReport, VerifyReport, verify_items
from azure_torch_ckpt.dcp.verification import verify as verify_checkpoint
from azure_torch_ckpt.errors import AccessDeniedError, CheckpointNotFoundError, RequestRefusedError
from azure_torch_ckpt.huggingface.leftovers import saved_files_at
from azure_torch_ckpt.huggingface.reader import AzureBlobHuggingFaceReader
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["verify"]


def verify(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    sample: float = 1.0,
    progress: ByteProgress | None = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> VerifyReport:
    """Read a checkpoint and compare every size and CRC64 with its metadata. Changes nothing.

    Where there is no checkpoint but a model in the layout of Hugging Face, its files are compared with the index. Files
    of `AzureBlobHuggingFaceWriter` that the index does not name are a problem: readers that list files would load them.

    The sizes come from a listing, or where the credential does not allow one from a request for each blob.

    Args:
        url: the checkpoint's place.
        sample: share of the items that are read, 0 to 1, chosen at random. The sizes of all blobs are checked anyway.
        progress: called with the bytes that were read so far and those that will be; see `ByteProgress`.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint and no model.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: its metadata cannot be read.
        StoreError: the service could not be asked.
    """
    try:
        return verify_checkpoint(
            url, credential=credential, sample=sample, progress=progress, options=options, ca_file=ca_file
        )
    except CheckpointNotFoundError as error:
        location = BlobLocation.parse(url)
        reader = AzureBlobHuggingFaceReader(location, credential=credential, options=options, ca_file=ca_file)
        try:
            metadata = reader.read_metadata()
        except (CheckpointNotFoundError, AccessDeniedError, RequestRefusedError):  # the first says what is unknown
            raise error from None
    store = BlobStore(location, Access(credential, options, ca_file))
    report = verify_items(store, location, metadata, sample, progress)
    named = {blob.name for blob in report.blobs}
    strays = [
        BlobReport(
            name,
            size=None,
            expected_size=0,
            items=0,
            problems=[
                f"blob {name} is of another save, which is running or has died: the index does not name it, but "
                "readers that list files (vLLM, SGLang) load it. The next save here removes it, or prune"
            ],
        )
        for name in sorted(saved_files_at(store, location) - named)
    ]
    return VerifyReport(report.url, report.blobs + strays)
