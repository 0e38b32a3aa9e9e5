"""A copy of a blob, made by the service where it can, and through this machine where it cannot."""

from __future__ import annotations

import functools
import uuid

from azure_torch_ckpt.blockwriter import BlockWriter
from azure_torch_ckpt.bodies import Cancel
from azure_torch_ckpt.errors import RequestRefusedError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.readahead import RangeReader
from azure_torch_ckpt.retry import NOT_SUPPORTED
from azure_torch_ckpt.settings import BlobSettings
from azure_torch_ckpt.store import BlobInfo, BlobStore
from azure_torch_ckpt.workers import Workers

__all__ = ["copy_blob"]

_MIB = 1024 * 1024
# Of Copy Blob From URL: https://learn.microsoft.com/rest/api/storageservices/copy-blob-from-url
_WHOLE = 256 * _MIB
_BLOCK = 100 * _MIB
_MAX_BLOCKS = 50_000
_PIECE = 32 * _MIB


def copy_blob(
    source: BlobStore, source_location: BlobLocation, target: BlobStore, target_location: BlobLocation
) -> BlobInfo:
    """Copy one blob over another, or to where there is none. The copy appears when it is complete, and not before.

    Returns what was copied: the source, with its ETag.

    Raises:
        BlobNotFoundError: there is no source.
        BlobChangedError: the source was replaced meanwhile; the target was left alone.
    """
    info = source.stat(source_location.path)
    name = target_location.path
    if source.location.endpoint != target.location.endpoint:
        _through_here(source, source_location, target, target_location, info)
        return info
    handle = source.copy_source(source_location.path, info.etag)
    try:
        if info.size <= _WHOLE:
            target.copy(name, handle)
            return info
        size = max(_BLOCK, -(-info.size // _MAX_BLOCKS))
        starts = range(0, info.size, size)
        save = uuid.uuid4().hex[:16]
        block_ids = [f"{save}-{number:05d}" for number in range(len(starts))]
        cancel = Cancel()

        def stage(block_id: str, start: int) -> None:
            target.stage_block_from(name, block_id, handle, start, min(size, info.size - start), cancel=cancel)

        with Workers(target.options.concurrency, "blob-copy", cancel.cancel) as workers:
            for block_id, start in zip(block_ids, starts, strict=True):
                workers.submit(functools.partial(stage, block_id, start))
            workers.finish()
        target.commit_blocks(name, block_ids)
    except RequestRefusedError as error:
        if error.status != 501 and error.error_code not in (NOT_SUPPORTED, "CannotVerifyCopySource"):
            raise
        # The emulator lacks Put Block From URL; and a source may be hidden from the service by a firewall.
        _through_here(source, source_location, target, target_location, info)
    return info


def _through_here(
    source: BlobStore, source_location: BlobLocation, target: BlobStore, target_location: BlobLocation, info: BlobInfo
) -> None:
    reader = RangeReader(source, source_location, info.etag)
    writer = BlockWriter(target, target_location.path, BlobSettings())
    buffer = memoryview(bytearray(min(_PIECE, info.size)))
    try:
        for start in range(0, info.size, _PIECE):
            piece = buffer[: info.size - start]
            reader.read_into(start, piece)
            writer.write(piece)
        writer.commit()
    except BaseException:
        writer.abort()
        raise
