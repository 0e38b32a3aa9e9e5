"""`consolidate`: writes a sharded checkpoint as one `.pt` or safetensors file while reading it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from azure_torch_ckpt.blobs.blob_info import BlobSettings
from azure_torch_ckpt.blobs.block_writer import BlockWriter
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.catalog.copying.copy import CopyMetrics
from azure_torch_ckpt.catalog.copying.trees import BlobTree, FolderTree, LocalFile, open_tree
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.open_checkpoint import OpenCheckpoint, open_checkpoint_in
from azure_torch_ckpt.dcp.report import job_rank
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
from azure_torch_ckpt.huggingface.safetensors_header import as_text, dump_ordered_header
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import Meter, Progress, ProgressOption, check_progress

__all__ = ["ConsolidateReport", "Format", "consolidate"]

Format = Literal["torch", "safetensors"]

_SUFFIXES: dict[str, Format] = {
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".safetensors": "safetensors",
}
# Lists in a state dict hold parameter groups or layers. A larger index is damage, and would exhaust the memory.
_LONGEST_LIST = 1_000_000
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ConsolidateReport:
    """The result of `consolidate`.

    Attributes:
        dst: URL without a SAS, or local path of the file.
        format: ``"torch"`` or ``"safetensors"``.
        tensors: number of tensors in the file.
        objects: number of objects in the file.
        bytes: size of the file.
        seconds: duration of the call.
    """

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
    progress: ProgressOption = None,
    credential: Credential = None,
    dst_credential: Credential = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> ConsolidateReport:
    """Write the checkpoint at a URL as one file: a local path, or the URL of a blob.

    The file is written while the tensors are read, within ``options.memory_budget``. Objects are held whole, and so is
    one stored chunk at a time of a checkpoint by torch's own writer.

    ``"torch"`` is a file for ``torch.load(file, weights_only=True)``: the nested state dict that
    ``torch.distributed.checkpoint.format_utils.dcp_to_torch_save`` would write. (Zip tools other than torch's complain
    about checksums of 0; `dcp.tensors` has the reason.)

    ``"safetensors"`` holds the tensors under their flattened names (``model.layers.0.weight``). Its ``__metadata__``
    holds, as JSON, the values that are numbers, strings, booleans, None or lists and dicts of them; other values raise
    an error that names them.

    The file becomes visible when it is complete.

    Args:
        url: the checkpoint.
        dst: local path or URL of the file.
        format: None derives it from the suffix: ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` mean ``"torch"``.
        keys: write only the flattened names that it accepts.
        overwrite: replace a file that exists. False raises before anything is read.
        progress: as for `AzureBlobReader`; counts the bytes written.
        credential: for the checkpoint and the file.
        dst_credential: for the file, if it needs another one. Write permission is enough.

    Raises:
        ValueError: `format` is None, and the suffix is unknown.
        CheckpointNotFoundError: there is no complete checkpoint.
        CheckpointExistsError: the file exists.
        ConfigurationError: `keys` accepts nothing in the checkpoint.
        UnsupportedCheckpointError: the format cannot hold something in the checkpoint, or ``torch.load`` does not trust
            the class of an object. ``keys=`` can leave it out.
        CorruptCheckpointError: data is missing, short or damaged. No file was written.
        LocalFileError: the file could not be written.
        StoreError: a request failed.
    """
    check_progress(progress)
    file_format = _format(format, dst)
    if str(dst).endswith("/"):
        raise LocationError("The target ends with a slash, so it is a folder; append the name of the file")
    options = options or TransferOptions()
    # A quarter for reading, a quarter for writing, and the rest for up to three windows in between.
    quarter = dataclasses.replace(options, memory_budget=max(options.memory_budget // 4, _MIB))
    window = quarter.memory_budget // 2
    location = BlobLocation.parse(url)
    store = BlobStore(location, Access(credential, quarter, ca_file))
    tree = open_tree(dst, Access(credential if dst_credential is None else dst_credential, quarter, ca_file))
    stores = [store, tree.store] if isinstance(tree, BlobTree) else [store]
    with CopyMetrics("consolidate", str(location), str(tree), stores) as metrics:
        checkpoint = open_checkpoint_in(store, location)
        _check_target(tree, overwrite)
        tensors, object_keys = stored_tensors(checkpoint, keys), stored_objects(checkpoint, keys)
        if keys is not None and not tensors and not object_keys:
            raise _no_key_error(checkpoint)
        objects = {
            key: load_saved(stream, f"{key!r} of {checkpoint.url}", ", or leave the object out with keys=")
            for key, stream in object_bytes(checkpoint, object_keys, quarter.memory_budget)
        }
        if file_format == "torch":
            size, data = _torch_file(checkpoint, tensors, objects, window)
        else:
            size, data = _safetensors_file(checkpoint, tensors, objects, window)
        zero = Progress("consolidate", checkpoint.url, job_rank(), 0, size, 0.0)

        def counted() -> Generator[memoryview, None, None]:
            with Meter(progress, zero) as meter, contextlib.closing(data):  # ends before the commit
                for view in data:
                    yield view
                    meter.moved(view.nbytes)
                    metrics.bytes += view.nbytes

        with contextlib.closing(counted()) as views:
            if isinstance(tree, BlobTree):
                _write_blob(tree, views, overwrite)
            else:
                _write_file(tree, views, overwrite)
        metrics.items = len(tensors) + len(objects)
    return ConsolidateReport(str(tree), file_format, len(tensors), len(objects), size, metrics.seconds)


def _no_key_error(checkpoint: OpenCheckpoint) -> ConfigurationError:
    keys = list(checkpoint.metadata.state_dict_metadata)
    if not keys:
        return ConfigurationError(f"{checkpoint.url} is empty, so keys= accepts nothing")
    some = ", ".join(repr(key[:200]) for key in keys[:5])
    return ConfigurationError(
        f"keys= accepts none of the {len(keys)} keys of {checkpoint.url}, so nothing was written. The keys are "
        f"{some}{', ...' if len(keys) > 5 else ''}. keys= is called with flattened names; inspect() lists them all"
    )


def _format(format: Format | None, dst: str | os.PathLike[str] | BlobLocation) -> Format:
    if format is not None:
        if format not in _SUFFIXES.values():
            raise ValueError(f"format is 'torch' or 'safetensors', not {format!r}")
        return format
    name = dst.name if isinstance(dst, BlobLocation) else os.fspath(dst).partition("?")[0]
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"the suffix {suffix!r} implies no format; use one of {', '.join(_SUFFIXES)}, or pass format=")
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
    # The metadata has the order of the state dict.
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
    file = outline(state, placeholders)

    def data() -> Generator[memoryview, None, None]:
        in_order = [(key, tensors[key]) for key in file.parts if isinstance(key, str)]
        with contextlib.closing(_tensor_views(checkpoint, in_order, window)) as stream:
            for part in file.parts:
                if isinstance(part, bytes):
                    yield memoryview(part)
                elif isinstance(part, torch.Tensor):
                    yield readable(part)
                else:
                    nbytes_left = _nbytes(tensors[part])
                    while nbytes_left:
                        view = next(stream)
                        nbytes_left -= view.nbytes
                        yield view

    return file.size, data()


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
    head, ordered = dump_ordered_header(tensors, {key: text for key, text in texts.items() if text is not None})

    def data() -> Generator[memoryview, None, None]:
        yield memoryview(head)
        yield from _tensor_views(checkpoint, ordered, window)

    return len(head) + sum(map(_nbytes, tensors.values())), data()


def _tensor_views(
    checkpoint: OpenCheckpoint, tensors: list[tuple[str, TensorStorageMetadata]], window: int
) -> Generator[memoryview, None, None]:
    with contextlib.closing(ahead(stream_chunks(checkpoint, tensors, window))) as windows:
        for parts in windows:
            for part in parts:
                yield readable(part.elements)


def _nbytes(entry: TensorStorageMetadata) -> int:
    return math.prod(entry.size) * entry.properties.dtype.itemsize


def _put(state: dict[Any, Any], path: tuple[Any, ...], value: object, what: str) -> None:
    """Set a value at its path in nested dicts and lists, creating them as DCP's planner does: a list for a number."""
    try:
        if not path or not all(isinstance(step, str) or type(step) is int for step in path):
            raise TypeError(f"path {path!r}")
        container: Any = state
        for step, following in zip(path, [*path[1:], None], strict=True):
            if isinstance(container, list):
                if not 0 <= step < _LONGEST_LIST:
                    raise IndexError(f"index {step}")
                container.extend([None] * (step + 1 - len(container)))
            if following is None:
                container[step] = value
            else:
                inner = container[step] if isinstance(container, list) else container.get(step)
                if inner is None:
                    inner = container[step] = {} if isinstance(following, str) else []
                container = inner
    except (TypeError, IndexError, AttributeError) as error:
        raise CorruptCheckpointError(
            f"The metadata contradicts itself about the place of {what} in the state dict ({error}). Use another "
            "checkpoint"
        ) from error


# The output


def _check_target(tree: BlobTree | FolderTree, overwrite: bool) -> None:
    """Check that the file, whose URL or path is the root of `tree`, can be written there."""
    if isinstance(tree, FolderTree):
        if tree.root.is_dir():
            raise LocationError(f"{tree} is a folder; append the name of the file")
        if not overwrite and tree.root.exists():
            raise _exists_error(tree)
        return
    if not tree.location.path:
        raise LocationError(f"{tree} is a container; append the name of the file")
    if not overwrite:
        try:
            tree.store.stat(tree.location.path)
            raise _exists_error(tree)
        except BlobNotFoundError:
            pass
        except AccessDeniedError:  # a write-only credential; the commit has the same condition
            tree.readable = False


def _write_blob(tree: BlobTree, views: Iterable[memoryview], overwrite: bool) -> None:
    writer = BlockWriter(tree.store, tree.location.path, BlobSettings(), if_missing=not overwrite)
    try:
        for view in views:
            writer.write(view)
        writer.commit()
    except BlobExistsError as error:
        if tree.readable:  # another process wrote the blob meanwhile
            raise
        raise _exists_error(tree) from error
    finally:
        writer.abort()


def _write_file(tree: FolderTree, views: Iterable[memoryview], overwrite: bool) -> None:
    file = LocalFile(tree.root)
    position = 0
    try:
        for view in views:
            file.write(position, view)
            position += view.nbytes
        if not file.publish(only_new=not overwrite):
            raise _exists_error(tree)
    finally:
        file.abandon()


def _exists_error(tree: BlobTree | FolderTree) -> CheckpointExistsError:
    return CheckpointExistsError(f"{tree} exists already; choose another name, or replace it with overwrite=True")
