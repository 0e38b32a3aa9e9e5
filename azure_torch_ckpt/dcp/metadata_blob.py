"""`MetadataBlob`: a metadata blob as far as it was read: all of a small one, of a large one the index at its front."""

from __future__ import annotations

import datetime
import functools
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt._internal.checksums import md5
from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.dcp.blob_names import metadata_name
from azure_torch_ckpt.dcp.metadata.front import open_metadata, read_front
from azure_torch_ckpt.errors import BlobChangedError, BlobNotFoundError, CheckpointReplacedError, CorruptCheckpointError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["MetadataBlob", "open_metadata_blob", "read_metadata_blob", "replaced_error"]

# Bytes of the first request. The index of 1,000 ranks with 2,000 tensors has 300 KB, and small checkpoints fit whole.
_FIRST = 1 << 18
# Bytes. 2,000 tensors in 1,000 shards make 250 MB of metadata.
_LIMIT = 4 << 30
_ATTEMPTS = 5  # to read two parts of one blob that is replaced again and again


@dataclass(frozen=True, slots=True)
class MetadataBlob:
    """A ``.metadata`` blob.

    Attributes:
        data: its content; of a large one with an index, at least the front (`metadata.front`).
        etag: that it had.
        modified: when it was written.
        size: bytes of the whole blob.
    """

    data: bytes
    etag: str
    modified: datetime.datetime
    size: int


def open_metadata_blob(store: BlobStore, location: BlobLocation, rank: int | None, blob: MetadataBlob) -> Metadata:
    """Read and check what `read_metadata_blob` has fetched. What is not there yet is fetched when it is asked for.

    Raises:
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: it cannot be trusted or read.
    """
    path = location.join(metadata_name(rank)).path

    def fetch(spans: list[tuple[int, int]]) -> list[bytes]:
        parts = [bytearray(length) for _, length in spans]
        cancel = Cancel()

        def read(start: int, part: bytearray) -> None:
            store.read_into(path, start, [memoryview(part)], if_etag=blob.etag, cancel=cancel)

        tasks = (functools.partial(read, start, part) for (start, _), part in zip(spans, parts, strict=True) if part)
        try:
            run_all(tasks, store.options.concurrency, "blob-metadata", cancel.cancel)
        except (BlobChangedError, BlobNotFoundError) as error:
            raise replaced_error(location) from error
        return list(map(bytes, parts))

    with CollectorPause():
        return open_metadata(blob.data, f"{location}/{metadata_name(rank)}", blob.size, fetch)


def replaced_error(location: BlobLocation) -> CheckpointReplacedError:
    """Make the error of a load that found out that the checkpoint was replaced meanwhile."""
    return CheckpointReplacedError(
        f"The checkpoint at {location} was replaced or removed while it was being read. Load again"
    )


def read_metadata_blob(
    store: BlobStore, location: BlobLocation, rank: int | None = None, *, whole: bool = False
) -> MetadataBlob | None:
    """Fetch the metadata of the checkpoint at `location`; None if it does not exist.

    Args:
        whole: all of it, not only what `open_metadata_blob` begins with.

    Raises:
        CorruptCheckpointError: its bytes do not have the MD5 that was stored with them.
        CheckpointReplacedError: it was replaced again and again meanwhile.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _read(store, location, rank, whole)
        except BlobNotFoundError:
            return None
        except BlobChangedError:
            continue
    raise replaced_error(location)


def _read(store: BlobStore, location: BlobLocation, rank: int | None, whole: bool) -> MetadataBlob:
    name = metadata_name(rank)
    path = location.join(name).path
    data, info = store.read_some(path, 0, _FIRST)
    if len(data) < info.size:
        front = None if whole else read_front(data, f"{location}/{name}")
        end = info.size if front is None else min(front.end, info.size)
        if end > len(data):
            more, _ = store.read_some(path, len(data), min(end, _LIMIT) - len(data), if_etag=info.etag)
            data += more
    if len(data) == info.size and info.md5 is not None and info.md5 != md5(data):
        raise CorruptCheckpointError(
            f"{location}/{name} was damaged in storage or in transit: its bytes do not have the MD5 that was stored "
            "with them. Try again to rule out the transfer, or use another checkpoint"
        )
    return MetadataBlob(data, info.etag, info.last_modified, info.size)
