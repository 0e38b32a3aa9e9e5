"""The bytes of a blob on their way to another one: fetched by the service where it can, else through this machine."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from dataclasses import dataclass

from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.blob_info import BLOCK_BLOB
from azure_torch_ckpt.blobs.settings import CopiedSettings
from azure_torch_ckpt.blobs.staging import Staging
from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
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

__all__ = ["MARK", "SERVICE_PART", "BlobSink", "Fetched", "ServiceFetch", "copied_settings", "copy_blob"]

_log = logging.getLogger(__name__)

MARK = "copy_of"
"""Name of the metadata that tells of which blob or file a blob is a copy."""
SERVICE_PART = 64 << 20
"""Bytes that the service fetches for one request. It could be 4,000 MiB (Put Block From URL); smaller parts are fetched
in parallel, and end before the idle connection is taken for dead."""
# Of Copy Blob From URL: https://learn.microsoft.com/rest/api/storageservices/copy-blob-from-url
_LARGEST_WHOLE = 256 << 20


class BlobSink:
    """A blob that is written as blocks, in any order and from any threads, or made by the service."""

    def __init__(self, store: BlobStore, path: str) -> None:
        self._store = store
        self._path = path
        self._staging = Staging(store, path)
        self._lock = threading.Lock()
        self._blocks: dict[int, int] = {}  # numbers by the blocks' offsets
        self._made = False

    def write(self, offset: int, part: memoryview, crc64: int, cancel: Cancel) -> None:
        """Stage the part that starts at `offset`, in place of what the service has made."""
        self._made = False
        self._staging.stage(self._number(offset), Gather([part]), crc64, cancel)

    def fetch(
        self,
        fetch: ServiceFetch,
        source: BlobInfo,
        offset: int,
        length: int,
        settings: CopiedSettings | None,
        cancel: Cancel,
    ) -> int | None:
        """Have the service fetch a part, or the whole, which is visible at once; return its CRC64 if the service tells.

        Args:
            source: its path is that in the container of `fetch`.
            settings: of the whole, which becomes a blob at once if it can; None stages a part.
        """
        access = fetch.store.copy_source(source.path, source.etag)
        # Copy Blob From URL takes block blobs only, and with tags a refusal would not tell what is refused.
        if settings is None or settings.tags or source.kind != BLOCK_BLOB:
            return self._staging.stage_from(self._number(offset), access, offset, length, cancel)
        # Without any metadata, the service would take that of the source, which is the same.
        told = self._store.copy(self._path, access, settings.metadata or None, cancel=cancel)
        self._made = True
        return told

    def commit(self, source: BlobInfo, settings: CopiedSettings, *, strict: bool = False) -> None:
        """All parts are there: make the blob visible.

        Args:
            strict: raise `AccessDeniedError` where this credential may write blobs, but no tags. Otherwise the blob has
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
        """Nothing is left: blocks that nobody commits vanish after a week."""

    def _number(self, offset: int) -> int:
        with self._lock:
            return self._blocks.setdefault(offset, len(self._blocks))


@dataclass(frozen=True, slots=True)
class Fetched:
    """A part that the service has fetched, and its CRC64-NVME if it told."""

    crc64: int | None


class ServiceFetch:
    """The service's own way from one store to others, until it turns out that there is none.

    Attributes:
        store: of the sources.
        possible: whether the service is still asked.
    """

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self.possible = True

    def try_to(
        self,
        sink: BlobSink,
        source: BlobInfo,
        offset: int,
        length: int,
        settings: CopiedSettings | None,
        cancel: Cancel,
    ) -> Fetched | None:
        """`BlobSink.fetch`, or None: then the bytes have to go through this machine.

        Raises:
            BlobChangedError: the source has another ETag.
            ServiceUnavailableError: the service cannot be reached.
        """
        if not self.possible or not length:  # there is no range in an empty blob
            return None
        try:
            return Fetched(sink.fetch(self, source, offset, length, settings, cancel))
        except (BlobChangedError, ServiceUnavailableError):
            raise
        except StoreError as error:
            # It cannot get at the source (a firewall, another cloud), or does not know the request (the emulator). If
            # it is neither, the way through here will meet the same error, and say so better; then it is a matter of
            # this one blob.
            of_this_blob = isinstance(error, BlobNotFoundError) or error.status in (409, 412)
            if self.possible and not of_this_blob:
                self.possible = False
                where = self.store.location
                _log.info("the service cannot fetch from %s (%s); the data goes through here", where, error)
            return None


def copied_settings(store: BlobStore, blob: BlobInfo, *, strict: bool) -> CopiedSettings:
    """What a copy of a blob carries beside its bytes: its content settings, metadata and index tags.

    Args:
        store: of the blob.
        strict: the blob goes once it is copied, so nothing may be left behind. Otherwise tags that this credential may
            not read are, with a warning.

    Raises:
        BlobNotFoundError, BlobChangedError: the blob was removed or replaced.
        AccessDeniedError: `strict`, and its tags may not be read.
    """
    if blob.content is None or blob.tag_count is None:  # it comes from a listing that told less
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
                    "Owner), and they would be lost. Copy it and remove the source if they may be"
                ) from error
            _log.warning("the copy of %s/%s is without its index tags: %s", store.location, blob.path, error)
    return CopiedSettings(blob.content, dict(blob.metadata or {}), tags)


def copy_blob(
    source: BlobStore,
    source_location: BlobLocation,
    target: BlobStore,
    target_location: BlobLocation,
    *,
    strict: bool = False,
) -> BlobInfo:
    """Copy one blob over another, or to where there is none. The copy appears when it is complete, and not before.

    Its content settings, metadata and tags go along (`copied_settings`). What it costs to keep does not (the access
    tier is the target account's default), nor do leases, snapshots and policies; the copy is a block blob. Returns what
    was copied: the source, with its ETag.

    Args:
        strict: nothing that belongs to the blob may be left behind.

    Raises:
        BlobNotFoundError: there is no source.
        BlobChangedError: the source was replaced meanwhile; the target was left alone.
        AccessDeniedError: `strict`, and the tags may not be read, or not be written.
        StoreError: the service could not be asked, or refused.
    """
    info = source.stat(source_location.path)
    settings = copied_settings(source, info, strict=strict)
    fetch, sink, cancel = ServiceFetch(source), BlobSink(target, target_location.path), Cancel()
    least = -(-info.size // MAX_BLOCKS)
    piece = max(target.options.part_size(info.size), least)

    def move(offset: int, length: int) -> None:
        if fetch.try_to(sink, info, offset, length, None, cancel) is not None:
            return
        for start in range(offset, offset + length, piece):
            part = memoryview(bytearray(min(piece, offset + length - start)))
            source.read_into(info.path, start, [part], if_etag=info.etag, cancel=cancel)
            sink.write(start, part, crc64(part), cancel)

    if info.size > _LARGEST_WHOLE or fetch.try_to(sink, info, 0, info.size, settings, cancel) is None:
        step = max(SERVICE_PART, least) if fetch.possible else piece
        run_all(
            (functools.partial(move, start, min(step, info.size - start)) for start in range(0, info.size, step)),
            target.options.concurrency,
            "blob-copy",
            cancel.cancel,
        )
    sink.commit(info, settings, strict=strict)
    return info
