"""Conditional writes and deletions, and what became of one whose answer was lost.

A request may be carried out although nobody hears of it: the connection breaks, the service answers 500, something on
the way repeats it. The next attempt then finds its condition broken by the first one. So an answer that says "the
condition does not hold" (412, 409, 404) does not tell who broke it; the blob itself does. Whoever commits with a
condition calls a function of this module, and deletes nothing unless the outcome is proven.

| outcome | means | so the caller |
|---|---|---|
| an exception | the service refused every attempt; nothing was carried out | may go on as if it had not asked |
| `DONE` | carried out: the answer says so, or the blob is what was to be written (is gone) | may remove the old |
| `LOST` | the blob is intact and another's, or was removed | may remove its own |
| `UNKNOWN` | neither is proven; the blob is the old or the new one | removes nothing |
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from azure_torch_ckpt._internal.checksums import md5
from azure_torch_ckpt.blobs.settings import BlobSettings, CopiedSettings
from azure_torch_ckpt.blobs.store import BlobStore
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
_LOOKS = 3  # at a blob whose content arrives damaged, or not twice the same


class Outcome(enum.Enum):
    """See the module's docstring."""

    DONE = enum.auto()
    LOST = enum.auto()
    UNKNOWN = enum.auto()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a conditional request.

    Attributes:
        etag: of the blob that was written, where the outcome is `DONE`.
        removed: of the outcome `LOST`: there is no blob now.
        again: of the outcome `DONE`, of a blob that was to be new: an earlier attempt may have been carried out, too.
            Then somebody has removed what it wrote, and perhaps what belongs to it.
        error: why the outcome is not plainly `DONE`.
    """

    outcome: Outcome
    etag: str = ""
    removed: bool = False
    again: bool = False
    error: StoreError | None = None

    def unknown(self, message: str) -> CommitUnknownError:
        """What to raise for the outcome `UNKNOWN`, with `error` as its cause."""
        made = CommitUnknownError(f"{message} ({self.error})")
        made.__cause__ = self.error
        if self.error is not None:
            made.status, made.error_code = self.error.status, self.error.error_code
        return made


@dataclass(frozen=True, slots=True)
class _Found:
    """The blob as it is now: whether it is what the request was to make of it, and its ETag; None if it is not there.

    Attributes:
        ours: None where that cannot be told.
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
    """`BlobStore.put` with a condition.

    Args:
        data: that nobody else writes (it holds an id of its own), for by it the blob is known again.
        if_etag: write only over the blob with this ETag.
        if_missing: write only if there is no such blob.

    Raises:
        StoreError: it was not carried out.
    """

    def look() -> _Found:
        found, info = store.read_some(path, 0, _LIMIT)
        if found == data:
            return _Found(True, info.etag)
        intact = info.md5 is not None and info.md5 == md5(found)  # Put Blob keeps an MD5 with every blob
        return _Found(False if intact else None, info.etag)

    doubt = Doubt()
    try:
        etag = store.put(path, data, settings, if_etag=if_etag, if_missing=if_missing, doubt=doubt)
        return Result(Outcome.DONE, etag, again=if_missing and doubt.exists)
    except StoreError as error:
        return _settle_write(error, look, if_etag)


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
        block_ids: that no other upload has, for by them the blob is known again. Without any, a lost answer stays one.

    Raises:
        StoreError: it was not carried out.
    """
    seen: list[list[str]] = []

    def look() -> _Found:
        # The list has no checksum: another's is believed when it comes twice the same.
        seen.append(store.committed_blocks(path))
        if block_ids and seen[-1] == list(block_ids):
            return _Found(True, store.stat(path).etag)
        return _Found(False if seen[-1] and seen[-1] in seen[:-1] else None, None)

    try:
        return Result(
            Outcome.DONE, store.commit_blocks(path, block_ids, settings, if_etag=if_etag, if_missing=if_missing)
        )
    except StoreError as error:
        return _settle_write(error, look, if_etag)


def delete(store: BlobStore, path: str, *, if_etag: str, cancel: Cancel | None = None) -> Result:
    """`BlobStore.delete` of the blob with this ETag. `DONE`: there is no blob now, whoever deleted it.

    Raises:
        StoreError: it was not carried out.
    """
    try:
        store.delete(path, if_etag=if_etag, cancel=cancel)
        return Result(Outcome.DONE)
    except StoreError as error:
        # A blob that is not there breaks the condition, too, and Azurite says so (412, not 404).
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


def _settle_write(error: StoreError, look: Callable[[], _Found], if_etag: str | None) -> Result:
    refused = isinstance(error, (BlobChangedError, BlobNotFoundError))  # by the condition
    if not refused and not error.may_be_done:
        raise error
    unknown = Result(Outcome.UNKNOWN, error=error)
    if isinstance(error, ServiceUnavailableError):
        return unknown  # whom to ask?
    for _ in range(_LOOKS):
        try:
            found = look()
        except BlobNotFoundError:
            # The condition that there is no blob holds again now, for an attempt that is still on its way.
            gone = refused and (if_etag is not None or not error.may_be_done)
            return Result(Outcome.LOST, removed=True, error=error) if gone else unknown
        except StoreError:
            return unknown
        if found.ours:
            return Result(Outcome.DONE, found.etag or "", error=error)
        # Without an answer that the condition is broken, an attempt may still be carried out; and if the blob is the
        # one that the condition names, it is not broken.
        if found.ours is False:
            return Result(Outcome.LOST, error=error) if refused and found.etag != if_etag else unknown
    return unknown
