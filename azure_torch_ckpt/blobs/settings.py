"""`BlobSettings` and `CopiedSettings`: what a blob has beside its bytes, Content-Type, metadata and tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from azure.storage.blob import ContentSettings

__all__ = ["METADATA_LIMIT", "BlobSettings", "CopiedSettings"]

METADATA_LIMIT = 8 * 1024
"""Characters of all names and values of a blob's metadata."""

_PRINTABLE = re.compile(r"[ -~]+")
_METADATA_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAG = re.compile(r"[A-Za-z0-9 +./:=_-]+")


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
    metadata: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
