"""Which files a copy consists of, and the order in which blobs come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from fsspec.callbacks import Callback

from azure_torch_ckpt.filesystem.listing import is_commit_record
from azure_torch_ckpt.store import BlobInfo

__all__ = ["Pairs", "Progress", "commit_last", "parents", "removal_order"]

_T = TypeVar("_T")


class Pairs(Callback):  # type: ignore[misc]  # fsspec is not annotated
    """Stands for a callback while fsspec finds out which file goes where, and keeps that.

    ``AbstractFileSystem.get`` and ``put`` copy one file after the other. With this callback, `get_file` and `put_file`
    do nothing, and the caller copies the pairs as it likes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def branched(self, path_1: str, path_2: str, **_: Any) -> Pairs:
        self.found.append((path_1, path_2))
        return self


class Progress:
    """Tells callbacks of fsspec how far each of several files is. It may be called by several threads.

    Args:
        files: one callback for each file; it is told of bytes, and closed at the end.
        whole: told of files.
    """

    def __init__(self, files: Sequence[Callback], whole: Callback | None = None) -> None:
        self._files = files
        self._whole = whole
        self._left: list[int | None] = [None] * len(files)
        self._lock = threading.Lock()
        if whole is not None:
            whole.set_size(len(files))

    @classmethod
    def of_pairs(cls, callback: Callback, pairs: Iterable[tuple[str, str]]) -> Progress:
        return cls([callback.branched(*pair) for pair in pairs], callback)

    def __call__(self, number: int, arrived: int, size: int) -> None:
        with self._lock:
            file, left = self._files[number], self._left[number]
            if left is None:
                file.set_size(size)
                left = size
            self._left[number] = left = left - arrived
            file.relative_update(arrived)
            if left <= 0:
                file.close()
                if self._whole is not None:
                    self._whole.relative_update(1)


def commit_last(files: Sequence[_T], name: Callable[[_T], str]) -> list[list[_T]]:
    """Two groups: what makes a checkpoint complete is the second. The other way round is the order of removal."""
    return [
        [file for file in files if not is_commit_record(name(file))],
        [file for file in files if is_commit_record(name(file))],
    ]


def parents(paths: Iterable[str]) -> set[str]:
    """Those of the paths that are folders because other ones of them lie below."""
    known = set(paths)
    above = {path[:position] for path in known for position in _slashes(path)}
    return known & above


def removal_order(blobs: Iterable[BlobInfo]) -> list[list[str]]:
    """Groups of names that may be removed at a time, one group after the other.

    First what makes a checkpoint one, so that none is left half; then its data; last, from the bottom up, the blobs
    that mark a folder, for an account with a hierarchical namespace keeps a folder as long as anything is in it.
    """
    sizes = {blob.path: blob.size for blob in blobs}
    above = {name[:position] for name in sizes for position in _slashes(name)}
    markers = {name for name, size in sizes.items() if size == 0 and name.rstrip("/") in above}
    data, records = commit_last([name for name in sizes if name not in markers], str)
    depths = sorted({name.count("/") for name in markers}, reverse=True)
    return [records, data, *([name for name in markers if name.count("/") == depth] for depth in depths)]


def _slashes(name: str) -> list[int]:
    return [position for position, char in enumerate(name) if char == "/"]
