"""Whole blobs and ranges of them, to memory and to disk: small ones side by side, large ones in parallel parts."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
from azure_torch_ckpt.blobs.transfer import Download, Read
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.errors import AzureCheckpointError, BlobNotFoundError
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["Range", "delete_all", "each", "read_blob", "read_ranges", "save_to_disk"]

# What is asked for before the blob's size is known, so that a small one costs one request.
_FIRST = 4 * 1024 * 1024
# Large files that are begun and not complete. A process may have as few as 256 descriptors (macOS).
_OPEN_FILES = 100


@dataclass(frozen=True, slots=True)
class Range:
    """A slice of a blob, as Python slices: negative ends count from the blob's end, None is open."""

    name: str
    start: int | None
    end: int | None

    def within(self, size: int) -> tuple[int, int]:
        """Offset and length in a blob of so many bytes."""
        start, end, _ = slice(self.start, self.end).indices(size)
        return start, max(end - start, 0)


@dataclass(frozen=True, slots=True)
class _Begun:
    """The beginning of a range, and what the first answer told about the blob."""

    data: bytes
    info: BlobInfo
    offset: int
    length: int


def each(tasks: Sequence[Callable[[], object]], threads: int) -> None:
    """Run tasks on several threads. The first error stops the rest and is raised."""
    if len(tasks) <= 1:
        for task in tasks:
            task()
        return
    run_all(tasks, threads, "blob-files")


def read_blob(store: BlobStore, wanted: Range) -> bytes:
    """One blob or a slice of it.

    Raises:
        BlobNotFoundError: there is no such blob.
        BlobChangedError: it was replaced between two requests.
    """
    [content] = read_ranges(store, [wanted])
    if isinstance(content, AzureCheckpointError):
        raise content
    return content


def read_ranges(store: BlobStore, wanted: Sequence[Range]) -> list[bytes | AzureCheckpointError]:
    """Slices of blobs; what cannot be read has its error in the place of its bytes."""
    begun: list[_Begun | AzureCheckpointError | None] = [None] * len(wanted)

    def begin(number: int) -> None:
        try:
            first = begun[number] = _begin(store, wanted[number])
            if first.info.is_folder:
                begun[number] = BlobNotFoundError(f"{store.location}/{first.info.path} is a folder, not a blob")
        except AzureCheckpointError as error:
            begun[number] = error

    each([functools.partial(begin, number) for number in range(len(wanted))], store.options.concurrency)
    result: list[bytes | AzureCheckpointError] = []
    for one in begun:
        assert one is not None
        try:
            result.append(one if isinstance(one, AzureCheckpointError) else _complete(store, one))
        except AzureCheckpointError as error:
            result.append(error)
    return result


def save_to_disk(
    store: BlobStore, files: Sequence[tuple[int, str, str]], progress: Callable[[int, int, int], object]
) -> None:
    """Copy blobs to local files, each of which appears when all of it is there.

    Args:
        files: a number, the blob's name and the file's path.
        progress: called with the number, bytes that have arrived, and the blob's size; by several threads.

    Raises:
        BlobNotFoundError: there is no such blob.
        BlobChangedError: it was replaced between two requests.
        OSError: the disk.
    """
    large: list[tuple[int, _Begun, AtomicFile]] = []
    waiting = iter(files)

    def begin(number: int, name: str, path: str) -> None:
        begun = _begin(store, Range(name, None, None))
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
                stack.pop_all()  # it stays open
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
                _receive(store, begun, new.file.fileno(), functools.partial(progress, number))
                new.publish(sync=False)
        finally:
            for _, _, new in large:
                new.abandon()
            large.clear()


def delete_all(store: BlobStore, blobs: Iterable[BlobInfo]) -> None:
    """Delete blobs, and directories that are empty; those that are gone already are no error."""
    cancel = Cancel()
    run_all(
        (functools.partial(_delete, store, blob, cancel) for blob in blobs),
        store.options.concurrency,
        "blob-remove",
        cancel.cancel,
    )


def _begin(store: BlobStore, wanted: Range) -> _Begun:
    start, end = wanted.start or 0, wanted.end
    if start < 0 or (end is not None and end < 0):
        info = store.stat(wanted.name)
        return _Begun(b"", info, *wanted.within(info.size))
    data, info = store.read_some(wanted.name, start, _FIRST if end is None else max(min(end - start, _FIRST), 1))
    offset, length = wanted.within(info.size)
    return _Begun(data[:length], info, offset, length)


def _complete(store: BlobStore, begun: _Begun) -> bytes:
    have = len(begun.data)
    if have == begun.length:
        return begun.data
    # Of all that the standard library has, only this gives bytes that were written in place.
    memory = io.BytesIO()
    memory.write(begun.data)
    memory.seek(begun.length - 1)
    memory.write(b"\0")
    with memory.getbuffer() as view:
        rest = Read(begun.info.path, begun.offset + have, begun.length - have, view[have:])
        Download(store, rest.length, if_etag=begun.info.etag).run([rest])
        del rest
    return memory.getvalue()


def _receive(store: BlobStore, begun: _Begun, descriptor: int, progress: Callable[[int, int], object]) -> None:
    """The rest of a blob, into an open file."""
    download = Download(store, begun.length, if_etag=begun.info.etag)

    def write(at: int, view: memoryview) -> None:
        done = 0
        while done < view.nbytes:
            done += os.pwrite(descriptor, view[done:], at + done)
        progress(view.nbytes, begun.length)

    parts = range(len(begun.data), begun.length, download.part_size)
    download.run(
        Read(begun.info.path, at, min(download.part_size, begun.length - at), None, functools.partial(write, at))
        for at in parts
    )


def _delete(store: BlobStore, blob: BlobInfo, cancel: Cancel) -> None:
    if blob.is_folder:
        store.delete_folder(blob.path, cancel=cancel)
    else:
        store.delete(blob.path, cancel=cancel)
