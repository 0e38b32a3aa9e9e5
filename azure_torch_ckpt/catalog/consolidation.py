"""`consolidate`: a sharded checkpoint as one `.pt` or safetensors file, streamed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.block_writer import BlockWriter
from azure_torch_ckpt.blobs.settings import BlobSettings
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.bytemeter import ByteProgress, byte_meter
from azure_torch_ckpt.catalog.copying.folders import BlobEnd, FileSink, FolderEnd, open_end
from azure_torch_ckpt.catalog.copying.report import CopyFigures
from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.dcp.open_checkpoint import OpenCheckpoint, open_checkpoint_in
from azure_torch_ckpt.dcp.tensor_stream import ahead, object_bytes, stored_objects, stored_tensors, stream_chunks
from azure_torch_ckpt.dcp.tensors.memory import readable
from azure_torch_ckpt.dcp.tensors.torch_file import Placeholders, load_saved, outline
from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobExistsError,
    BlobNotFoundError,
    CheckpointExistsError,
    ConfigurationError,
    CorruptCheckpointError,
    LocationError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.huggingface.safetensors_head import as_text, safetensors_head
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["ConsolidateReport", "Format", "consolidate"]

Format = Literal["torch", "safetensors"]

_SUFFIXES: dict[str, Format] = {
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".safetensors": "safetensors",
}
# A list in a state dict has some parameter groups or layers; an index beyond this is damage that would take the memory.
_LONGEST_LIST = 1_000_000
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ConsolidateReport:
    """What `consolidate` wrote: where, in which format, how many tensors and objects, the file's bytes, the time."""

    dst: str
    format: Format
    tensors: int
    objects: int
    bytes: int
    seconds: float


def consolidate(
    url: str | os.PathLike[str] | BlobLocation,
    dst: str | os.PathLike[str] | BlobLocation,
    *,
    format: Format | None = None,
    keys: Callable[[str], bool] | None = None,
    overwrite: bool = False,
    progress: ByteProgress | None = None,
    credential: Credential = None,
    dst_credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> ConsolidateReport:
    """Write the checkpoint at a URL as one file: a local path, or the URL of a blob.

    The file is written while the tensors are read, within ``options.memory_budget`` of memory. What is held whole are
    objects, and of a checkpoint that torch's own writer made one stored chunk at a time.

    ``"torch"`` is what ``torch.load(file, weights_only=True)`` reads: the nested state dict that
    ``torch.distributed.checkpoint.format_utils.dcp_to_torch_save`` would write. (Zip tools other than torch's
    complain about checksums of 0; `dcp.tensors.torch_file` has the reason.) ``"safetensors"`` has the tensors under
    their flattened names (``model.layers.0.weight``), and in its ``__metadata__`` the values that are numbers, strings,
    booleans, None or lists and dicts of them, as JSON; anything else is refused by name.

    The file is visible when it is complete, and never half.

    Args:
        format: None tells by the suffix: ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` are torch's.
        keys: only what it accepts is written; it is called with flattened names.
        overwrite: replace a file that is there. False refuses before anything is read.
        progress: called with the bytes written, and those of the whole file.
        credential: for both ends.
        dst_credential: for the target, if it needs another one. It has to allow writing and nothing else.

    Raises:
        ValueError: no format was given, and the suffix tells none.
        CheckpointNotFoundError: there is no complete checkpoint.
        CheckpointExistsError: the file exists.
        ConfigurationError: `keys` accepts nothing of the checkpoint.
        UnsupportedCheckpointError: the format has no place for something in the checkpoint, or ``torch.load`` takes the
            class of an object for unsafe. ``keys=`` leaves it out.
        CorruptCheckpointError: data is missing, short or damaged. Nothing was written.
        LocalFileError: the file could not be written.
        StoreError: the service could not be asked.
    """
    kind = _format(format, dst)
    if str(dst).endswith("/"):
        raise LocationError("The target ends with a slash, which says that it is a folder; append the name of the file")
    whole = options or TransferOptions()
    # A quarter for what is read, one for what is sent, and the rest for up to three windows between the two.
    quarter = dataclasses.replace(whole, memory_budget=max(whole.memory_budget // 4, _MIB))
    window = quarter.memory_budget // 2
    location = BlobLocation.parse(url)
    store = BlobStore(location, Access(credential, quarter, ca_file))
    end = open_end(dst, Access(credential if dst_credential is None else dst_credential, quarter, ca_file))
    stores = [store, end.store] if isinstance(end, BlobEnd) else [store]
    with CopyFigures("consolidate", str(location), end.where, stores) as figures:
        checkpoint = open_checkpoint_in(store, location)
        output = _output(end, overwrite)
        tensors, object_keys = stored_tensors(checkpoint, keys), stored_objects(checkpoint, keys)
        if keys is not None and not tensors and not object_keys:
            raise _none_accepted(checkpoint)
        objects = dict(_objects(checkpoint, object_keys, quarter.memory_budget))
        if kind == "torch":
            size, data = _torch_file(checkpoint, tensors, objects, window)
        else:
            size, data = _safetensors_file(checkpoint, tensors, objects, window)
        try:
            with byte_meter("consolidate", checkpoint.url, size, progress) as meter, contextlib.closing(data):
                for view in data:
                    output.write(view)
                    meter.moved(view.nbytes)
                    figures.bytes += view.nbytes
            output.commit()
        finally:
            output.abandon()
        figures.items = len(tensors) + len(objects)
    return ConsolidateReport(output.where, kind, len(tensors), len(objects), size, figures.seconds)


def _none_accepted(checkpoint: OpenCheckpoint) -> ConfigurationError:
    there = list(checkpoint.metadata.state_dict_metadata)
    if not there:
        return ConfigurationError(f"{checkpoint.url} holds nothing that keys= could accept: it was saved empty")
    named = ", ".join(repr(key[:200]) for key in there[:5])
    return ConfigurationError(
        f"keys= accepts none of the {len(there)} keys of {checkpoint.url}, so nothing was written. There are "
        f"{named}{', ...' if len(there) > 5 else ''}. It is called with flattened names; inspect() lists them all"
    )


def _format(format: Format | None, dst: str | os.PathLike[str] | BlobLocation) -> Format:
    if format is not None:
        if format not in _SUFFIXES.values():
            raise ValueError(f"format is 'torch' or 'safetensors', not {format!r}")
        return format
    name = dst.name if isinstance(dst, BlobLocation) else os.fspath(dst).partition("?")[0]
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"the suffix {suffix!r} tells no format; it is one of {', '.join(_SUFFIXES)}, or pass format=")
    return _SUFFIXES[suffix]


# The file's bytes


def _torch_file(
    checkpoint: OpenCheckpoint,
    tensors: Mapping[str, TensorStorageMetadata],
    objects: Mapping[str, object],
    window: int,
) -> tuple[int, Generator[memoryview, None, None]]:
    placeholders = Placeholders(len(tensors))
    state: dict[Any, Any] = {}
    paths = checkpoint.metadata.planner_data
    # In the order of the metadata, which is that of the state dict.
    for key in checkpoint.metadata.state_dict_metadata:
        if key in tensors:
            entry = tensors[key]
            value: object = placeholders.make(key, entry.properties.dtype, entry.size)
        elif key in objects:
            value = objects[key]
        else:
            continue
        path = paths.get(key) if isinstance(paths, dict) else None
        _put(state, (key,) if path is None else path, value, f"{key!r} of {checkpoint.url}")
    drawn = outline(state, placeholders)

    def data() -> Generator[memoryview, None, None]:
        wanted = [(key, tensors[key]) for key in drawn.parts if isinstance(key, str)]
        with contextlib.closing(_tensor_bytes(checkpoint, wanted, window)) as stream:
            for piece in drawn.parts:
                if isinstance(piece, bytes):
                    yield memoryview(piece)
                elif isinstance(piece, torch.Tensor):
                    yield readable(piece)
                else:
                    left = _nbytes(tensors[piece])
                    while left:
                        view = next(stream)
                        left -= view.nbytes
                        yield view

    return drawn.size, data()


def _safetensors_file(
    checkpoint: OpenCheckpoint,
    tensors: Mapping[str, TensorStorageMetadata],
    objects: Mapping[str, object],
    window: int,
) -> tuple[int, Generator[memoryview, None, None]]:
    texts = {key: as_text(value) for key, value in objects.items()}
    refused = sorted(key for key, text in texts.items() if text is None)
    if refused:
        raise UnsupportedCheckpointError(
            f"A safetensors file holds tensors and simple values; {', '.join(map(repr, refused[:3]))}"
            f"{f' and {len(refused) - 3} more' if len(refused) > 3 else ''} of {checkpoint.url} are neither. Leave "
            "them out with keys=, or write a .pt file"
        )
    head, ordered = safetensors_head(tensors, {key: text for key, text in texts.items() if text is not None})

    def data() -> Generator[memoryview, None, None]:
        yield memoryview(head)
        yield from _tensor_bytes(checkpoint, ordered, window)

    return len(head) + sum(map(_nbytes, tensors.values())), data()


def _tensor_bytes(
    checkpoint: OpenCheckpoint, tensors: list[tuple[str, TensorStorageMetadata]], window: int
) -> Generator[memoryview, None, None]:
    with contextlib.closing(ahead(stream_chunks(checkpoint, tensors, window))) as windows:
        for parts in windows:
            for part in parts:
                yield readable(part.elements)


def _nbytes(entry: TensorStorageMetadata) -> int:
    return math.prod(entry.size) * entry.properties.dtype.itemsize


def _objects(checkpoint: OpenCheckpoint, keys: list[str], budget: int) -> Iterator[tuple[str, object]]:
    for key, stream in object_bytes(checkpoint, keys, budget):
        yield key, load_saved(stream, f"{key!r} of {checkpoint.url}", ", or leave the object out with keys=")


def _put(state: dict[Any, Any], path: tuple[Any, ...], value: object, what: str) -> None:
    """Set a value at its path in nested dicts and lists, making them as DCP's planner does: a list for a number."""
    try:
        if not path or not all(isinstance(step, str) or type(step) is int for step in path):
            raise TypeError(f"path {path!r}")
        here: Any = state
        for step, following in zip(path, [*path[1:], None], strict=True):
            if isinstance(here, list):
                if not 0 <= step < _LONGEST_LIST:
                    raise IndexError(f"index {step}")
                here.extend([None] * (step + 1 - len(here)))
            if following is None:
                here[step] = value
            else:
                inner = here[step] if isinstance(here, list) else here.get(step)
                if inner is None:
                    inner = here[step] = {} if isinstance(following, str) else []
                here = inner
    except (TypeError, IndexError, AttributeError) as error:
        raise CorruptCheckpointError(
            f"The metadata contradicts itself about the place of {what} in the state dict ({error}). Use another "
            "checkpoint"
        ) from error


# Where it goes


class _BlobOutput:
    def __init__(self, end: BlobEnd, overwrite: bool) -> None:
        self.where = end.where
        self._end = end
        self._writer = BlockWriter(end.store, end.location.path, BlobSettings(), if_missing=not overwrite)

    def write(self, view: memoryview) -> None:
        self._writer.write(view)

    def commit(self) -> None:
        try:
            self._writer.commit()
        except BlobExistsError as error:
            if self._end.may_look:  # somebody wrote it meanwhile
                raise
            raise _exists(self.where) from error

    def abandon(self) -> None:
        self._writer.abort()


class _FileOutput:
    def __init__(self, path: Path, overwrite: bool) -> None:
        self.where = str(path)
        self._sink = FileSink(path)
        self._overwrite = overwrite
        self._position = 0

    def write(self, view: memoryview) -> None:
        self._sink.write(self._position, view, 0, Cancel())
        self._position += view.nbytes

    def commit(self) -> None:
        try:
            self._sink.publish(only_new=not self._overwrite)
        except FileExistsError as error:
            raise _exists(self.where) from error

    def abandon(self) -> None:
        self._sink.abandon()


def _output(end: BlobEnd | FolderEnd, overwrite: bool) -> _BlobOutput | _FileOutput:
    if isinstance(end, FolderEnd):
        if end.root.is_dir():
            raise LocationError(f"{end.where} is a folder; append the name of the file")
        if not overwrite and end.root.exists():
            raise _exists(end.where)
        return _FileOutput(end.root, overwrite)
    if not end.location.path:
        raise LocationError(f"{end.where} is a container; the file needs a name in it")
    if not overwrite:
        try:
            end.store.stat(end.location.path)
            raise _exists(end.where)
        except BlobNotFoundError:
            pass
        except AccessDeniedError:  # the credential is for writing only; the commit is conditional all the same
            end.may_look = False
    return _BlobOutput(end, overwrite)


def _exists(where: str) -> CheckpointExistsError:
    return CheckpointExistsError(f"{where} exists already; choose another name, or replace it with overwrite=True")
