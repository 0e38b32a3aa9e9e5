"""`ServiceCopy`: copies of blobs that the service makes itself, so that the bytes do not pass this machine."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.core.rest import HttpResponse
from azure.storage.blob import BlobSasPermissions, generate_blob_sas

from azure_torch_ckpt._internal.checksums import parse_header_value
from azure_torch_ckpt._internal.shared_tokens import STORAGE_SCOPE
from azure_torch_ckpt.blobs.container import ContainerConnection
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["CopySource", "ServiceCopy"]


@dataclass(frozen=True, slots=True, repr=False)
class CopySource:
    """A blob that the service can read for a copy; `ServiceCopy.copy_source` makes one. URL and header are secret.

    Attributes:
        url: of the blob, with a SAS if the service needs one.
        etag: only the blob with this ETag is copied.
        authorization: the header by which the service may read it instead, or None.
    """

    url: str
    etag: str
    authorization: str | None = None


class ServiceCopy(ContainerConnection):
    """Base of `BlobStore`: its verbs that copy."""

    def copy_source(self, path: str, etag: str) -> CopySource:
        """Return a blob of this store as the source for `copy` and `stage_block_from` of any store, valid for a day.

        The service reads it with the SAS of this store's URL or credential, with a SAS that is signed here if the
        account key is known, or with this store's token
        (https://learn.microsoft.com/rest/api/storageservices/put-block-from-url#authorization).
        """
        location = dataclasses.replace(self.location, path=path)
        credential = self._credential
        url, sas, authorization = str(location), None, None
        if isinstance(credential, AzureSasCredential):
            sas = credential.signature.removeprefix("?")
        elif isinstance(credential, AzureNamedKeyCredential):
            expiry = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
            account, key = credential.named_key
            sas = generate_blob_sas(
                account,
                location.container,
                path,
                account_key=key,
                permission=BlobSasPermissions(read=True),
                expiry=expiry,
            )
        elif credential is not None:
            with self._translated("get a token to copy", path):
                authorization = f"Bearer {credential.get_token(STORAGE_SCOPE).token}"
        return CopySource(url if sas is None else f"{url}?{sas}", etag, authorization)

    def copy(
        self,
        path: str,
        source: CopySource,
        metadata: Mapping[str, str] | None = None,
        *,
        cancel: Cancel | None = None,
    ) -> int | None:
        """Copy Blob From URL: make the blob `path`, new or replaced, of another blob of at most 256 MiB.

        https://learn.microsoft.com/rest/api/storageservices/copy-blob-from-url. Returns the CRC64-NVME of
        the copy, if the service sends it. Content-Type and similar headers are the source's; its tags are not copied.

        Args:
            metadata: stored with the blob in place of the source's.
        """
        answers: list[HttpResponse] = []
        with self._translated("copy another blob to", path):
            self._blob(path).start_copy_from_url(
                source.url,
                None if metadata is None else dict(metadata),
                requires_sync=True,
                source_etag=source.etag,
                source_match_condition=MatchConditions.IfNotModified,
                source_authorization=source.authorization,
                cancel=cancel,
                answers=answers,
            )
        return _answered_crc64(answers)

    def stage_block_from(
        self,
        path: str,
        block_id: str,
        source: CopySource,
        offset: int,
        length: int,
        *,
        cancel: Cancel | None = None,
    ) -> int | None:
        """Put Block From URL: `BlobStore.stage_block` with `length` bytes of another blob, from `offset` on.

        https://learn.microsoft.com/rest/api/storageservices/put-block-from-url. Returns the CRC64-NVME of the block, if
        the service sends it.
        """
        answers: list[HttpResponse] = []
        with self._translated("copy a part of another blob to", path):
            self._blob(path).stage_block_from_url(
                block_id,
                source.url,
                offset,
                length,
                headers={"x-ms-source-if-match": source.etag},
                source_authorization=source.authorization,
                cancel=cancel,
                answers=answers,
            )
        return _answered_crc64(answers)


def _answered_crc64(answers: Sequence[HttpResponse]) -> int | None:
    # The client's result of a copy lacks it.
    value = answers[-1].headers.get("x-ms-content-crc64")
    return None if value is None else parse_header_value(value)
