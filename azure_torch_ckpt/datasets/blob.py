"""One blob of a dataset, and how it is read: credential, cache, limits."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, BinaryIO

from azure_torch_ckpt.credentials import Credential, PickledCredential
from azure_torch_ckpt.datasets.cache import BlobCache
from azure_torch_ckpt.datasets.listing import ListedBlob
from azure_torch_ckpt.io import BlobIO
from azure_torch_ckpt.options import TransferOptions

__all__ = ["Access", "Blob"]


@dataclass(frozen=True)
class Access:
    """What every blob of a dataset is read with. A pickle holds the credential, and so is a secret."""

    credential: Credential = None
    cache: BlobCache | None = None
    options: TransferOptions | None = None
    ca_file: str | None = None

    def open(self, blob: ListedBlob, if_etag: str | None = None) -> BlobIO:
        return BlobIO(
            blob.location,
            "rb",
            credential=self.credential,
            if_etag=if_etag,
            options=self.options,
            ca_file=self.ca_file,
        )

    def read(self, blob: ListedBlob, if_etag: str | None = None) -> bytes:
        """All of a blob; from the cache, if the version that was listed (or is there now) is in it."""
        with self.open(blob, if_etag) as file:
            if self.cache is None:
                return file.read()
            url = str(blob.location)
            data = self.cache.get(url, blob.etag or file.etag or "")
            if data is None:
                data = file.read()
                self.cache.put(url, file.etag or "", data)
            return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "credential": PickledCredential.of(self.credential)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, credential=state["credential"].restore())


class Blob:
    """A blob, as a dataset hands it to a `transform`. It is of use while the transform runs."""

    __slots__ = ("_access", "_data", "_listed")

    def __init__(self, listed: ListedBlob, access: Access, data: bytes | None = None) -> None:
        self._listed = listed
        self._access = access
        self._data = data

    def __repr__(self) -> str:
        return f"Blob({str(self._listed.location)!r})"

    @property
    def url(self) -> str:
        """The URL without its query: no SAS, snapshot or version."""
        return self._listed.url

    @property
    def blob_name(self) -> str:
        return self._listed.location.path

    @property
    def container_name(self) -> str:
        return self._listed.location.container

    def read(self) -> bytes:
        """All of the content.

        Raises:
            StoreError: it cannot be read.
        """
        if self._data is None:
            self._data = self._access.read(self._listed)
        return self._data

    def reader(self) -> BinaryIO:
        """A file to read the content from: of the memory if it is there already or in the cache, else a `BlobIO`."""
        cache, size = self._access.cache, self._listed.size
        if self._data is not None or (cache is not None and size is not None and cache.takes(size)):
            return io.BytesIO(self.read())
        return self._access.open(self._listed)
