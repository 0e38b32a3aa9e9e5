"""What writer and reader have in common: the checkpoint's URL and the way to its container."""

from __future__ import annotations

import os

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.errors import LocationError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.store import BlobStore

__all__ = ["CheckpointPlace"]


class CheckpointPlace:
    """Base of `AzureBlobWriter` and `AzureBlobReader`."""

    def __init__(
        self,
        url: str | os.PathLike[str] | BlobLocation,
        credential: Credential,
        options: TransferOptions | None,
        ca_file: str | None,
    ) -> None:
        super().__init__()
        self._location = BlobLocation.parse(url)
        self._store = BlobStore(self._location, credential, options=options, ca_file=ca_file)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.checkpoint_id!r})"

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint's URL, without a SAS."""
        return str(self._location)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` names a place in Blob Storage."""
        try:
            BlobLocation.parse(checkpoint_id)
        except LocationError:
            return False
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Turn to another checkpoint, in any container that the credential is good for. None: stay at this one.

        Raises:
            LocationError: `checkpoint_id` names no place in Blob Storage.
        """
        if checkpoint_id is not None:
            self._location, self._store = self._store.moved_to(BlobLocation.parse(checkpoint_id))
