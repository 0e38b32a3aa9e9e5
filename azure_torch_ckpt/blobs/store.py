"""`BlobStore`: the verbs on the blobs of one container. The rest of this package reaches Blob Storage only through
it."""

from __future__ import annotations

import base64
import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from azure.core import MatchConditions
from azure.core.rest import HttpResponse
from azure.storage.blob import BlobBlock, ContentSettings

from azure_torch_ckpt._internal.checksums import header_value, md5
from azure_torch_ckpt.blobs import blob_info
from azure_torch_ckpt.blobs.blob_info import BlobInfo, BlobSettings, CopiedSettings
from azure_torch_ckpt.blobs.container import ContainerListing
from azure_torch_ckpt.blobs.service_copy import ServiceCopy
from azure_torch_ckpt.errors import BlobNotFoundError, CorruptCheckpointError, RequestRefusedError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel, Doubt, Gather, Scatter

__all__ = ["BlobStore"]

_BLOCK_NAME = re.compile(rb"<Name>([A-Za-z0-9+/]+=*)</Name>")


class BlobStore(ServiceCopy, ContainerListing):
    """One container: small verbs on blobs, with this package's errors and retries.

    Thread-safe; usable after a fork; picklable (each process makes its connections when it needs them). A pickle holds
    the given credential, because it would be useless without.

    Args:
        location: names the account and the container; its path is ignored.
        access: credential, limits and certificates.

    Args (of several methods):
        path: the blob's name in the container.
        if_etag: only for the blob with this ETag.
        if_missing: write only if the blob does not exist.
        moment: if it names a snapshot or a version of the blob, that one is read.
        cancel: ends the request early.

    Raises (all methods): `ContainerNotFoundError`, `AccessDeniedError`, `ServiceUnavailableError`,
        `RequestRefusedError`; `BlobNotFoundError` if a blob to be read does not exist; `BlobChangedError` if
        `if_etag`, `if_missing` or the ETag of a source is not met; and the errors that a method lists.
    """

    def moved_to(self, location: BlobLocation) -> tuple[BlobLocation, BlobStore]:
        """Return a store for `location` with the same credential and options: this one if it is for that container.

        Within its container, the SAS of this store's URL is used. Returns the location, with that SAS if it has none,
        and the store.
        """
        if location.sas is None and location.without_sas().container_root() == self.location.without_sas():
            location = dataclasses.replace(location, sas=self.location.sas)
        if location.container_root() == self.location:
            return location, self
        return location, BlobStore(location, self.access)

    # Writing

    def stage_block(
        self, path: str, block_id: str, body: Gather, crc64: int | None = None, *, cancel: Cancel | None = None
    ) -> None:
        """Put Block: store a block of a blob, invisible until `commit_blocks` names it.

        The service removes uncommitted blocks after a week (https://learn.microsoft.com/rest/api/storageservices/put-block).

        Args:
            block_id: all ids of a blob must have the same length, 64 bytes at most.
            crc64: CRC64-NVME of the body. The service refuses a body with another one, and it is sent again.
        """
        headers = {} if crc64 is None else {"x-ms-content-crc64": header_value(crc64)}
        with self._translated("write a block of", path):
            blob = self._blob(path)
            if self._direct().put_block(blob.url, block_id, body, headers=headers, cancel=cancel) is None:
                blob.stage_block(
                    block_id,
                    body,  # type: ignore[arg-type]
                    len(body),
                    headers=headers,
                    cancel=cancel,
                )

    def commit_blocks(
        self,
        path: str,
        block_ids: Sequence[str],
        settings: BlobSettings | CopiedSettings | None = None,
        *,
        if_etag: str | None = None,
        if_missing: bool = False,
    ) -> str:
        """Put Block List: make the blob `path`, new or replaced, of staged blocks, and return its ETag.

        Safe to repeat without a condition. With one, a retry may meet the result of a first attempt whose answer was
        lost: `outcome.commit_blocks` finds out.

        Args:
            block_ids: an empty list makes an empty blob.
        """
        options = _metadata_and_tags(settings)
        if isinstance(settings, CopiedSettings):
            options["content_settings"] = settings.content
        elif settings is not None and settings.content_type is not None:
            options["content_settings"] = ContentSettings(content_type=settings.content_type)
        options |= {"match_condition": MatchConditions.IfMissing} if if_missing else _if(if_etag)
        doubt = Doubt()
        with self._translated("commit", path, doubt):
            blocks = [BlobBlock(block_id) for block_id in block_ids]
            result = self._blob(path).commit_block_list(blocks, doubt=doubt, **options)
            return str(result["etag"])

    def committed_blocks(self, path: str) -> list[str]:
        """Get Block List: return the ids of the blocks of which the blob consists, in their order."""
        with self._translated("look at the blocks of", path):
            return [str(block.id) for block in self._blob(path).get_block_list("committed")[0]]

    def uncommitted_blocks(self, path: str) -> list[str]:
        """Get Block List: return the ids, in base64, of the blocks that are staged for the blob and not committed.

        Raises:
            BlobNotFoundError: neither such blocks nor the blob exist.
        """
        answers: list[HttpResponse] = []
        with self._translated("look at the blocks of", path):
            # The client decodes ids to text, and loses the length of those that are not text.
            self._blob(path).get_block_list("uncommitted", answers=answers)
        body = answers[-1].content
        return [name.decode() for name in _BLOCK_NAME.findall(body.partition(b"<UncommittedBlocks>")[2])]

    def put(
        self,
        path: str,
        data: bytes,
        settings: CopiedSettings | None = None,
        *,
        if_etag: str | None = None,
        if_missing: bool = False,
        doubt: Doubt | None = None,
    ) -> str:
        """Put Blob: write a whole blob with one request, and return its ETag.

        The service checks the content's MD5 on arrival and keeps it (`BlobInfo.md5`):
        https://learn.microsoft.com/rest/api/storageservices/put-blob. With a condition, a retry may meet the result of
        a first attempt whose answer was lost: `outcome.put` finds out.

        Args:
            settings: of the blob that is copied.
            doubt: records whether an attempt before the last one may have been carried out.
        """
        content = ContentSettings(content_type="application/octet-stream")
        if settings is not None and settings.content is not None:
            content = copy.copy(settings.content)
            content.content_md5 = None  # the service computes it
        doubt = doubt or Doubt()
        with self._translated("write", path, doubt):
            result = self._blob(path).upload_blob(
                data,
                length=len(data),
                max_concurrency=1,
                content_settings=content,
                headers={"Content-MD5": base64.b64encode(md5(data)).decode()},
                overwrite=not if_missing,
                doubt=doubt,
                **_metadata_and_tags(settings),
                **_if(if_etag),
            )
            return str(result["etag"])

    def append(self, path: str, data: bytes, at: int) -> str:
        """Append Block: add to an append blob, and return its ETag. A retry may meet the result of a first attempt.

        https://learn.microsoft.com/rest/api/storageservices/append-block.

        Args:
            at: append only if the blob has this size (bytes).

        Raises:
            BlobChangedError: the blob has another size.
        """
        doubt = Doubt()
        with self._translated("append to", path, doubt):
            result = self._blob(path).append_block(
                data,
                length=len(data),
                appendpos_condition=at,
                headers={"Content-MD5": base64.b64encode(md5(data)).decode()},
                doubt=doubt,
            )
            return str(result["etag"])

    def delete(self, path: str, *, if_etag: str | None = None, cancel: Cancel | None = None) -> bool:
        """Delete a blob, with its snapshots; return whether it existed. Use `delete_folder` for a folder's own blob."""
        doubt = Doubt()
        try:
            with self._translated("delete", path, doubt):
                self._blob(path).delete_blob(delete_snapshots="include", cancel=cancel, doubt=doubt, **_if(if_etag))
        except BlobNotFoundError:
            return False
        return True

    def delete_folder(self, path: str, *, if_etag: str | None = None, cancel: Cancel | None = None) -> bool:
        """Delete the blob that represents a folder; return whether it is gone.

        A directory is deleted only if it is empty. In an account without directories the blob is a mark, and is deleted
        whatever is in the folder.
        """
        try:
            with self._translated("delete the folder", path):
                # With x-ms-delete-snapshots, the answer for a directory is 400 OperationNotSupportedOnDirectory.
                self._blob(path).delete_blob(cancel=cancel, **_if(if_etag))
        except BlobNotFoundError:
            return True
        except RequestRefusedError as error:
            if error.error_code == "SnapshotsPresent":  # a directory has none
                return self.delete(path, if_etag=if_etag, cancel=cancel)
            if error.error_code != "DirectoryIsNotEmpty":
                raise
            return False
        return True

    # Reading

    def read_into(
        self,
        path: str,
        offset: int,
        views: Sequence[memoryview],
        *,
        if_etag: str | None = None,
        moment: BlobLocation | None = None,
        cancel: Cancel | None = None,
    ) -> str:
        """Get Blob: fill `views` with the bytes from `offset` on, by one request; return the blob's ETag.

        Args:
            views: writable one-dimensional byte views, at least one byte in all.

        Raises:
            RequestRefusedError: the range goes beyond the blob's end (``status`` is 416).
        """
        dest = Scatter(views)
        with self._translated("read", path):
            blob = self._blob(path, moment)
            response = self._direct().get_range(
                blob.url, offset, dest.size, moment=moment, dest=dest, if_etag=if_etag, cancel=cancel
            )
            if response is not None:
                etag, data = response.headers["ETag"], response.content
            else:
                download = blob.download_blob(
                    offset=offset, length=dest.size, max_concurrency=1, dest=dest, cancel=cancel, **_if(if_etag)
                )
                etag = str(download.properties.etag)
                data = b"" if dest.received else download.readall()
        if dest.received:
            return etag
        if len(data) != dest.size:
            error = RequestRefusedError(
                f"could not read {dest.size} bytes at offset {offset} of {self.location}/{path}, got {len(data)}: "
                "the blob is shorter than expected"
            )
            error.status = 416
            raise error
        position = 0
        for view in views:
            view[:] = data[position : position + view.nbytes]
            position += view.nbytes
        return etag

    def read(self, path: str, *, limit: int) -> tuple[bytes, str]:
        """Get Blob: return the content (the first `limit` bytes) of a small blob, and its ETag.

        Raises:
            CorruptCheckpointError: the bytes do not have the MD5 that is stored with them.
        """
        data, info = self.read_some(path, 0, limit)
        if info.md5 is not None and len(data) == info.size and info.md5 != md5(data):
            raise CorruptCheckpointError(
                f"{self.location}/{path} was damaged in storage or by the network: its bytes do not have the MD5 that "
                "is stored with them. Try again to rule out the network"
            )
        return data, info.etag

    def read_some(
        self, path: str, offset: int, limit: int, *, if_etag: str | None = None, moment: BlobLocation | None = None
    ) -> tuple[bytes, BlobInfo]:
        """Get Blob: return at most `limit` bytes from `offset` on, none at the blob's end, and the properties."""
        try:
            with self._translated("read", path):
                blob = self._blob(path, moment)
                response = self._direct().get_range(blob.url, offset, limit, moment=moment, if_etag=if_etag)
                if response is not None:
                    return response.content, blob_info.of_response(path, response)
                download = blob.download_blob(offset=offset, length=limit, max_concurrency=1, **_if(if_etag))
                data, properties = download.readall(), download.properties
        except RequestRefusedError as error:
            # https://learn.microsoft.com/rest/api/storageservices/get-blob: no range is valid for an empty blob.
            if error.status != 416:
                raise
            return b"", self.stat(path, if_etag=if_etag, moment=moment)
        size = blob_info.whole_size(properties.content_range, data)
        return data, dataclasses.replace(blob_info.of_properties(path, properties), size=size)

    def stat(
        self,
        path: str,
        *,
        if_etag: str | None = None,
        moment: BlobLocation | None = None,
        cancel: Cancel | None = None,
    ) -> BlobInfo:
        """Get Blob Properties: return what the service knows of the blob."""
        answers: list[HttpResponse] = []
        with self._translated("look at", path):
            properties = self._blob(path, moment).get_blob_properties(cancel=cancel, answers=answers, **_if(if_etag))
        return blob_info.of_properties(path, properties, answers[-1].headers)

    def tags(self, path: str) -> dict[str, str]:
        """Get Blob Tags: return the index tags. They need a permission of their own, beside that to read the blob."""
        with self._translated("read the tags of", path):
            return dict(self._blob(path).get_blob_tags())

    def create_container(self) -> None:
        """Create the container, unless it exists."""
        try:
            with self._translated("create the container of", ""):
                self._container().create_container()
        except RequestRefusedError as error:
            if error.error_code != "ContainerAlreadyExists":
                raise


def _metadata_and_tags(settings: BlobSettings | CopiedSettings | None) -> dict[str, Any]:
    present = {} if settings is None else {"metadata": settings.metadata, "tags": settings.tags}
    return {name: dict(values) for name, values in present.items() if values}


def _if(etag: str | None) -> dict[str, Any]:
    return {} if etag is None else {"etag": etag, "match_condition": MatchConditions.IfNotModified}
