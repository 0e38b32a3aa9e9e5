"""Blob Storage as the rest of this package sees it: the one door to azure-storage-blob."""

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
from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.container_listing import ListedContainer
from azure_torch_ckpt.blobs.service_copy import CopyingContainer
from azure_torch_ckpt.blobs.settings import BlobSettings, CopiedSettings
from azure_torch_ckpt.errors import BlobNotFoundError, CorruptCheckpointError, RequestRefusedError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel, Doubt, Gather, Scatter

__all__ = ["BlobInfo", "BlobStore"]

_BLOCK_NAME = re.compile(rb"<Name>([A-Za-z0-9+/]+=*)</Name>")


class BlobStore(CopyingContainer, ListedContainer):
    """One container: small verbs on blobs, with this package's errors and retries.

    Thread-safe; usable after a fork; picklable (the connections are made lazily, in each process). A pickle holds the
    credential that was given, for it could not be used otherwise.

    Args:
        location: names the account and the container; its path plays no role here.
        access: credential, limits and certificates.

    Raises (all methods): `ContainerNotFoundError`, `AccessDeniedError`, `ServiceUnavailableError`,
        `RequestRefusedError`, and what each method names.
    """

    def moved_to(self, location: BlobLocation) -> tuple[BlobLocation, BlobStore]:
        """A store for `location` with the same credential and options: this one if it serves that container already.

        The SAS of this store's URL goes along within its container. Returns the location, with the SAS where it has
        one now, and the store.
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
        """Put Block: store a part of a blob, invisible until `commit_blocks` names it.

        Uncommitted blocks vanish after a week (https://learn.microsoft.com/rest/api/storageservices/put-block).

        Args:
            block_id: all ids of a blob must have the same length, 64 bytes at most.
            crc64: CRC64-NVME of the body. The service refuses a body that arrives with another one, and it is sent
                again.
            cancel: breaks the request off.
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
        """Put Block List: make the blob `path` of staged blocks, replacing what was there, and return its ETag.

        Safe to repeat without a condition. With one, a retry may find what the first attempt did, whose answer got
        lost: `outcome.commit_blocks` tells.

        Args:
            block_ids: without any, the blob is empty.
            if_etag: write only over the blob with this ETag.
            if_missing: write only if there is no such blob.

        Raises:
            BlobChangedError: the condition does not hold.
        """
        settings = settings or BlobSettings()
        options: dict[str, Any] = {}
        if isinstance(settings, CopiedSettings):
            options["content_settings"] = settings.content
        elif settings.content_type is not None:
            options["content_settings"] = ContentSettings(content_type=settings.content_type)
        if settings.metadata:
            options["metadata"] = dict(settings.metadata)
        if settings.tags:
            options["tags"] = dict(settings.tags)
        options |= {"match_condition": MatchConditions.IfMissing} if if_missing else _if(if_etag)
        doubt = Doubt()
        with self._translated("commit", path, doubt):
            blocks = [BlobBlock(block_id) for block_id in block_ids]
            result = self._blob(path).commit_block_list(blocks, doubt=doubt, **options)
            return str(result["etag"])

    def committed_blocks(self, path: str) -> list[str]:
        """Get Block List: the ids of the blocks that the blob consists of, in their order.

        Raises:
            BlobNotFoundError: there is no such blob.
        """
        with self._translated("look at the blocks of", path):
            return [str(block.id) for block in self._blob(path).get_block_list("committed")[0]]

    def uncommitted_blocks(self, path: str) -> list[str]:
        """Get Block List: the ids, in base64, of the blocks that anybody has staged for the blob and nobody committed.

        Raises:
            BlobNotFoundError: there are neither such blocks nor a blob.
        """
        answers: list[HttpResponse] = []
        with self._translated("look at the blocks of", path):
            # What the client makes of ids that are no text has lost their length.
            self._blob(path).get_block_list("uncommitted", answers=answers)
        told = answers[-1].content
        return [name.decode() for name in _BLOCK_NAME.findall(told.partition(b"<UncommittedBlocks>")[2])]

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
        https://learn.microsoft.com/rest/api/storageservices/put-blob. With a condition, a retry may find what the first
        attempt did, whose answer got lost: `outcome.put` tells.

        Args:
            settings: what the blob carries, of which this is a copy.
            if_etag: write only over the blob with this ETag.
            if_missing: write only if there is no such blob.
            doubt: learns whether an attempt before the last one may have been carried out.

        Raises:
            BlobChangedError: the condition does not hold.
        """
        content = ContentSettings(content_type="application/octet-stream")
        options: dict[str, Any] = {}
        if settings is not None:
            content = copy.copy(settings.content or content)
            content.content_md5 = None  # the service computes it
            options |= {"metadata": dict(settings.metadata)} if settings.metadata else {}
            options |= {"tags": dict(settings.tags)} if settings.tags else {}
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
                **options,
                **_if(if_etag),
            )
            return str(result["etag"])

    def append(self, path: str, data: bytes, at: int) -> str:
        """Append Block: add to an append blob, and return its ETag. A retry may find what the first attempt did.

        https://learn.microsoft.com/rest/api/storageservices/append-block.

        Args:
            at: only if the blob has so many bytes.

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
        """Delete a blob, with its snapshots; tell whether it was there. A folder's own blob is for `delete_folder`.

        Args:
            if_etag: delete only the blob with this ETag.
            cancel: breaks the request off.

        Raises:
            BlobChangedError: the blob's ETag is not `if_etag`.
        """
        doubt = Doubt()
        try:
            with self._translated("delete", path, doubt):
                self._blob(path).delete_blob(delete_snapshots="include", cancel=cancel, doubt=doubt, **_if(if_etag))
        except BlobNotFoundError:
            return False
        return True

    def delete_folder(self, path: str, *, if_etag: str | None = None, cancel: Cancel | None = None) -> bool:
        """Delete the blob that stands for a folder; tell whether it is gone.

        A directory stays unless it is empty. Elsewhere the blob is a mark, which goes whatever is in the folder.
        """
        try:
            with self._translated("delete the folder", path):
                # With x-ms-delete-snapshots, it would be 400 OperationNotSupportedOnDirectory for a directory.
                self._blob(path).delete_blob(cancel=cancel, **_if(if_etag))
        except BlobNotFoundError:
            return True
        except RequestRefusedError as error:
            if error.error_code == "SnapshotsPresent":  # no directory has them
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
        """Get Blob: fill `views` with the bytes from `offset` on, with one request; return the blob's ETag.

        Args:
            views: writable one-dimensional byte views, not empty altogether.
            if_etag: read only the blob with this ETag.
            moment: where its URL names a snapshot or a version of the blob, that one is read.
            cancel: breaks the request off.

        Raises:
            BlobNotFoundError: there is no such blob.
            BlobChangedError: the blob's ETag is not `if_etag`.
            RequestRefusedError: the blob ends before the range does (``status`` is 416).
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
                f"could not read {dest.size} bytes at offset {offset} of {self.location}/{path}: only {len(data)} "
                "are there; the blob is shorter than expected"
            )
            error.status = 416
            raise error
        position = 0
        for view in views:
            view[:] = data[position : position + view.nbytes]
            position += view.nbytes
        return etag

    def read(self, path: str, *, limit: int) -> tuple[bytes, str]:
        """Get Blob: the content (its first `limit` bytes) of a small blob, and its ETag.

        Raises:
            BlobNotFoundError: there is no such blob.
            CorruptCheckpointError: the bytes do not have the MD5 that was stored with them.
        """
        data, info = self.read_some(path, 0, limit)
        if info.md5 is not None and len(data) == info.size and info.md5 != md5(data):
            raise CorruptCheckpointError(
                f"{self.location}/{path} was damaged in storage or on the way: its bytes do not have the MD5 that was "
                "stored with them. Try again to rule out the way"
            )
        return data, info.etag

    def read_some(
        self, path: str, offset: int, limit: int, *, if_etag: str | None = None, moment: BlobLocation | None = None
    ) -> tuple[bytes, BlobInfo]:
        """Get Blob: at most `limit` bytes from `offset` on, none at the blob's end, and what the blob is.

        Args:
            if_etag, moment: as for `read_into`.

        Raises:
            BlobNotFoundError: there is no such blob.
            BlobChangedError: the blob's ETag is not `if_etag`.
        """
        try:
            with self._translated("read", path):
                blob = self._blob(path, moment)
                response = self._direct().get_range(blob.url, offset, limit, moment=moment, if_etag=if_etag)
                if response is not None:
                    return response.content, blob_info.of_response(path, response)
                download = blob.download_blob(offset=offset, length=limit, max_concurrency=1, **_if(if_etag))
                data, properties = download.readall(), download.properties
        except RequestRefusedError as error:
            # https://learn.microsoft.com/rest/api/storageservices/get-blob: no range fits an empty blob.
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
        """Get Blob Properties.

        Args:
            if_etag, moment, cancel: as for `read_into`.

        Raises:
            BlobNotFoundError: there is no such blob.
            BlobChangedError: the blob's ETag is not `if_etag`.
        """
        answers: list[HttpResponse] = []
        with self._translated("look at", path):
            properties = self._blob(path, moment).get_blob_properties(cancel=cancel, answers=answers, **_if(if_etag))
        return blob_info.of_properties(path, properties, answers[-1].headers)

    def tags(self, path: str) -> dict[str, str]:
        """Get Blob Tags. It takes a permission of its own, which reading the blob does not include.

        Raises:
            BlobNotFoundError: there is no such blob.
        """
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


def _if(etag: str | None) -> dict[str, Any]:
    return {} if etag is None else {"etag": etag, "match_condition": MatchConditions.IfNotModified}
