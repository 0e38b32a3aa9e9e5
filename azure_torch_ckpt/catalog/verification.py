"""`verify`: checks a sharded checkpoint, or a model in the HuggingFace layout."""

from __future__ import annotations

import os

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.verification import BlobReport, VerifyReport, verify_items
from azure_torch_ckpt.dcp.verification import verify as verify_checkpoint
from azure_torch_ckpt.errors import AccessDeniedError, CheckpointNotFoundError, RequestRefusedError
from azure_torch_ckpt.huggingface.leftovers import saved_files_at
from azure_torch_ckpt.huggingface.reader import AzureBlobHuggingFaceReader
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import ProgressOption

__all__ = ["verify"]


def verify(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    sample: float = 1.0,
    progress: ProgressOption = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> VerifyReport:
    """Read a checkpoint and compare every size and CRC64 with its metadata. Changes nothing.

    If the URL has no checkpoint but a model in the HuggingFace layout, compare its files with the index. Files of
    `AzureBlobHuggingFaceWriter` that the index does not name are a problem: readers that list files would load them.

    The sizes come from a listing. If the credential does not allow listing, they come from a request for each blob.

    Args:
        url: the checkpoint or model.
        sample: share of the items to read, 0 to 1, chosen at random. The sizes of all blobs are checked in any case.
        progress: as for `AzureBlobReader`; counts the bytes read.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint and no model.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: its metadata cannot be read.
        StoreError: a request failed.
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
        except (CheckpointNotFoundError, AccessDeniedError, RequestRefusedError):
            raise error from None  # its message is about the checkpoint that the user asked for
    store = BlobStore(location, Access(credential, options, ca_file))
    report = verify_items(store, location, metadata, sample, progress)
    indexed = {blob.name for blob in report.blobs}
    leftovers = [
        BlobReport(
            name,
            size=None,
            expected_size=0,
            items=0,
            problems=[
                f"blob {name} is of another save, which is running or was killed: the index does not name it, but "
                "readers that list files (vLLM, SGLang) load it. The next save here removes it, and so does prune"
            ],
        )
        for name in sorted(saved_files_at(store, location) - indexed)
    ]
    return VerifyReport(report.url, report.blobs + leftovers)
