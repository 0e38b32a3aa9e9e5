"""`copy_blob`: a copy of one blob, which the service fetches if it can; otherwise the bytes go through this machine."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.blob_info import BLOCK_BLOB, BlobInfo, CopiedSettings
from azure_torch_ckpt.blobs.service_copy import CopySource
from azure_torch_ckpt.blobs.staging import Staging
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobChangedError,
    BlobNotFoundError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import MAX_BLOCKS
from azure_torch_ckpt.transport.buffers import Cancel, Gather

__all__ = ["MARK", "SERVICE_PART", "BlobDestination", "Fetched", "ServiceFetch", "copied_settings", "copy_blob"]

_log = logging.getLogger(__name__)

MARK = "copy_of"
"""Name of the metadata with the blob or file of which a blob is a copy."""
SERVICE_PART = 64 << 20
"""Bytes that the service fetches for one request. Put Block From URL allows 4,000 MiB; smaller ranges are fetched in
parallel, and end before the idle connection counts as dead."""
# Limit of Copy Blob From URL: https://learn.microsoft.com/rest/api/storageservices/copy-blob-from-url
_LARGEST_WHOLE = 256 << 20


class BlobDestination:
    """The destination of a copy: a blob that gets blocks, in any order and from any thread, or that the service
    makes."""

    def __init__(self, store: BlobStore, path: str) -> None:
        self._store = store
        self._path = path
        self._staging = Staging(store, path)
        self._lock = threading.Lock()
        self._blocks: dict[int, int] = {}  # numbers by the blocks' offsets
        self._made = False

    def write(self, offset: int, block: memoryview, crc64: int, cancel: Cancel) -> None:
        """Stage a block that starts at `offset`, also after the service has made the blob."""
        self._made = False
        self._staging.stage(self._number(offset), Gather([block]), crc64, cancel)

    def stage_from(self, source: CopySource, offset: int, length: int, cancel: Cancel) -> int | None:
        """Have the service stage a block; return its CRC64, if the service sends it."""
        return self._staging.stage_from(self._number(offset), source, offset, length, cancel)

    def copy_from(self, source: CopySource, metadata: Mapping[str, str] | None, cancel: Cancel) -> int | None:
        """Have the service make the whole blob, visible at once; return its CRC64, if the service sends it."""
        checksum = self._store.copy(self._path, source, metadata, cancel=cancel)
        self._made = True
        return checksum

    def commit(self, source: BlobInfo, settings: CopiedSettings, *, strict: bool = False) -> None:
        """Make the blob visible. All blocks must be staged.

        Args:
            strict: raise `AccessDeniedError` if this credential may write blobs, but not tags. Otherwise the blob gets
                none, and a warning says so.
        """
        if self._made:
            return
        ids = self._staging.ids(number for _, number in sorted(self._blocks.items()))
        try:
            self._store.commit_blocks(self._path, ids, settings)
        except AccessDeniedError as error:
            if strict or not settings.tags:
                raise
            self._store.commit_blocks(self._path, ids, dataclasses.replace(settings, tags={}))
            _log.warning("%s/%s is without the index tags of its source: %s", self._store.location, self._path, error)

    def abandon(self) -> None:
        """Do nothing: the service removes uncommitted blocks after a week."""

    def _number(self, offset: int) -> int:
        with self._lock:
            return self._blocks.setdefault(offset, len(self._blocks))


@dataclass(frozen=True, slots=True)
class Fetched:
    """The service has fetched a range. It may have sent the range's CRC64-NVME."""

    crc64: int | None


class ServiceFetch:
    """Copies from one store that the service makes itself, until it turns out that it cannot.

    Attributes:
        store: of the sources.
        possible: False once the service has refused.
    """

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self.possible = True

    def try_to(
        self,
        destination: BlobDestination,
        source: BlobInfo,
        offset: int,
        length: int,
        settings: CopiedSettings | None,
        cancel: Cancel,
    ) -> Fetched | None:
        """Have the service fetch a block, or the whole blob; None if the bytes have to go through this machine.

        Args:
            source: a blob in `store`.
            settings: of the whole blob, which the service makes at once if it can; None stages a block.

        Raises:
            BlobChangedError: the source has another ETag.
            ServiceUnavailableError: the service cannot be reached.
        """
        if not self.possible or not length:  # an empty blob has no range
            return None
        try:
            access = self.store.copy_source(source.path, source.etag)
            # Copy Blob From URL takes block blobs only. With tags, a refusal would not say what is refused.
            if settings is None or settings.tags or source.kind != BLOCK_BLOB:
                return Fetched(destination.stage_from(access, offset, length, cancel))
            # Without any metadata, the service uses the source's, which is the same.
            return Fetched(destination.copy_from(access, settings.metadata or None, cancel))
        except (BlobChangedError, ServiceUnavailableError):
            raise
        except StoreError as error:
            # The service cannot read the source (a firewall, another cloud), or does not know the request (the
            # emulator). Any other error is one of this blob: reading it through this machine raises the same, with a
            # better message.
            of_this_blob = isinstance(error, BlobNotFoundError) or error.status in (409, 412)
            if self.possible and not of_this_blob:
                self.possible = False
                where = self.store.location
                _log.info("the service cannot fetch from %s (%s); the data goes through this machine", where, error)
            return None


def copied_settings(store: BlobStore, blob: BlobInfo, *, strict: bool) -> CopiedSettings:
    """Return what a copy of a blob gets beside its bytes: content settings, metadata and index tags.

    Args:
        store: of the blob.
        strict: the blob is removed once it is copied, so nothing may be lost. Otherwise the copy lacks tags that this
            credential may not read, with a warning.

    Raises:
        BlobNotFoundError, BlobChangedError: the blob was removed or replaced.
        AccessDeniedError: `strict`, and its tags may not be read.
    """
    if blob.content is None or blob.tag_count is None:  # it is from a listing, which has less
        blob = dataclasses.replace(store.stat(blob.path, if_etag=blob.etag), path=blob.path)
    tags: dict[str, str] = {}
    if blob.tag_count:
        try:
            tags = store.tags(blob.path)
        except AccessDeniedError as error:
            if strict:
                raise AccessDeniedError(
                    f"{store.location}/{blob.path} was not moved: it has {blob.tag_count} index tags, which this "
                    "credential may not read (a SAS needs the permission t, an identity the role Storage Blob Data "
                    "Owner), and they would be lost. If that is acceptable, copy it and remove the source"
                ) from error
            _log.warning("the copy of %s/%s is without its index tags: %s", store.location, blob.path, error)
    return CopiedSettings(blob.content, dict(blob.metadata or {}), tags)


def copy_blob(
    source: BlobStore,
    source_location: BlobLocation,
    destination: BlobStore,
    destination_location: BlobLocation,
    *,
    strict: bool = False,
) -> BlobInfo:
    """Copy one blob to a new name, or over another blob. The copy appears when it is complete, and not before.

    Content settings, metadata and tags are copied (`copied_settings`). The access tier (the copy gets the default of
    its account), leases, snapshots and policies are not. The copy is a block blob. Returns the source that was copied,
    with its ETag.

    Args:
        strict: raise an error rather than lose a tag.

    Raises:
        BlobNotFoundError: the source does not exist.
        BlobChangedError: the source was replaced meanwhile; the destination was left alone.
        AccessDeniedError: `strict`, and the credential may not read or not write the tags.
        StoreError: the service could not be reached, or refused.
    """
    info = source.stat(source_location.path)
    settings = copied_settings(source, info, strict=strict)
    fetch, new, cancel = ServiceFetch(source), BlobDestination(destination, destination_location.path), Cancel()
    least = -(-info.size // MAX_BLOCKS)
    block_size = max(destination.options.part_size(info.size), least)

    def move(offset: int, length: int) -> None:
        if fetch.try_to(new, info, offset, length, None, cancel) is not None:
            return
        for start in range(offset, offset + length, block_size):
            block = memoryview(bytearray(min(block_size, offset + length - start)))
            source.read_into(info.path, start, [block], if_etag=info.etag, cancel=cancel)
            new.write(start, block, crc64(block), cancel)

    if info.size > _LARGEST_WHOLE or fetch.try_to(new, info, 0, info.size, settings, cancel) is None:
        step = max(SERVICE_PART, least) if fetch.possible else block_size
        run_all(
            (functools.partial(move, start, min(step, info.size - start)) for start in range(0, info.size, step)),
            destination.options.concurrency,
            "blob-copy",
            cancel.cancel,
        )
    new.commit(info, settings, strict=strict)
    return info
