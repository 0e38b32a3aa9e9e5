"""Conditional writes and deletions, and the outcome of one whose answer was lost.

A request may be carried out without an answer that says so: the connection breaks, the service answers 500, a proxy
repeats it. The next attempt then finds its condition broken by the first one. So an answer that says "the condition
does not hold" (412, 409, 404) does not prove that another client broke it. The blob itself does. Every commit with a
condition calls a function of this module, and its caller deletes nothing unless the outcome is proven.

| outcome | means | so the caller |
|---|---|---|
| an exception | the service refused every attempt; nothing was carried out | may continue as if it had not asked |
| `DONE` | carried out: the answer says so, or the blob has the data of the write (is gone) | may remove the old data |
| `LOST` | the blob is intact and has other data, or was removed | may remove its own data |
| `UNKNOWN` | neither is proven; the blob is the old or the new one | removes nothing |
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from azure.storage.blob import ContentSettings

from azure_torch_ckpt._internal.checksums import md5
from azure_torch_ckpt.blobs.blob_info import BlobSettings, CopiedSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.upload import Upload
from azure_torch_ckpt.errors import (
    BlobChangedError,
    BlobNotFoundError,
    CommitUnknownError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.transport.buffers import Cancel, Doubt

__all__ = ["Outcome", "Result", "commit_blocks", "delete", "put"]

_LIMIT = 4 << 30  # bytes of a blob that is read back: no metadata is larger
_IN_BLOCKS_FROM = 32 << 20  # bytes
_READS = 3  # of a blob whose content arrives damaged, or not twice the same


class Outcome(enum.Enum):
    """See the module's docstring."""

    DONE = enum.auto()
    LOST = enum.auto()
    UNKNOWN = enum.auto()


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a conditional request.

    Attributes:
        etag: of the blob that was written, if the outcome is `DONE`.
        removed: whether the blob is gone, if the outcome is `LOST`.
        again: whether an earlier attempt may have written the blob as well, if the outcome is `DONE` and the blob was
            to be new. Then another client has removed that blob, and perhaps the data that it names.
        error: that made it necessary to look at the blob; None if an answer decided the outcome.
    """

    outcome: Outcome
    etag: str = ""
    removed: bool = False
    again: bool = False
    error: StoreError | None = None

    def unknown(self, message: str) -> CommitUnknownError:
        """The exception for the outcome `UNKNOWN`, with `error` as its cause."""
        made = CommitUnknownError(f"{message} ({self.error})")
        made.__cause__ = self.error
        if self.error is not None:
            made.status, made.error_code = self.error.status, self.error.error_code
        return made


@dataclass(frozen=True, slots=True)
class _ReadBack:
    """The blob as it is now.

    Attributes:
        ours: whether the request wrote it; None if that is not certain.
        etag: of the blob; None if it was not read.
    """

    ours: bool | None
    etag: str | None


def put(
    store: BlobStore,
    path: str,
    data: bytes,
    settings: CopiedSettings | None = None,
    *,
    if_etag: str | None = None,
    if_missing: bool = False,
) -> Result:
    """`BlobStore.put` with a condition. Large data is sent as blocks, in parallel: one connection would take seconds.

    Args:
        data: with an id in it that no other write has, since the data identifies the blob.

    Raises:
        StoreError: it was not carried out.
    """

    if len(data) >= _IN_BLOCKS_FROM:
        return _put_in_blocks(store, path, data, settings or CopiedSettings(), if_etag, if_missing)

    def read_back() -> _ReadBack:
        now, info = store.read_some(path, 0, _LIMIT)
        if now == data:
            return _ReadBack(True, info.etag)
        intact = info.md5 is not None and info.md5 == md5(now)  # the service stores an MD5 with every Put Blob
        return _ReadBack(False if intact else None, info.etag)

    doubt = Doubt()
    try:
        etag = store.put(path, data, settings, if_etag=if_etag, if_missing=if_missing, doubt=doubt)
        return Result(Outcome.DONE, etag, again=if_missing and doubt.exists)
    except StoreError as error:
        return _settle_write(error, read_back, if_etag)


def _put_in_blocks(
    store: BlobStore, path: str, data: bytes, settings: CopiedSettings, if_etag: str | None, if_missing: bool
) -> Result:
    with Upload(store, path, len(data)) as upload:
        upload.add([memoryview(data)])
        block_ids = upload.stage()
    content = copy.copy(settings.content) or ContentSettings(content_type="application/octet-stream")
    content.content_md5 = bytearray(md5(data))  # of a blob of blocks, the service computes none
    settings = dataclasses.replace(settings, content=content)
    return commit_blocks(store, path, block_ids, settings, if_etag=if_etag, if_missing=if_missing)


def commit_blocks(
    store: BlobStore,
    path: str,
    block_ids: Sequence[str],
    settings: BlobSettings | CopiedSettings | None = None,
    *,
    if_etag: str | None = None,
    if_missing: bool = False,
) -> Result:
    """`BlobStore.commit_blocks` with a condition.

    Args:
        block_ids: that no other upload has, since they identify the blob. An empty blob cannot be identified, so the
            outcome after a lost answer is `UNKNOWN`.

    Raises:
        StoreError: it was not carried out.
    """
    seen: list[list[str]] = []

    def read_back() -> _ReadBack:
        # The list has no checksum. Another list is believed when it arrives twice the same.
        seen.append(store.committed_blocks(path))
        if block_ids and seen[-1] == list(block_ids):
            return _ReadBack(True, store.stat(path).etag)
        return _ReadBack(False if seen[-1] and seen[-1] in seen[:-1] else None, None)

    try:
        return Result(
            Outcome.DONE, store.commit_blocks(path, block_ids, settings, if_etag=if_etag, if_missing=if_missing)
        )
    except StoreError as error:
        return _settle_write(error, read_back, if_etag)


def delete(store: BlobStore, path: str, *, if_etag: str, cancel: Cancel | None = None) -> Result:
    """`BlobStore.delete` of the blob with this ETag. `DONE`: the blob is gone, whichever client deleted it.

    Raises:
        StoreError: it was not carried out.
    """
    try:
        store.delete(path, if_etag=if_etag, cancel=cancel)
        return Result(Outcome.DONE)
    except StoreError as error:
        # A missing blob breaks the condition, too, and Azurite answers 412, not 404.
        refused = isinstance(error, BlobChangedError)
        if not refused and not error.may_be_done:
            raise
        unknown = Result(Outcome.UNKNOWN, error=error)
        if isinstance(error, ServiceUnavailableError):
            return unknown
        try:
            now = store.stat(path).etag
        except BlobNotFoundError:
            return Result(Outcome.DONE, error=error)
        except StoreError:
            return unknown
        return unknown if now == if_etag else Result(Outcome.LOST, error=error)


def _settle_write(error: StoreError, read_back: Callable[[], _ReadBack], if_etag: str | None) -> Result:
    """Find the outcome of a write that raised `error`.

    Raises:
        StoreError: `error`, which proves that the write was not carried out.
    """
    # By the condition; or the commit of another writer dropped the blocks.
    refused = isinstance(error, (BlobChangedError, BlobNotFoundError)) or error.error_code == "InvalidBlockList"
    if not refused and not error.may_be_done:
        raise error
    unknown = Result(Outcome.UNKNOWN, error=error)
    if isinstance(error, ServiceUnavailableError):
        return unknown  # reading the blob would fail as well
    for _ in range(_READS):
        try:
            now = read_back()
        except BlobNotFoundError:
            # If the condition is that there is no blob, it holds again now, for an attempt that is still on its way.
            gone = refused and (if_etag is not None or not error.may_be_done)
            return Result(Outcome.LOST, removed=True, error=error) if gone else unknown
        except StoreError:
            return unknown
        if now.ours:
            return Result(Outcome.DONE, now.etag or "", error=error)
        # As long as no answer says that the condition is broken, an attempt may still be carried out. And the condition
        # is not broken if the blob is the one that it names; if it names none, the one that is there breaks it.
        if now.ours is False:
            broken = if_etag is None or now.etag != if_etag
            return Result(Outcome.LOST, error=error) if refused and broken else unknown
    return unknown
