"""Which blobs a path, a pattern or a list of them means."""

from __future__ import annotations

import os
from glob import has_magic
from typing import Any

from azure_torch_ckpt.errors import BlobNotFoundError
from azure_torch_ckpt.filesystem.entries import Entry
from azure_torch_ckpt.filesystem.listing_filesystem import ListingFileSystem
from azure_torch_ckpt.filesystem.paths import parents

__all__ = ["Expansion", "expand", "is_pattern", "roots_of_trees", "without_folders"]

Expansion = dict[str, Entry | None]
"""Stripped paths with their entries; None for a path that was not looked up."""


def expand(fs: ListingFileSystem, path: Any, recursive: bool, maxdepth: int | None) -> Expansion:
    """Return what fsspec's ``expand_path`` returns, with the entries that are known.

    Raises:
        BlobNotFoundError: there is no such blob and no such folder.
    """
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

    No root is returned twice, and none that lies below another one.

    Raises:
        BlobNotFoundError: a pattern matches nothing, and there is no blob of that name.
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
