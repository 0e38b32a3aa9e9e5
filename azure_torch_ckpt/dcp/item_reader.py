"""`ItemReader`: reads stored items of one checkpoint, compares their checksums, and says what is wrong with them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeVar

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from azure_torch_ckpt._internal.torch_private import ExtensionRegistry, StreamTransformExtension
from azure_torch_ckpt.blobs.download import Check, Download, Read
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.metadata.schema import StoredItem
from azure_torch_ckpt.errors import (
    AzureCheckpointError,
    BlobChangedError,
    BlobNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
    RequestRefusedError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.location import BlobLocation

__all__ = ["ItemReader", "batches", "crc64_mismatch", "item_name", "open_item", "run_reads"]

# Memory that is taken on the metadata's word alone. For more, the service is asked whether the blob has the bytes.
_UNASKED = 1024 * 1024

_T = TypeVar("_T")


class ItemReader:
    """Makes the reads of a checkpoint's items. `run` carries them out: `run_reads`, with what its caller adds."""

    def __init__(
        self, store: BlobStore, location: BlobLocation, run: Callable[[Download, Iterable[Read]], None]
    ) -> None:
        self.store = store
        self.run = run
        self._location = location
        self._checksums = store.options.checksums
        self._paths: dict[str, str] = {}  # of data blobs in the container, by their names below the URL
        self._sizes: dict[str, int] = {}

    def name(self, index: MetadataIndex) -> str:
        """Name an item for a message."""
        return f"{item_name(index)} of {self._location}"

    def path(self, item: StoredItem) -> str:
        """The data blob of an item, in the container."""
        path = self._paths.get(item.relative_path)
        if path is None:
            path = self._paths[item.relative_path] = self._location.join(item.relative_path).path
        return path

    def require(self, item: StoredItem, length: int) -> None:
        """Raise `CorruptCheckpointError` if an item's blob is too short, before memory is taken for `length` bytes.

        Damaged metadata could ask for any amount of memory.
        """
        if length <= _UNASKED:
            return
        path = self.path(item)
        if path not in self._sizes:
            self._sizes[path] = self.store.stat(path).size
        if item.offset + item.length > self._sizes[path]:
            raise CorruptCheckpointError(
                f"A data blob of the checkpoint is shorter than its metadata says: {item.relative_path} has "
                f"{self._sizes[path]} bytes where {item.offset + item.length} are needed. Use another checkpoint"
            )

    def check(self, item: StoredItem, index: MetadataIndex) -> Check | None:
        """The check of an item that is read whole; None if it has no checksum, or checksums are off."""
        if item.crc64 is None or not self._checksums:
            return None

        def mismatch(found: int) -> None:
            raise CorruptCheckpointError(
                f"{crc64_mismatch(self.name(index), item, found)}. They were damaged in storage or on the way. Load an "
                "older checkpoint, or try again to rule out the way"
            )

        return Check(item.crc64, item.length, mismatch)

    def whole(self, item: StoredItem, index: MetadataIndex) -> tuple[bytearray, Read]:
        """Make a buffer for all bytes of an item that `require` accepts, and the read that fills it."""
        self.require(item, item.length)
        buffer = bytearray(item.length)
        return buffer, Read(
            self.path(item), item.offset, item.length, memoryview(buffer), None, self.check(item, index)
        )


def run_reads(
    download: Download,
    reads: Iterable[Read],
    raise_if_replaced: Callable[[AzureCheckpointError], None],
    replaced: Callable[[], CheckpointReplacedError],
) -> None:
    """``download.run(reads)``, with errors that say what they mean for the checkpoint.

    Args:
        raise_if_replaced: raises if the checkpoint was replaced since its metadata was read, which explains the error.
        replaced: makes the error of a replaced checkpoint.

    Raises:
        CorruptCheckpointError: a blob is missing or too short, or a checksum does not match.
        CheckpointReplacedError: the checkpoint was replaced or removed meanwhile.
        StoreError: the service could not be asked.
    """
    try:
        download.run(reads)
    except BlobNotFoundError as error:
        raise_if_replaced(error)
        raise CorruptCheckpointError(
            f"A data blob of the checkpoint is missing: {error}. It was deleted; use another checkpoint"
        ) from error
    except RequestRefusedError as error:
        if error.status != 416:
            raise
        raise_if_replaced(error)
        raise CorruptCheckpointError(
            f"A data blob of the checkpoint is shorter than its metadata says: {error}. Use another checkpoint"
        ) from error
    except BlobChangedError as error:
        raise replaced() from error
    except CorruptCheckpointError as error:
        raise_if_replaced(error)
        raise


def batches(values: Iterable[_T], size: Callable[[_T], int], budget: int) -> Iterator[list[_T]]:
    """Yield as many values at a time as have `budget` bytes together, but at least one."""
    batch: list[_T] = []
    room = budget
    for value in values:
        needed = size(value)
        if batch and needed > room:
            yield batch
            batch, room = [], budget
        batch.append(value)
        room -= needed
    if batch:
        yield batch


def item_name(index: MetadataIndex) -> str:
    """Name an item of a checkpoint for a message: its key, and where its chunk starts."""
    return repr(index.fqn) if index.offset is None else f"{index.fqn!r} at {list(index.offset)}"


def crc64_mismatch(name: str, item: StoredItem, found: int) -> str:
    """Describe an item whose bytes have another CRC64 than was saved, for a message."""
    return (
        f"{name}: the {item.length} bytes at offset {item.offset} of blob {item.relative_path} have CRC64 {found:016x} "
        f"where {item.crc64:016x} was saved"
    )


def open_item(received: bytearray, item: StoredItem, name: str) -> io.BytesIO:
    """Return an item's bytes as a stream, the stream transforms that it was written through undone.

    Raises:
        UnsupportedCheckpointError: this torch does not have a transform.
        CorruptCheckpointError: a transform cannot read the bytes.
    """
    if not item.transforms:
        return io.BytesIO(received)
    transforms = ", ".join(item.transforms)
    try:
        extensions = ExtensionRegistry().from_descriptor_list(item.transforms)
    except (KeyError, ValueError) as error:
        raise UnsupportedCheckpointError(
            f"{name} was written through the stream transforms {transforms}, which torch {torch.__version__} does not "
            "have. Load it with the code that saved it"
        ) from error
    stream: IO[bytes] = io.BytesIO(received)
    try:
        for extension in extensions:
            if isinstance(extension, StreamTransformExtension):
                stream = extension.transform_from(stream)
        return io.BytesIO(stream.read())
    except ImportError as error:
        raise UnsupportedCheckpointError(
            f"{name} was written through the stream transforms {transforms}: {error}"
        ) from error
    except Exception as error:
        raise CorruptCheckpointError(f"{name} cannot be read through {transforms}: {error}") from error
