"""What is in a ``.metadata`` blob, and where items are stored: written, read without trusting it, and checked.

``.metadata`` decides which blobs are fetched (and, when a checkpoint is replaced, deleted) and how much memory is
taken, so nothing acts on it before :func:`load_metadata` and :func:`check_metadata` have passed.
"""

from __future__ import annotations

import copyreg
import functools
import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, TypeAlias, cast

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData

from azure_torch_ckpt._internal.torch_private import StorageInfo
from azure_torch_ckpt.dcp.metadata.unpickler import unpickle
from azure_torch_ckpt.dcp.metadata.vocabulary import quote
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError

__all__ = [
    "StoredItem",
    "check_metadata",
    "dump_metadata",
    "is_plain_path",
    "is_row_major",
    "load_metadata",
    "metadata_pickler",
    "pickle_metadata",
    "refuse_to_save",
    "storage_info",
    "storage_meta",
    "stored_item",
]

_MAX_PATH = 1024  # characters of a blob's name: learn.microsoft.com, "Naming and referencing containers, blobs"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # of a URL; a Windows drive looks the same
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # lone surrogates have no place in a URL either


@dataclass(slots=True)
class StoredItem:
    """Where one item (a chunk of a tensor, or an object's pickle) lies.

    Attributes:
        relative_path: its blob, below the checkpoint's URL.
        offset: of its first byte in the blob.
        length: its bytes, envelope included.
        payload_offset: of a tensor's raw bytes, counted from the item's first byte. None: not known, ``torch.load`` the
            whole item.
        crc64: CRC64-NVME of all ``length`` bytes, or None.
        transforms: descriptors of the stream transforms that it was written through, in order.
    """

    relative_path: str
    offset: int
    length: int
    payload_offset: int | None
    crc64: int | None
    transforms: tuple[str, ...]


def storage_info(
    relative_path: str, offset: int, length: int, *, payload_offset: int | None = None, crc64: int | None = None
) -> StorageInfo:
    """Make torch's storage info, with our two attributes (see `StoredItem`), which torch pickles and does not read."""
    info: Any = StorageInfo(relative_path, offset, length)
    if payload_offset is not None:
        info.payload_offset = payload_offset
    if crc64 is not None:
        info.crc64 = crc64
    return info  # type: ignore[no-any-return]


def stored_item(info: object) -> StoredItem:
    """The typed view of a value of ``Metadata.storage_data``, ours or of any version of torch.

    Raises:
        UnsupportedCheckpointError: another storage plugin wrote it.
    """
    if not isinstance(info, StorageInfo):
        raise UnsupportedCheckpointError(
            f"An item's storage info is {quote(info)}, not torch's _StorageInfo: another storage plugin wrote this "
            "checkpoint. Read it with that plugin."
        )
    return StoredItem(
        info.relative_path,
        info.offset,
        info.length,
        getattr(info, "payload_offset", None),
        getattr(info, "crc64", None),
        tuple(getattr(info, "transform_descriptors", None) or ()),
    )


def storage_meta(
    checkpoint_id: str, save_id: str | None, *, save_group: str | None = None, ranks: int | None = None
) -> StorageMeta:
    """Make torch's own ``StorageMeta`` with attributes that torch ignores: the versions of torch and of this package.

    And of a save without collectives the fields of its `SaveGroup`.
    """
    meta: Any = StorageMeta(checkpoint_id=checkpoint_id, save_id=save_id)
    meta.torch_version = str(torch.__version__)  # torch's own class of it must not be in a pickle
    meta.writer_version = _own_version()
    if save_group is not None:
        meta.save_group = save_group
    if ranks is not None:
        meta.ranks = ranks
    return meta  # type: ignore[no-any-return]


@functools.cache
def _own_version() -> str:
    try:
        return version("azure-torch-ckpt")
    except PackageNotFoundError:  # a source tree on sys.path
        return "0+source"


def dump_metadata(metadata: Metadata, where: str = "The metadata of this save") -> bytes:
    """Make the content of ``.metadata``: a pickle that torch's ``FileSystemReader`` reads as well.

    It was read again and has passed :func:`check_metadata`. What a planner has added to it (attributes, subclasses of
    torch's classes) is in it, as far as :func:`load_metadata` reads past it. `where` names it in messages.

    Raises:
        UnsafeMetadataError: something in it cannot be pickled, or no load would accept it; its key or attribute is
            named. So the save fails before the commit, instead of committing what cannot be loaded.
    """
    try:
        data = pickle_metadata(metadata)
        check_metadata(load_metadata(data, where), where)
    except Exception as error:  # an object's own __reduce__ may raise anything
        raise refuse_to_save(metadata, where, error) from error
    return data


def refuse_to_save(metadata: Metadata, where: str, error: Exception) -> UnsafeMetadataError:
    """Make the error of metadata that could not be read again, which `error` says."""
    return UnsafeMetadataError(
        f"{where} could not be loaded again{_culprit(metadata)}, so nothing was committed ({error}). Let the planner "
        "put plain values there, or omit it"
    )


def _culprit(metadata: Metadata) -> str:
    """Name the attribute of `metadata`, and the key of a dict there, that cannot be pickled and read, for a message."""
    for name, value in vars(metadata).items():
        if _is_read(name, value):
            continue
        if type(value) is not dict or len(value) < 2:
            return f", because of its {quote(name)}"
        entries = list(cast("dict[object, object]", value).items())
        while len(entries) > 1:
            half = len(entries) // 2
            entries = entries[half:] if _is_read(name, dict(entries[:half])) else entries[:half]
        return f", because of {quote(entries[0][0])} in its {quote(name)}"
    return ""


def _is_read(name: str, value: object) -> bool:
    probe = Metadata({})
    probe.__dict__[name] = value
    try:
        load_metadata(pickle.dumps(probe), "")
    except Exception:
        return False
    return True


def load_metadata(data: bytes, where: str) -> Metadata:
    """Read what :func:`dump_metadata` or torch's ``FileSystemWriter`` wrote, without running anything that it names.

    Besides the classes that metadata consists of, only those are made that were registered with
    ``torch.serialization.add_safe_globals``. Objects of other classes are dropped where no load needs them: attributes
    that a planner or a trainer has added. An instance of a subclass of one of torch's classes becomes one of torch's
    class. Fields that a newer torch added are kept where torch has room for them and dropped where not. ``data`` should
    be bounded: what it describes can take 200 times its size. `where` names the blob in messages.

    Raises:
        UnsafeMetadataError: it names a function, does something that metadata never does, or has an object of an
            unknown class where a load would use it. Nothing of it was run.
        UnsupportedCheckpointError: a newer torch wrote it.
        CorruptCheckpointError: it is cut short, garbage, or not a ``Metadata``.
    """
    metadata = unpickle(data, where)
    if not isinstance(metadata, Metadata):
        raise CorruptCheckpointError(
            f"{where} holds {quote(metadata)}, not checkpoint metadata. Check the URL, or use another checkpoint."
        )
    fields = vars(metadata)
    for name in ("state_dict_metadata", "storage_data", "planner_data"):
        if type(fields.get(name)) is OrderedDict:
            fields[name] = dict(fields[name])
    return metadata


def is_plain_path(path: str) -> bool:
    """Whether a path cannot lead out of the checkpoint's URL, and is one that the name of a blob can have."""
    return not (
        len(path) > _MAX_PATH
        or "\\" in path
        or "://" in path
        or _SCHEME.match(path)
        or _CONTROL.search(path)
        or not {"", ".", ".."}.isdisjoint(path.split("/"))
    )


def check_metadata(metadata: Metadata, where: str) -> None:
    """Check that ``metadata`` is what a save writes, before anything is fetched, allocated or deleted because of it.

    Takes time proportional to the number of items. `where` names the blob in messages.

    Raises:
        UnsafeMetadataError: a path that could leave the checkpoint, or a negative or impossible number.
        UnsupportedCheckpointError: another storage plugin wrote it.
        CorruptCheckpointError: it contradicts itself: a wrong type, a chunk outside its tensor, an item without
            storage, a payload that does not fit its item.
    """
    _MetadataCheck(metadata, where).run()


class _MetadataCheck:
    def __init__(self, metadata: Metadata, where: str) -> None:
        self._metadata = metadata
        self._where = where
        # Looks up a chunk in storage_data. One for all lookups: to make one takes longer than to look up.
        self._lookup = MetadataIndex("", ())

    def run(self) -> None:
        metadata = self._metadata
        # A damaged pickle can leave any field out.
        items = getattr(metadata, "state_dict_metadata", None)
        storage = getattr(metadata, "storage_data", None)
        if type(items) is not dict:
            self._corrupt("state_dict_metadata is not a dict")
        if type(storage) is not dict:
            self._corrupt("storage_data is not a dict")
        if not isinstance(metadata.storage_meta, StorageMeta | None):
            self._corrupt("storage_meta is not a StorageMeta")
        if not isinstance(metadata.version, str | None):
            self._corrupt("version is not a string")
        self._storage(storage)
        for name, item in items.items():
            if type(name) is not str:
                self._corrupt(f"the name {quote(name)} is not a string")
            if isinstance(item, TensorStorageMetadata):
                self._tensor(name, item, storage)
            elif not isinstance(item, BytesStorageMetadata):
                self._corrupt(f"{quote(name)} is described by {quote(item)}")
            elif MetadataIndex(name) not in storage:
                self._corrupt(f"{quote(name)} has no storage")

    def _storage(self, storage: dict[Any, Any]) -> None:
        paths = set()
        for index, info in storage.items():
            if type(index) is not MetadataIndex or type(getattr(index, "fqn", None)) is not str:
                self._corrupt(f"storage_data has the key {quote(index)}")
            name = index.fqn
            if not isinstance(info, StorageInfo):
                raise UnsupportedCheckpointError(
                    f"{self._where}: the storage info of {quote(name)} is {quote(info)}, not torch's _StorageInfo. "
                    "Another storage plugin wrote this checkpoint; read it with that plugin."
                )
            fields = info.__dict__
            path = fields.get("relative_path")
            if type(path) is not str:
                self._corrupt(f"the path of {quote(name)} is not a string")
            if path not in paths:
                self._path(path)
                paths.add(path)
            offset, length = fields.get("offset"), fields.get("length")
            payload, crc64 = fields.get("payload_offset"), fields.get("crc64")
            if type(offset) is not int or type(length) is not int:
                self._corrupt(f"the offset or length of {quote(name)} is not an integer")
            if offset < 0 or length < 0 or offset + length >= 1 << 63:
                self._unsafe(f"{quote(name)} lies at offset {quote(offset)} with length {quote(length)}")
            if payload is not None:
                if type(payload) is not int:
                    self._corrupt(f"the payload offset of {quote(name)} is not an integer")
                if not 0 <= payload <= length:
                    self._unsafe(f"the payload of {quote(name)} begins at {quote(payload)} of {length} bytes")
            if crc64 is not None:
                if type(crc64) is not int:
                    self._corrupt(f"the CRC64 of {quote(name)} is not an integer")
                if not 0 <= crc64 < 1 << 64:
                    self._unsafe(f"the CRC64 of {quote(name)} is {quote(crc64)}")
            transforms = fields.get("transform_descriptors")
            if transforms:
                if type(transforms) not in (list, tuple) or not all(type(entry) is str for entry in transforms):
                    self._corrupt(f"the transform descriptors of {quote(name)} are not strings")
                if payload is not None:
                    self._corrupt(f"{quote(name)} went through a transform and has a raw payload as well")

    def _path(self, path: str) -> None:
        if not is_plain_path(path):
            self._unsafe(f"it names the data blob {quote(path)}, which is not a plain path below the checkpoint")

    def _tensor(self, name: str, tensor: TensorStorageMetadata, storage: dict[Any, Any]) -> None:
        fields = tensor.__dict__
        properties, size, chunks = fields.get("properties"), fields.get("size"), fields.get("chunks")
        if not isinstance(properties, TensorProperties) or not isinstance(
            dtype := properties.__dict__.get("dtype"), torch.dtype
        ):
            self._corrupt(f"{quote(name)} has no dtype")
        if type(size) is not torch.Size or type(chunks) is not list:
            self._corrupt(f"{quote(name)} has no size or no chunks")
        if size and min(size) < 0:
            self._unsafe(f"{quote(name)} has the size {tuple(size)}")
        itemsize = dtype.itemsize
        lookup = self._lookup.__dict__
        lookup["fqn"] = name
        for chunk in chunks:
            if not isinstance(chunk, ChunkStorageMetadata):
                self._corrupt(f"a chunk of {quote(name)} is {quote(chunk)}")
            offsets, sizes = chunk.__dict__.get("offsets"), chunk.__dict__.get("sizes")
            if type(offsets) is not torch.Size or type(sizes) is not torch.Size:
                self._corrupt(f"a chunk of {quote(name)} has no offsets or no sizes")
            if len(offsets) != len(size) or len(sizes) != len(size):
                self._corrupt(f"{quote(name)} has {len(size)} dimensions, and a chunk {len(offsets)} and {len(sizes)}")
            if sizes != size or any(offsets):  # most chunks are the whole tensor
                self._inside(name, size, offsets, sizes)
            lookup["offset"] = offsets
            info = storage.get(self._lookup)
            if info is None:
                self._corrupt(f"the chunk of {quote(name)} at {tuple(offsets)} has no storage")
            payload = info.__dict__.get("payload_offset")
            if payload is not None and payload + math.prod(sizes) * itemsize > info.length:
                self._corrupt(
                    f"the chunk of {quote(name)} at {tuple(offsets)} needs {math.prod(sizes) * itemsize} bytes from "
                    f"byte {payload} of an item of {info.length}"
                )

    def _inside(self, name: str, size: torch.Size, offsets: torch.Size, sizes: torch.Size) -> None:
        for start, extent, whole in zip(offsets, sizes, size, strict=True):
            if start < 0 or extent < 0:
                self._unsafe(f"a chunk of {quote(name)} is at {tuple(offsets)} with the sizes {tuple(sizes)}")
            # An empty shard of an uneven split lies at the end: offset == whole.
            if start + extent > whole:
                self._corrupt(
                    f"{quote(name)} has the size {tuple(size)}, and a chunk at {tuple(offsets)} with the sizes "
                    f"{tuple(sizes)}"
                )

    def _corrupt(self, reason: str) -> NoReturn:
        raise CorruptCheckpointError(
            f"{self._where} contradicts itself: {reason}. It is damaged; restore it or use another checkpoint."
        )

    def _unsafe(self, reason: str) -> NoReturn:
        raise UnsafeMetadataError(
            f"{self._where} is refused: {reason}. It is damaged or was made to do harm; nothing was fetched. Use "
            "another checkpoint."
        )


_FIELDS = 5  # of TensorProperties, that every torch knows
_PROTOCOL = 4  # the first with MEMOIZE, and what FileSystemWriter writes up to Python 3.13
_Reduced: TypeAlias = "tuple[Any, ...]"


def pickle_metadata(metadata: Metadata) -> bytes:
    """Pickle metadata without the strides of tensors for which they follow from the size.

    Where they do not (a transposed tensor), they stay; torch 2.14 and earlier do not read that, as if torch 2.15 itself
    had written it.
    """
    buffer = io.BytesIO()
    metadata_pickler(buffer, set()).dump(metadata)
    return buffer.getvalue()


def metadata_pickler(buffer: io.BytesIO, row_major: set[int]) -> pickle.Pickler:
    """Make a pickler that leaves strides out where `pickle_metadata` does.

    Args:
        row_major: ids of the properties whose strides are left out, beside those that it finds.
    """
    pickler = pickle.Pickler(buffer, protocol=_PROTOCOL)
    if not hasattr(TensorProperties, "strides"):
        return pickler

    def stored(entry: TensorStorageMetadata) -> _Reduced:
        note(entry.properties, entry.size, entry.chunks[0].sizes if entry.chunks else None)
        return entry.__reduce_ex__(pickle.DEFAULT_PROTOCOL)  # type: ignore[return-value]

    def planned(data: TensorWriteData) -> _Reduced:
        note(data.properties, data.size, data.chunk.sizes)
        return data.__reduce_ex__(pickle.DEFAULT_PROTOCOL)  # type: ignore[return-value]

    # A pickler comes to the holder of the properties first.
    def note(properties: Any, size: Sequence[int], shard: Sequence[int] | None) -> None:
        strides = getattr(properties, "strides", None)
        if strides is None or is_row_major(strides, size) or (shard is not None and is_row_major(strides, shard)):
            row_major.add(id(properties))

    def properties_(properties: TensorProperties) -> _Reduced:
        reduced: Any = properties.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        make, args, state, *rest = reduced
        return make, args, state[:_FIELDS] if id(properties) in row_major else state, *rest

    # Called by a pickler for instances of exactly these classes.
    pickler.dispatch_table = copyreg.dispatch_table | {
        TensorStorageMetadata: stored,
        TensorWriteData: planned,
        TensorProperties: properties_,
    }
    return pickler


def is_row_major(strides: Sequence[int], size: Sequence[int]) -> bool:
    """Whether these are the strides of a row-major tensor of this size."""
    if len(strides) != len(size):
        return False
    expected = 1
    for stride, extent in zip(reversed(strides), reversed(size), strict=True):
        if extent != 1 and stride != expected:
            return 0 in size  # an empty tensor has no strides to speak of
        expected *= extent
    return True
