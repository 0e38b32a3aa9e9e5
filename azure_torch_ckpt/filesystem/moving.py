"""Which blobs and files a path means, where each is copied, and the order in which blobs come and go."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from glob import has_magic
from typing import Any, TypeVar

from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem, make_path_posix
from fsspec.utils import other_paths

from azure_torch_ckpt.blobs.store import BlobInfo
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError, LocationError
from azure_torch_ckpt.filesystem.listing import Entry, is_commit_record
from azure_torch_ckpt.filesystem.looking import LookingFileSystem
from azure_torch_ckpt.filesystem.paths import refuse_folder

__all__ = [
    "Progress",
    "commit_last",
    "copy_pairs",
    "expand",
    "get_pairs",
    "parents",
    "put_pairs",
    "refuse_mixed",
    "removal_order",
    "roots_of_trees",
    "without_folders",
]

_T = TypeVar("_T")


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


def expand(fs: LookingFileSystem, path: Any, recursive: bool, maxdepth: int | None) -> dict[str, Entry | None]:
    """What ``expand_path`` gives, and what is known of each path: None where nothing was asked for it.

    Raises:
        BlobNotFoundError: nothing is there.
    """
    if maxdepth is not None and maxdepth < 1:
        raise ValueError("maxdepth must be at least 1")
    found: dict[str, Entry | None] = {}
    for one in path if isinstance(path, (list, tuple, set)) else [path]:
        root = fs._strip_protocol(one)
        roots: dict[str, Entry | None] = {root: None}
        depth = maxdepth
        matched = _matches(fs, root, path, maxdepth)
        if matched:
            roots = {**matched}
            found |= roots
            depth = maxdepth if maxdepth is None or root in matched else maxdepth - 1
        if recursive and depth != 0:
            for each in roots:
                found |= fs.find(each, maxdepth=depth, withdirs=True, detail=True)
        # What matches nothing may be a name: of "m[1].pt", say, as `find` gave it.
        literal = not has_magic(root) or (not matched and (recursive or fs.exists(root)))
        if literal and root not in found and (not recursive or fs.exists(root)):
            found[root] = None
    if not found:
        raise BlobNotFoundError(f"there is no blob and no folder {path!r}")
    return {name: found[name] for name in sorted(found)}


def without_folders(found: dict[str, Entry | None]) -> list[str]:
    """Those of expanded paths that are of blobs, or that nothing is known of."""
    above = parents(found)
    return [one for one, entry in found.items() if one not in above and (entry is None or entry["type"] == "file")]


def roots_of_trees(fs: LookingFileSystem, path: Any) -> list[str]:
    """What `path`, names or patterns, means for a removal with all that lies below: nothing twice, nor in another.

    Raises:
        BlobNotFoundError: a pattern matches nothing, and is no name either.
    """
    roots: list[str] = []
    for one in path if isinstance(path, (list, tuple, set)) else [path]:
        roots += _matches(fs, str(one), path, None) or [str(one)]
    stripped = {fs._strip_protocol(root) for root in roots}
    kept: dict[str, str] = {}
    for root in roots:
        name = fs._strip_protocol(root)
        if not any(name[:position] in stripped for position in _slashes(name)):
            # Where both "m/" and "m" are given, "m" means more.
            kept[name] = min(root, kept.get(name, root), key=lambda one: one.endswith("/"))
    return list(kept.values())


def refuse_mixed(fs: LookingFileSystem, pairs: Iterable[tuple[str, str]]) -> None:
    """Refuse copies that would write over what another of them reads or has written.

    Raises:
        LocationError: two sources have one target, or a source is another one's target.
    """
    sources: dict[str, str] = {}
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    read = {source for source, _ in pairs}
    for source, target in pairs:
        other = sources.setdefault(target, source)
        if other != source:
            raise LocationError(
                f"{fs.unstrip_protocol(other)} and {fs.unstrip_protocol(source)} would both be "
                f"{fs.unstrip_protocol(target)}, and one of them would be lost. Nothing was copied; name each target"
            )
        if target in read:
            raise LocationError(
                f"{fs.unstrip_protocol(source)} would be written over {fs.unstrip_protocol(target)}, which is to be "
                "copied as well. Nothing was copied; copy to another place first"
            )


def copy_pairs(
    fs: LookingFileSystem, path1: Any, path2: Any, recursive: bool, found: dict[str, Entry | None]
) -> list[tuple[str, str]]:
    """Which blob goes where: https://filesystem-spec.readthedocs.io/en/latest/copying.html.

    Args:
        found: `path1`, expanded.
    """
    if isinstance(path1, list) and isinstance(path2, list):
        refuse_folder(*path1, *path2)
        return list(zip(fs._strip_protocol(path1), fs._strip_protocol(path2), strict=True))
    is_one = not isinstance(path1, list)
    blobs = set(without_folders(found))
    sources = list(found)
    if is_one and not recursive:
        # A folder is not copied without `recursive`, and "m/" names one whether or not there is a blob "m".
        is_folder = str(path1).endswith("/")
        sources = [] if is_folder else [one for one in blobs if found[one] is not None or not fs.isdir(one)]
    if not sources:
        return []
    if is_one and _is_pattern(fs, path1, found):
        below = len(sources) == 1
    else:
        below = is_one and str(path1)[-1:] != "/" and _is_folder_to_fill(fs, path2)
    targets = other_paths(sorted(sources), fs._strip_protocol(path2), exists=below, flatten=not is_one)
    return [pair for pair in zip(sorted(sources), targets, strict=True) if pair[0] in blobs]


def get_pairs(
    fs: LookingFileSystem, rpath: Any, lpath: Any, recursive: bool, maxdepth: int | None, found: dict[str, Entry | None]
) -> list[tuple[str, str]]:
    """Which blob goes to which local file, by the same rules; folders as well.

    Args:
        found: `rpath`, expanded.
    """
    is_one = isinstance(rpath, (str, os.PathLike))
    sources = list(found)
    if is_one and (not recursive or maxdepth is not None):
        is_folder = str(rpath).endswith("/") and not recursive
        blobs = [] if is_folder else without_folders(found)
        sources = [one for one in blobs if found[one] is not None or not fs.isdir(one)]
    if not sources:
        return []
    target = make_path_posix(os.fspath(lpath)) if isinstance(lpath, (str, os.PathLike)) else lpath
    if is_one and _is_pattern(fs, rpath, found):
        below = len(sources) == 1
    else:
        is_folder = isinstance(target, str) and (target.endswith("/") or LocalFileSystem().isdir(target))
        below = is_one and is_folder and not str(rpath).endswith("/")
    return list(zip(sources, other_paths(sources, target, exists=below, flatten=not is_one), strict=True))


def put_pairs(
    fs: LookingFileSystem, lpath: Any, rpath: Any, recursive: bool, maxdepth: int | None
) -> list[tuple[str, str]]:
    """Which local file goes where, by the same rules."""
    if isinstance(lpath, list) and isinstance(rpath, list):
        return list(zip(lpath, rpath, strict=True))
    is_one = isinstance(lpath, (str, os.PathLike))
    local = LocalFileSystem()
    source = make_path_posix(os.fspath(lpath)) if is_one else lpath
    sources = local.expand_path(source, recursive=recursive, maxdepth=maxdepth)
    if is_one and (not recursive or maxdepth is not None):
        sources = [one for one in sources if not local.isdir(one)]
        if not sources:
            return []
    if is_one and has_magic(source):
        below = len(sources) == 1
    else:
        below = is_one and source[-1:] != "/" and _is_folder_to_fill(fs, rpath)
    targets = other_paths(sources, fs._strip_protocol(rpath), exists=below, flatten=not is_one)
    return list(zip(sources, targets, strict=True))


def _matches(fs: LookingFileSystem, one: str, given: Any, maxdepth: int | None) -> dict[str, Entry]:
    """What matches `one`, if it is a pattern.

    Args:
        given: `one`, or what it comes from. If that is a list, it may well be of names that `find` gave, so what has
            the very name is all that matches: other blobs would be removed in place of ``b[1]``, or with ``st*r``.
    """
    if not has_magic(one):
        return {}
    if not isinstance(given, (str, os.PathLike)):
        entry = fs._info_or_none(one)
        if entry is not None:
            return {entry["name"]: entry}
    matched: dict[str, Entry] = fs.glob(one, maxdepth=maxdepth, detail=True)
    return matched


def _is_pattern(fs: LookingFileSystem, path: Any, found: dict[str, Entry | None]) -> bool:
    """Whether an expanded path is a pattern, and not the very name of all that was found, like ``m[1].pt``."""
    return has_magic(str(path)) and fs._strip_protocol(path) not in found


def _is_folder_to_fill(fs: LookingFileSystem, path: Any) -> bool:
    """Whether what is copied to `path` goes below it. Where the credential does not allow to look, it does not."""
    if isinstance(path, list):
        return False
    if str(path).endswith("/"):
        return True
    try:
        return fs.isdir(path)
    except AccessDeniedError:
        return False


def removal_order(blobs: Iterable[BlobInfo]) -> list[list[BlobInfo]]:
    """Groups of blobs that may be removed at a time, one group after the other.

    First what makes a checkpoint one, so that none is left half; then its data; last, from the bottom up, the blobs
    that stand for a folder, for an account with a hierarchical namespace keeps a directory while anything is in it.
    """
    by_name = {blob.path: blob for blob in blobs}
    above = {name[:position] for name in by_name for position in _slashes(name)}
    folders: list[BlobInfo] = []
    others: list[BlobInfo] = []
    for blob in by_name.values():
        (folders if blob.is_folder or (not blob.size and blob.path in above) else others).append(blob)
    data, records = commit_last(others, lambda blob: blob.path)
    depths = sorted({blob.path.count("/") for blob in folders}, reverse=True)
    return [records, data, *([blob for blob in folders if blob.path.count("/") == depth] for depth in depths)]


def _slashes(name: str) -> list[int]:
    return [position for position, char in enumerate(name) if char == "/"]
