"""Reads of many blobs, to memory and to disk: small ones at the same time, large ones in parallel ranges."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fsspec.callbacks import Callback

from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.download import Download, Read
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.errors import AzureCheckpointError, BlobNotFoundError

__all__ = ["BlobSlice", "FileCallbacks", "read_slice", "read_slices", "save_to_disk"]

# Requested before the blob's size is known, so that a small blob costs one request.
_FIRST = 4 * 1024 * 1024
# The number of large files that are open at the same time. A process may have as few as 256 descriptors (macOS).
_OPEN_FILES = 100


@dataclass(frozen=True, slots=True)
class BlobSlice:
    """A slice of a blob, as Python slices: a negative bound counts from the blob's end, None is no bound."""

    name: str
    start: int | None
    end: int | None

    def within(self, size: int) -> tuple[int, int]:
        """Return offset and length of the slice in a blob of `size` bytes."""
        start, end, _ = slice(self.start, self.end).indices(size)
        return start, max(end - start, 0)


@dataclass(frozen=True, slots=True)
class _FirstAnswer:
    """The first bytes of a slice, the blob's properties that came with them, and the slice in bytes."""

    data: bytes
    info: BlobInfo
    offset: int
    length: int


class FileCallbacks:
    """Reports to callbacks of fsspec how much of several files has arrived. Threads may call it at the same time.

    A file's callback gets the number of bytes, and is closed at the file's end; `total` gets the number of files.
    """

    def __init__(self, files: Sequence[Callback], total: Callback | None = None) -> None:
        self._files = files
        self._total = total
        self._left: list[int | None] = [None] * len(files)
        self._lock = threading.Lock()
        if total is not None:
            total.set_size(len(files))

    def __call__(self, number: int, arrived: int, size: int) -> None:
        """Count `arrived` more bytes of file `number`, which has `size` bytes."""
        with self._lock:
            file, left = self._files[number], self._left[number]
            if left is None:
                file.set_size(size)
                left = size
            self._left[number] = left = left - arrived
            file.relative_update(arrived)
            if left <= 0:
                file.close()
                if self._total is not None:
                    self._total.relative_update(1)


def read_slice(store: BlobStore, wanted: BlobSlice) -> bytes:
    """Return the bytes of a slice; raise `BlobChangedError` if the blob was replaced between two requests."""
    return _rest_to_memory(store, _request_first(store, wanted))


def read_slices(store: BlobStore, wanted: Sequence[BlobSlice]) -> list[bytes | AzureCheckpointError]:
    """Return the bytes of slices or, for each one that cannot be read, the error."""
    answers: list[_FirstAnswer | AzureCheckpointError | None] = [None] * len(wanted)

    def begin(number: int) -> None:
        try:
            answers[number] = _request_first(store, wanted[number])
        except AzureCheckpointError as error:
            answers[number] = error

    tasks = (functools.partial(begin, number) for number in range(len(wanted)))
    run_all(tasks, store.options.concurrency, "blob-files")
    contents: list[bytes | AzureCheckpointError] = []
    for answer in answers:
        assert answer is not None
        try:
            contents.append(answer if isinstance(answer, AzureCheckpointError) else _rest_to_memory(store, answer))
        except AzureCheckpointError as error:
            contents.append(error)
    return contents


def save_to_disk(
    store: BlobStore, files: Sequence[tuple[int, str, str]], progress: Callable[[int, int, int], object]
) -> None:
    """Copy blobs to local files. Each file appears when it is complete.

    Args:
        files: a number, the blob's name and the file's path.
        progress: called by several threads with the number, the bytes that have arrived, and the blob's size.

    Raises:
        BlobNotFoundError, BlobChangedError: there is no such blob, or it was replaced between two requests.
        OSError: a local file cannot be written.
    """
    large: list[tuple[int, _FirstAnswer, AtomicFile]] = []
    waiting = iter(files)

    def begin(number: int, name: str, path: str) -> None:
        begun = _request_first(store, BlobSlice(name, None, None))
        if begun.info.is_folder:
            os.makedirs(path, exist_ok=True)
            progress(number, 0, 0)
            return
        with contextlib.ExitStack() as stack:
            new = stack.enter_context(AtomicFile(path))
            new.file.write(begun.data)
            new.file.truncate(begun.length)
            if begun.length > len(begun.data):
                large.append((number, begun, new))
                stack.pop_all()  # keeps the file open
            else:
                new.publish(sync=False)
        progress(number, len(begun.data), begun.length)

    def tasks(first: tuple[int, str, str]) -> Iterator[Callable[[], object]]:
        yield functools.partial(begin, *first)
        while len(large) < _OPEN_FILES and (file := next(waiting, None)):
            yield functools.partial(begin, *file)

    for first in waiting:
        try:
            run_all(tasks(first), store.options.concurrency, "blob-files")
            for number, begun, new in large:
                _rest_to_file(store, begun, new.file.fileno(), functools.partial(progress, number))
                new.publish(sync=False)
        finally:
            for _, _, new in large:
                new.abandon()
            large.clear()


def _request_first(store: BlobStore, wanted: BlobSlice) -> _FirstAnswer:
    start, end = wanted.start or 0, wanted.end
    if start < 0 or (end is not None and end < 0):
        info = store.stat(wanted.name)
        return _FirstAnswer(b"", info, *wanted.within(info.size))
    data, info = store.read_some(wanted.name, start, _FIRST if end is None else max(min(end - start, _FIRST), 1))
    offset, length = wanted.within(info.size)
    return _FirstAnswer(data[:length], info, offset, length)


def _rest_to_memory(store: BlobStore, begun: _FirstAnswer) -> bytes:
    """Return the whole slice."""
    if begun.info.is_folder:
        raise BlobNotFoundError(f"{store.location}/{begun.info.path} is a folder, not a blob")
    have = len(begun.data)
    if have == begun.length:
        return begun.data
    # In the standard library, only BytesIO returns bytes that were written in place.
    memory = io.BytesIO()
    memory.write(begun.data)
    memory.seek(begun.length - 1)
    memory.write(b"\0")
    with memory.getbuffer() as view:
        rest = Read(begun.info.path, begun.offset + have, begun.length - have, view[have:])
        Download(store, rest.length, if_etag=begun.info.etag).run([rest])
        del rest
    return memory.getvalue()


def _rest_to_file(
    store: BlobStore, begun: _FirstAnswer, descriptor: int, progress: Callable[[int, int], object]
) -> None:
    """Write all but the first bytes of a blob to an open file."""
    download = Download(store, begun.length, if_etag=begun.info.etag)

    def write(at: int, view: memoryview) -> None:
        done = 0
        while done < view.nbytes:
            done += os.pwrite(descriptor, view[done:], at + done)
        progress(view.nbytes, begun.length)

    offsets = range(len(begun.data), begun.length, download.part_size)
    download.run(
        Read(begun.info.path, at, min(download.part_size, begun.length - at), None, functools.partial(write, at))
        for at in offsets
    )
