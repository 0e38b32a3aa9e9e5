"""Blob Storage as the rest of this package sees it: the one door to azure-storage-blob."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import email.utils
import logging
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from azure.core import MatchConditions
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError
from azure.storage.blob import BlobBlock, BlobClient, BlobPrefix, BlobProperties, ContainerClient, ContentSettings

from azure_torch_ckpt.bodies import Cancel, Gather, Scatter
from azure_torch_ckpt.checksums import header_value, md5
from azure_torch_ckpt.credentials import Credential, PickledCredential, resolve
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobChangedError,
    BlobNotFoundError,
    ContainerNotFoundError,
    RequestRefusedError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.pressure import Pressure
from azure_torch_ckpt.retry import DAMAGED, HEALING_STATUS, NOT_SUPPORTED, RetryPolicy
from azure_torch_ckpt.settings import BlobSettings
from azure_torch_ckpt.transport import GatherTransport

__all__ = ["BlobInfo", "BlobStore"]

_log = logging.getLogger(__name__)

# Larger than any blob (about 190.7 TiB), so that the SDK sends one request for one call of ours.
_ONE_REQUEST = 1 << 48


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What a listing or a HEAD request tells about a blob.

    Attributes:
        path: the blob's name in its container.
        size: bytes.
        etag: changes with every write.
        last_modified: with time zone.
        md5: of the content, if it was stored with the blob: `BlobStore.put` does.
    """

    path: str
    size: int
    etag: str
    last_modified: datetime.datetime
    md5: bytes | None = None


class BlobStore:
    """One container: small verbs on blobs, with this package's errors and retries.

    Thread-safe; usable after a fork; picklable (the connections are made lazily, in each process). A pickle holds the
    credential that was given, for it could not be used otherwise.

    Args:
        location: names the account and the container; its path plays no role here.
        credential: see `azure_torch_ckpt.credentials`.
        ca_file: PEM file with further certificates to trust (an endpoint with a private CA, the emulator's TLS).

    Raises (all methods): `ContainerNotFoundError`, `AccessDeniedError`, `ServiceUnavailableError`,
        `RequestRefusedError`, and what each method names.
    """

    def __init__(
        self,
        location: BlobLocation,
        credential: Credential = None,
        *,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
    ) -> None:
        self.location = location.container_root()
        self.options = options or TransferOptions()
        self._credential = credential
        self._ca_file = ca_file
        self._client: ContainerClient | None = None
        self._transport = GatherTransport(ca_file=ca_file)
        self._pressure = Pressure()
        self._crc64_accepted = True
        # Refuses what cannot be used now, not in a worker thread later.
        resolve(location, credential)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "location": self.location,
            "options": self.options,
            "credential": PickledCredential.of(self._credential),
            "ca_file": self._ca_file,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            state["location"], state["credential"].restore(), options=state["options"], ca_file=state["ca_file"]
        )

    def __repr__(self) -> str:
        return f"BlobStore({str(self.location)!r})"

    def moved_to(self, location: BlobLocation) -> tuple[BlobLocation, BlobStore]:
        """A store for `location` with the same credential and options: this one if it serves that container already.

        The SAS of this store's URL goes along within its container. Returns the location, with the SAS where it has
        one now, and the store.
        """
        if location.sas is None and location.without_sas().container_root() == self.location.without_sas():
            location = dataclasses.replace(location, sas=self.location.sas)
        if location.container_root() == self.location:
            return location, self
        return location, BlobStore(location, self._credential, options=self.options, ca_file=self._ca_file)

    def _container(self) -> ContainerClient:
        # Without a lock, for a fork might copy it held: two threads that come first make a client each, and one stays.
        client = self._client
        if client is None:
            self._client = client = ContainerClient(
                self.location.endpoint,
                self.location.container,
                credential=resolve(self.location, self._credential),
                transport=self._transport,
                retry_policy=RetryPolicy(self.options.retry_seconds, self._pressure),
                max_single_get_size=_ONE_REQUEST,
                max_single_put_size=_ONE_REQUEST,
            )
        return client

    def _blob(self, path: str, moment: BlobLocation | None = None) -> BlobClient:
        if moment is None:
            return self._container().get_blob_client(path)
        # The declared type of `snapshot` forgets None, which is its default.
        return self._container().get_blob_client(path, moment.snapshot or "", version_id=moment.version_id)

    def close(self) -> None:
        """Close the idle connections. The store can be used again; it makes new ones."""
        self._transport.close()

    # Writing

    def stage_block(
        self, path: str, block_id: str, body: Gather, crc64: int | None = None, *, cancel: Cancel | None = None
    ) -> None:
        """Put Block: store a part of a blob, invisible until `commit_blocks` names it.

        Uncommitted blocks vanish after a week (https://learn.microsoft.com/rest/api/storageservices/put-block).

        Args:
            block_id: all ids of a blob must have the same length, 64 bytes at most.
            crc64: CRC64-NVME of the body. The service refuses a body that arrives with another one, and it is sent
                again. An endpoint that does not know this check (Azurite without ``--loose``) goes without it; a
                warning says so, once.
            cancel: breaks the request off.
        """
        headers = {"x-ms-content-crc64": header_value(crc64)} if crc64 is not None and self._crc64_accepted else {}
        try:
            with self._translated("write a block of", path):
                self._blob(path).stage_block(
                    block_id,
                    body,  # type: ignore[arg-type]
                    len(body),
                    headers=headers,
                    cancel=cancel,
                )
        except RequestRefusedError as error:
            if not headers or (error.status != 501 and error.error_code != NOT_SUPPORTED):
                raise
            if self._crc64_accepted:
                self._crc64_accepted = False
                _log.warning(
                    "%s does not check CRC64 on arrival; blocks are sent without it from now on. What is stored "
                    "is still compared when it is loaded",
                    self.location.endpoint,
                )
            self.stage_block(path, block_id, body, cancel=cancel)

    def commit_blocks(
        self,
        path: str,
        block_ids: Sequence[str],
        settings: BlobSettings | None = None,
        *,
        if_etag: str | None = None,
        if_missing: bool = False,
    ) -> str:
        """Put Block List: make the blob `path` of staged blocks, replacing what was there, and return its ETag.

        Safe to repeat without a condition. With one, a retry may find what the first attempt did, whose answer got
        lost: `committed_blocks` tells.

        Args:
            block_ids: without any, the blob is empty.
            if_etag: write only over the blob with this ETag.
            if_missing: write only if there is no such blob.

        Raises:
            BlobChangedError: the condition does not hold.
        """
        settings = settings or BlobSettings()
        options: dict[str, Any] = {}
        if settings.content_type is not None:
            options["content_settings"] = ContentSettings(content_type=settings.content_type)
        if settings.metadata:
            options["metadata"] = dict(settings.metadata)
        if settings.tags:
            options["tags"] = dict(settings.tags)
        options |= {"match_condition": MatchConditions.IfMissing} if if_missing else _if(if_etag)
        with self._translated("commit", path):
            result = self._blob(path).commit_block_list([BlobBlock(block_id) for block_id in block_ids], **options)
            return str(result["etag"])

    def committed_blocks(self, path: str) -> list[str]:
        """Get Block List: the ids of the blocks that the blob consists of, in their order.

        Raises:
            BlobNotFoundError: there is no such blob.
        """
        with self._translated("look at the blocks of", path):
            return [str(block.id) for block in self._blob(path).get_block_list("committed")[0]]

    def put(self, path: str, data: bytes, *, if_etag: str | None = None, if_missing: bool = False) -> str:
        """Put Blob: write a whole blob with one request, and return its ETag.

        The service checks the content's MD5 on arrival and keeps it (`BlobInfo.md5`):
        https://learn.microsoft.com/rest/api/storageservices/put-blob.

        Args:
            if_etag: write only over the blob with this ETag.
            if_missing: write only if there is no such blob.

        Raises:
            BlobChangedError: the condition does not hold.
        """
        with self._translated("write", path):
            result = self._blob(path).upload_blob(
                data,
                length=len(data),
                max_concurrency=1,
                content_settings=ContentSettings(content_type="application/octet-stream"),
                headers={"Content-MD5": base64.b64encode(md5(data)).decode()},
                overwrite=not if_missing,
                **_if(if_etag),
            )
            return str(result["etag"])

    def delete(self, path: str, *, if_etag: str | None = None, cancel: Cancel | None = None) -> bool:
        """Delete a blob; tell whether it was there.

        Args:
            if_etag: delete only the blob with this ETag.
            cancel: breaks the request off.

        Raises:
            BlobChangedError: the blob's ETag is not `if_etag`.
        """
        try:
            with self._translated("delete", path):
                self._blob(path).delete_blob(delete_snapshots="include", cancel=cancel, **_if(if_etag))
        except BlobNotFoundError:
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
            download = self._blob(path, moment).download_blob(
                offset=offset, length=dest.size, max_concurrency=1, dest=dest, cancel=cancel, **_if(if_etag)
            )
            etag = str(download.properties.etag)
            if dest.received:
                return etag
            data = download.readall()
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
        """
        data, info = self.read_some(path, 0, limit)
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
                download = self._blob(path, moment).download_blob(
                    offset=offset, length=limit, max_concurrency=1, **_if(if_etag)
                )
                data, properties = download.readall(), download.properties
        except RequestRefusedError as error:
            # https://learn.microsoft.com/rest/api/storageservices/get-blob: no range fits an empty blob.
            if error.status != 416:
                raise
            return b"", self.stat(path, if_etag=if_etag, moment=moment)
        # "bytes 0-9/100"; the size that the SDK gives is the range's.
        size = int(str(properties.content_range).rpartition("/")[2]) if properties.content_range else len(data)
        return data, dataclasses.replace(_info(path, properties), size=size)

    def stat(self, path: str, *, if_etag: str | None = None, moment: BlobLocation | None = None) -> BlobInfo:
        """Get Blob Properties.

        Args:
            if_etag, moment: as for `read_into`.

        Raises:
            BlobNotFoundError: there is no such blob.
            BlobChangedError: the blob's ETag is not `if_etag`.
        """
        with self._translated("look at", path):
            properties = self._blob(path, moment).get_blob_properties(**_if(if_etag))
        return _info(path, properties)

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        """List Blobs: all blobs whose names start with `prefix`, in the order of their names, 5,000 to a request."""
        with self._translated("list", prefix):
            for properties in self._container().list_blobs(name_starts_with=prefix):
                yield _info(properties.name, properties)

    def list_folder(self, prefix: str) -> Iterator[BlobInfo | str]:
        """List Blobs with the delimiter "/": blobs right under `prefix`, and sub-prefixes (str, ending in "/")."""
        with self._translated("list", prefix):
            for entry in self._container().walk_blobs(name_starts_with=prefix, delimiter="/"):
                yield entry.name if isinstance(entry, BlobPrefix) else _info(entry.name, entry)

    def now(self) -> datetime.datetime:
        """The time by the service's clock, which is the one that `BlobInfo.last_modified` goes by."""
        dates: list[str | None] = []  # of failed attempts, too, which somebody on the way may have answered
        with self._translated("list", ""):
            pages = self._container().list_blobs(
                results_per_page=1,
                raw_response_hook=lambda response: dates.append(response.http_response.headers.get("Date")),
            )
            next(pages.by_page(), None)
        if dates[-1] is None:
            raise RequestRefusedError(f"could not learn the time: {self.location.endpoint} sends no Date header")
        return email.utils.parsedate_to_datetime(dates[-1])

    def create_container(self) -> None:
        """Create the container, unless it exists."""
        try:
            with self._translated("create the container of", ""):
                self._container().create_container()
        except RequestRefusedError as error:
            if error.error_code != "ContainerAlreadyExists":
                raise

    # Errors

    @contextlib.contextmanager
    def _translated(self, doing: str, path: str) -> Iterator[None]:
        try:
            yield
        except AzureError as error:
            where = f"{self.location}/{path}" if path else str(self.location)
            raise _translate(error, f"could not {doing} {where}", self.location) from error


def _if(etag: str | None) -> dict[str, Any]:
    return {} if etag is None else {"etag": etag, "match_condition": MatchConditions.IfNotModified}


def _info(path: str, properties: BlobProperties) -> BlobInfo:
    # A listing gives the ETag without the quotes that a response header has; RFC 9110 wants them in a condition.
    etag = str(properties.etag)
    if not etag.startswith('"'):
        etag = f'"{etag}"'
    stored_md5 = properties.content_settings.content_md5
    return BlobInfo(
        path, int(properties.size), etag, properties.last_modified, None if stored_md5 is None else bytes(stored_md5)
    )


def _translate(error: AzureError, failed: str, location: BlobLocation) -> StoreError:
    # The base class that the SDK declares lacks the headers that every response has.
    response: Any = error.response if isinstance(error, HttpResponseError) else None
    if response is None:
        result: StoreError
        if isinstance(error, ClientAuthenticationError):
            result = AccessDeniedError(
                f"{failed}: no token or signature could be made ({_first_line(error)}). Log in (az login), give the "
                "machine a managed identity, or pass credential="
            )
        elif isinstance(error.inner_exception, ssl.SSLCertVerificationError):
            result = ServiceUnavailableError(
                f"{failed}: {location.endpoint} does not prove who it is ({_first_line(error)}). Check the URL; if the "
                "certificate is from an authority of your own, pass its PEM file as ca_file="
            )
        else:
            result = ServiceUnavailableError(
                f"{failed}: no answer ({_first_line(error)}). Check that the endpoint {location.endpoint} is right and "
                "can be reached from here"
            )
        return result
    status = int(response.status_code or 0)
    code = response.headers.get("x-ms-error-code") or getattr(error, "error_code", None)
    said = f"{failed}: {status} {code or response.reason}"
    result = _by_status(status, str(code or ""), said, location)
    result.status = status
    result.error_code = None if code is None else str(code)
    return result


def _by_status(status: int, code: str, said: str, location: BlobLocation) -> StoreError:
    if status in (401, 403) or code == "InvalidAuthenticationInfo":  # the latter may come as 400
        return AccessDeniedError(
            f"{said}. Check that the credential is meant for account {location.account!r}, has not expired and allows "
            "this (role Storage Blob Data Contributor, or a SAS with read, write, delete and list), and that the "
            "account's firewall lets this machine in"
        )
    if status == 404:
        if code.startswith("Container") or code == "ResourceNotFound":
            return ContainerNotFoundError(
                f"{said}. Create the container {location.container!r} in account {location.account!r}, or correct the "
                "URL"
            )
        return BlobNotFoundError(said)
    if (status == 409 and code == "BlobAlreadyExists") or (status == 412 and not code.startswith("Lease")):
        return BlobChangedError(said)
    if status in HEALING_STATUS and code != NOT_SUPPORTED:
        return ServiceUnavailableError(f"{said}, also after retries. The service is busy or down; try again later")
    if code in DAMAGED:
        return RequestRefusedError(
            f"{said}, also after retries: what arrived is not what was checksummed. Something on the way damages it, "
            "or the tensors changed while they were being saved; leave them alone until the save has returned"
        )
    return RequestRefusedError(said)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
