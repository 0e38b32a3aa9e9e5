"""Writers and readers that do all but move the tensors' bytes: for ranks of which only the other work is measured.

The writers' and readers' own code runs, with the names, offsets and lengths that it would have. What is left out is
the transfer: of ours `Upload` and `Download`, the layer below ``dcp/``; of torch's writer the call of ``torch.save``.
Nothing outside this module knows about what it replaces.
"""

from __future__ import annotations

import collections
import contextlib
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch.distributed.checkpoint.filesystem as torch_filesystem
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from azure_torch_ckpt.blobs.download import Download, Read
from azure_torch_ckpt.blobs.upload import Item, Segment, Upload

# Bytes around the payload of a tensor in what torch.save writes, as it is for most.
_ENVELOPE = 1152
_MASK = (1 << 64) - 1


@contextlib.contextmanager
def without_upload() -> Iterator[None]:
    """``write_data`` of ours and of torch's ``FileSystemWriter`` writes no tensor."""
    with (
        mock.patch.object(Upload, "add", _add),
        mock.patch.object(Upload, "finish", lambda upload: None),
        mock.patch.object(torch_filesystem, "_write_item", _write_item),
    ):
        yield


@contextlib.contextmanager
def without_download() -> Iterator[None]:
    """``read_data`` of ours makes its requests, and sends none."""

    def run(download: Download, reads: Iterable[Read]) -> None:
        collections.deque(download._requests(reads), maxlen=0)

    with mock.patch.object(Download, "run", run):
        yield


def _add(upload: Upload, views: Iterable[memoryview], *, copies: bool = False) -> Item:
    size = sum(view.nbytes for view in views)
    item = Item(upload._offset, size, [Segment([], size, _checksum(upload._path, upload._offset))])
    upload._offset += size
    return item


def _checksum(path: str, offset: int) -> int:
    """A number of each item's own that nothing compresses, as checksums are (the finalizer of SplitMix64)."""
    mixed = (zlib.crc32(path.encode()) << 32 ^ offset) & _MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
    return mixed ^ mixed >> 31


def _write_item(
    transforms: Any, stream: Any, data: Any, write_item: WriteItem, storage_key: str, serialization_format: Any
) -> WriteResult:
    assert write_item.tensor_data is not None
    offset = stream.tell()
    length = _ENVELOPE + math.prod(write_item.tensor_data.chunk.sizes) * data.element_size()
    stream.seek(offset + length)  # a hole: the file stays empty
    info = torch_filesystem._StorageInfo(storage_key, offset, length, transform_descriptors=None)
    return WriteResult(index=write_item.index, size_in_bytes=length, storage_data=info)
