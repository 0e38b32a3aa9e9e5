"""What a blob has beside its bytes: `BlobInfo`, which the service reports; `BlobSettings` and `CopiedSettings`, which a
writer stores."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from azure.core.rest import HttpResponse
from azure.storage.blob import BlobProperties, ContentSettings

__all__ = [
    "APPEND_BLOB",
    "BLOCK_BLOB",
    "LEASED",
    "METADATA_LIMIT",
    "BlobInfo",
    "BlobSettings",
    "CopiedSettings",
    "of_properties",
    "of_response",
    "quoted_etag",
    "whole_size",
]

_META = "x-ms-meta-"  # the prefix of a blob's own metadata among the headers
_RESOURCE_TYPE: Final = "x-ms-resource-type"
# Metadata of the empty blobs that are the directories of accounts with a hierarchical namespace. azcopy, blobfuse and
# others write such blobs in other accounts, too: https://learn.microsoft.com/azure/storage/blobs/storage-blobs-list#azure-data-lake-storage
_FOLDER_MARK: Final = "hdi_isfolder"

BLOCK_BLOB = "BlockBlob"
"""The kind of blob that this package writes."""
APPEND_BLOB = "AppendBlob"
"""The kind of blob that grows block by block, each of which is visible at once."""
LEASED = "locked"
"""The status of an active lease: https://learn.microsoft.com/rest/api/storageservices/lease-blob."""
METADATA_LIMIT = 8 * 1024
"""Characters of all names and values of a blob's metadata."""

_PRINTABLE = re.compile(r"[ -~]+")
_METADATA_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAG = re.compile(r"[A-Za-z0-9 +./:=_-]+")


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """The properties of a blob, from a listing or a HEAD request.

    Attributes:
        path: the blob's name in its container.
        size: bytes.
        etag: changes with every write.
        last_modified: with time zone.
        md5: of the content, if it was stored with the blob, as `BlobStore.put` does.
        metadata: names and values that were stored with the blob; None without any, or if the listing did not request
            them.
        created: with time zone; None if the service does not send it.
        content: Content-Type and similar headers, as attributes and by name (``content["content_type"]``); None if the
            request did not ask for it.
        tag_count: number of index tags; None if the request did not ask for it.
        kind: ``"BlockBlob"``, ``"AppendBlob"`` or ``"PageBlob"``.
        resource_type: ``"directory"`` or ``"file"`` in an account with a hierarchical namespace, else None.
        leased: whether a lease protects it from deletion; False if the answer did not say.
    """

    path: str
    size: int
    etag: str
    last_modified: datetime.datetime
    md5: bytes | None = None
    metadata: Mapping[str, str] | None = dataclasses.field(default=None, hash=False)
    created: datetime.datetime | None = None
    content: ContentSettings | None = dataclasses.field(default=None, compare=False)
    tag_count: int | None = dataclasses.field(default=None, compare=False)
    kind: str = dataclasses.field(default=BLOCK_BLOB, compare=False)
    resource_type: str | None = dataclasses.field(default=None, compare=False)
    leased: bool = dataclasses.field(default=False, compare=False)

    @property
    def is_folder(self) -> bool:
        """Whether this represents a folder and holds no data: a directory, or an empty blob that marks a folder.

        A mark has ``hdi_isfolder`` (in any case) in its metadata, or a name that ends in "/".
        """
        if self.resource_type == "directory":
            return True
        if self.size:
            return False
        return self.path.endswith("/") or any(
            name.lower() == _FOLDER_MARK and value.lower() == "true" for name, value in (self.metadata or {}).items()
        )


def quoted_etag(etag: str) -> str:
    """Return the ETag with quotes: a listing omits them, and RFC 9110 requires them in a condition."""
    return etag if etag.startswith('"') else f'"{etag}"'


def of_properties(path: str, properties: BlobProperties, headers: Mapping[str, str] | None = None) -> BlobInfo:
    """Make a `BlobInfo` of the SDK's properties, and of the headers that the SDK leaves out."""
    stored_md5 = properties.content_settings.content_md5
    return BlobInfo(
        path,
        int(properties.size),
        quoted_etag(str(properties.etag)),
        properties.last_modified,
        None if stored_md5 is None else bytes(stored_md5),
        dict(properties.metadata) if properties.metadata else None,
        properties.creation_time,
        properties.content_settings,
        int(properties.tag_count or 0),
        str(getattr(properties.blob_type, "value", properties.blob_type) or BLOCK_BLOB),
        (headers or {}).get(_RESOURCE_TYPE),
        properties.lease.status == LEASED,
    )


def of_response(path: str, response: HttpResponse) -> BlobInfo:
    """Make a `BlobInfo` of the headers of Get Blob: https://learn.microsoft.com/rest/api/storageservices/get-blob#response."""
    headers = response.headers
    content_range = headers.get("Content-Range")
    # In the answer to a range, Content-MD5 is that of the range.
    stored_md5 = headers.get("Content-MD5" if content_range is None else "x-ms-blob-content-md5")
    created = headers.get("x-ms-creation-time")
    named = {name[len(_META) :]: value for name, value in headers.items() if name.lower().startswith(_META)}
    return BlobInfo(
        path,
        whole_size(content_range, response.content),
        headers["ETag"],
        email.utils.parsedate_to_datetime(headers["Last-Modified"]),
        None if stored_md5 is None else base64.b64decode(stored_md5),
        named or None,
        None if created is None else email.utils.parsedate_to_datetime(created),
        kind=headers.get("x-ms-blob-type", BLOCK_BLOB),
        resource_type=headers.get(_RESOURCE_TYPE),
    )


def whole_size(content_range: str | None, data: bytes) -> int:
    """Return the size of the blob, from "bytes 0-9/100"; the Content-Length is the size of the range."""
    return len(data) if content_range is None else int(content_range.rpartition("/")[2])


@dataclass(frozen=True, slots=True)
class BlobSettings:
    """What a blob has beside its bytes. None omits it; Content-Type is then ``application/octet-stream``.

    Attributes:
        content_type: the header Content-Type that readers get.
        metadata: names (C# identifiers) and values (printable ASCII), 8 KiB in all.
        tags: at most 10, with keys of 1 to 128 and values of up to 256 characters: ASCII letters and digits, space,
            and ``+ - . / : = _``.

    The rules are those of https://learn.microsoft.com/rest/api/storageservices/naming-and-referencing-containers--blobs--and-metadata
    and https://learn.microsoft.com/rest/api/storageservices/set-blob-tags. They are checked here, because the
    service checks them only after the upload of all bytes.

    Raises:
        ValueError: a rule is broken.
    """

    content_type: str | None = None
    metadata: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.content_type is not None and not _PRINTABLE.fullmatch(self.content_type):
            raise ValueError(f"content_type must be printable ASCII, not {self.content_type!r}")
        metadata, tags = self.metadata or {}, self.tags or {}
        for name, value in metadata.items():
            if not _METADATA_NAME.fullmatch(name) or not _PRINTABLE.fullmatch(value):
                raise ValueError(
                    f"metadata {name!r}: {value!r}: a name is an identifier of ASCII letters, digits and _, "
                    "and a value printable ASCII"
                )
        if sum(len(name) + len(value) for name, value in metadata.items()) > METADATA_LIMIT:
            raise ValueError("all metadata together must not be larger than 8 KiB")
        if len(tags) > 10:
            raise ValueError(f"a blob has at most 10 tags, not {len(tags)}")
        for key, value in tags.items():
            if not _TAG.fullmatch(key) or not _TAG.fullmatch(value or " ") or len(key) > 128 or len(value) > 256:
                raise ValueError(
                    f"tag {key!r}: {value!r}: 1 to 128 characters and up to 256, which are ASCII letters, digits, "
                    "spaces and + - . / : = _"
                )


@dataclass(frozen=True, slots=True)
class CopiedSettings:
    """What a copy has beside its bytes: the same as its source, as the service sent it and unchecked.

    Attributes:
        content: Content-Type and similar headers; None for the service's defaults.
        metadata: names and values.
        tags: keys and values.
    """

    content: ContentSettings | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
