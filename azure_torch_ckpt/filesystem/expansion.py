"""Which blobs a path, a pattern or a list means, and which source is copied to which destination."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from glob import has_magic
from typing import Any

from fsspec.implementations.local import LocalFileSystem, make_path_posix
from fsspec.utils import other_paths

from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError, LocationError
from azure_torch_ckpt.filesystem.entries import Entry
from azure_torch_ckpt.filesystem.listing_filesystem import ListingFileSystem
from azure_torch_ckpt.filesystem.paths import parents, refuse_folder

__all__ = [
    "Expansion",
    "copy_pairs",
    "expand",
    "get_pairs",
    "is_pattern",
    "put_pairs",
    "refuse_mixed",
    "refuse_one_file",
    "roots_of_trees",
    "without_folders",
]

Expansion = dict[str, Entry | None]
"""Stripped paths with their entries; None for a path that was not looked up."""


def expand(fs: ListingFileSystem, path: Any, recursive: bool, maxdepth: int | None) -> Expansion:
    """Return what fsspec's ``expand_path`` returns, with known entries. Nothing is a `BlobNotFoundError`."""
    if maxdepth is not None and maxdepth < 1:
        raise ValueError("maxdepth must be at least 1")
    found: Expansion = {}
    for one in _paths(path):
        root = fs._strip_protocol(one)
        roots: Expansion = {root: None}
        depth = maxdepth
        matched = _matches(fs, root, path, maxdepth)
        if matched:
            roots = {**matched}
            found |= roots
            depth = maxdepth if maxdepth is None or root in matched else maxdepth - 1
        if recursive and depth != 0:
            for folder in roots:
                found |= fs.find(folder, maxdepth=depth, withdirs=True, detail=True)
        # A pattern without matches may be a name: "m[1].pt", say, as `find` returned it.
        literal = not has_magic(root) or (not matched and (recursive or fs.exists(root)))
        if literal and root not in found and (not recursive or fs.exists(root)):
            found[root] = None
    if not found:
        raise BlobNotFoundError(f"there is no blob and no folder {path!r}")
    return {name: found[name] for name in sorted(found)}


def without_folders(found: Expansion) -> list[str]:
    """Return the expanded paths that are blobs or were not looked up."""
    above = parents(found)
    return [one for one, entry in found.items() if one not in above and (entry is None or entry["type"] == "file")]


def is_pattern(fs: ListingFileSystem, path: Any, found: Expansion) -> bool:
    """Whether an expanded path is a pattern, and not the exact name of a blob, such as ``m[1].pt``."""
    return has_magic(str(path)) and fs._strip_protocol(path) not in found


def roots_of_trees(fs: ListingFileSystem, path: Any) -> list[str]:
    """Return the roots of the trees that a recursive removal of `path` (names or patterns) removes.

    No root is returned twice, and none that lies below another one. `BlobNotFoundError`: a pattern matches nothing, and
    there is no blob of that name.
    """
    roots: list[str] = []
    for one in _paths(path):
        roots += _matches(fs, str(one), path, None) or [str(one)]
    stripped = {fs._strip_protocol(root) for root in roots}
    kept: dict[str, str] = {}
    for root in roots:
        name = fs._strip_protocol(root)
        if stripped.isdisjoint(parents([name])):
            # "m" includes the blob of that name, "m/" does not: prefer "m" where both are given.
            kept[name] = min(root, kept.get(name, root), key=lambda one: one.endswith("/"))
    return list(kept.values())


def _paths(path: Any) -> Any:
    return path if isinstance(path, (list, tuple, set)) else [path]


def _matches(fs: ListingFileSystem, one: str, given: Any, maxdepth: int | None) -> dict[str, Entry]:
    """Return what `one` matches, if it is a pattern.

    Args:
        given: `one`, or the collection that it comes from. A collection may well consist of names that `find` returned.
            So an exact name in it matches only itself: otherwise other blobs would be removed in place of ``b[1]``, or
            together with ``st*r``.
    """
    if not has_magic(one):
        return {}
    if not isinstance(given, (str, os.PathLike)):
        entry = fs._info_or_none(one)
        if entry is not None:
            return {entry["name"]: entry}
    matched: dict[str, Entry] = fs.glob(one, maxdepth=maxdepth, detail=True)
    return matched


def copy_pairs(
    fs: ListingFileSystem, path1: Any, path2: Any, recursive: bool, found: Expansion
) -> list[tuple[str, str]]:
    """Return which blob `copy` writes to which path; `found` is `path1`, expanded.

    https://filesystem-spec.readthedocs.io/en/latest/copying.html has the rules of this and the next two functions.
    """
    if isinstance(path1, list) and isinstance(path2, list):
        refuse_folder(*path1, *path2)
        return list(zip(fs._strip_protocol(path1), fs._strip_protocol(path2), strict=True))
    is_one = not isinstance(path1, list)
    blobs = set(without_folders(found))
    sources = list(found)
    if is_one and not recursive:
        # A folder is not copied without `recursive`, and "m/" names one even if there is a blob "m".
        is_folder = str(path1).endswith("/")
        sources = [] if is_folder else [one for one in blobs if found[one] is not None or not fs.isdir(one)]
    if not sources:
        return []
    matched = is_one and is_pattern(fs, path1, found)
    destination = fs._strip_protocol(path2)
    pairs = _pairs(sorted(sources), path1, is_one, matched, destination, lambda: _is_folder_to_fill(fs, path2))
    return [pair for pair in pairs if pair[0] in blobs]


def get_pairs(
    fs: ListingFileSystem, rpath: Any, lpath: Any, recursive: bool, maxdepth: int | None, found: Expansion
) -> list[tuple[str, str]]:
    """Return which blob or folder `get` copies to which local path; `found` is `rpath`, expanded."""
    is_one = isinstance(rpath, (str, os.PathLike))
    sources = list(found)
    if is_one and (not recursive or maxdepth is not None):
        is_folder = str(rpath).endswith("/") and not recursive
        blobs = [] if is_folder else without_folders(found)
        sources = [one for one in blobs if found[one] is not None or not fs.isdir(one)]
    if not sources:
        return []
    destination = make_path_posix(os.fspath(lpath)) if isinstance(lpath, (str, os.PathLike)) else lpath

    def is_folder_to_fill() -> bool:
        return isinstance(destination, str) and (destination.endswith("/") or LocalFileSystem().isdir(destination))

    return _pairs(sources, rpath, is_one, is_one and is_pattern(fs, rpath, found), destination, is_folder_to_fill)


def put_pairs(
    fs: ListingFileSystem, lpath: Any, rpath: Any, recursive: bool, maxdepth: int | None
) -> list[tuple[str, str]]:
    """Return which local file or folder `put` copies to which path."""
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
    matched = is_one and has_magic(source)
    destination = fs._strip_protocol(rpath)
    return _pairs(sources, source, is_one, matched, destination, lambda: _is_folder_to_fill(fs, rpath))


def _pairs(
    sources: list[str],
    given: Any,
    is_one: bool,
    is_matched: bool,
    destination: Any,
    is_folder_to_fill: Callable[[], bool],
) -> list[tuple[str, str]]:
    """Return each source with its destination.

    The caller named `given`: one path (`is_one`), which may be a pattern (`is_matched`), or a list of paths.
    `is_folder_to_fill` may cost a request: whether a copy to the destination goes below it.
    """
    below = is_one and not str(given).endswith("/")
    into_folder = len(sources) == 1 if is_matched else below and is_folder_to_fill()
    return list(zip(sources, other_paths(sources, destination, exists=into_folder, flatten=not is_one), strict=True))


def refuse_mixed(fs: ListingFileSystem, pairs: Iterable[tuple[str, str]]) -> None:
    """Raise `LocationError` if one copy would overwrite the source or the destination of another one."""
    source_of: dict[str, str] = {}
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    sources = {source for source, _ in pairs}
    for source, destination in pairs:
        other = source_of.setdefault(destination, source)
        if other != source:
            raise LocationError(
                f"{fs.unstrip_protocol(other)} and {fs.unstrip_protocol(source)} have the same destination, "
                f"{fs.unstrip_protocol(destination)}. Nothing was copied. Name each destination"
            )
        if destination in sources:
            raise LocationError(
                f"{fs.unstrip_protocol(source)} would overwrite {fs.unstrip_protocol(destination)}, which is to be "
                "copied as well. Nothing was copied. Copy to another folder first"
            )


def refuse_one_file(fs: ListingFileSystem, pairs: Iterable[tuple[str, str]]) -> None:
    """Raise `LocationError` if two blobs go to one local file, as ``a/b`` and ``a//b`` would."""
    source_of: dict[str, str] = {}
    for source, destination in pairs:
        other = source_of.setdefault(os.path.normpath(destination), source)
        if other != source:
            raise LocationError(
                f"{fs.unstrip_protocol(other)} and {fs.unstrip_protocol(source)} have the same destination, "
                f"{destination}: a local path has no empty segments. Nothing was copied. Get them one by one"
            )


def _is_folder_to_fill(fs: ListingFileSystem, path: Any) -> bool:
    """Whether a copy to `path` goes below it. If the credential may not look, it does not."""
    if isinstance(path, list):
        return False
    if str(path).endswith("/"):
        return True
    try:
        return fs.isdir(path)
    except AccessDeniedError:
        return False
