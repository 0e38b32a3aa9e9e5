"""Which source is copied to which destination: https://filesystem-spec.readthedocs.io/en/latest/copying.html."""

from __future__ import annotations

import os
from collections.abc import Iterable
from glob import has_magic
from typing import Any

from fsspec.implementations.local import LocalFileSystem, make_path_posix
from fsspec.utils import other_paths

from azure_torch_ckpt.errors import AccessDeniedError, LocationError
from azure_torch_ckpt.filesystem.expansion import Expansion, is_pattern, without_folders
from azure_torch_ckpt.filesystem.listing_filesystem import ListingFileSystem
from azure_torch_ckpt.filesystem.paths import refuse_folder

__all__ = ["copy_pairs", "get_pairs", "put_pairs", "refuse_mixed", "refuse_one_file"]


def copy_pairs(
    fs: ListingFileSystem, path1: Any, path2: Any, recursive: bool, found: Expansion
) -> list[tuple[str, str]]:
    """Return which blob `copy` writes to which path.

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
        # A folder is not copied without `recursive`, and "m/" names one even if there is a blob "m".
        is_folder = str(path1).endswith("/")
        sources = [] if is_folder else [one for one in blobs if found[one] is not None or not fs.isdir(one)]
    if not sources:
        return []
    if is_one and is_pattern(fs, path1, found):
        into_folder = len(sources) == 1
    else:
        into_folder = is_one and str(path1)[-1:] != "/" and _is_folder_to_fill(fs, path2)
    sources.sort()
    destinations = other_paths(sources, fs._strip_protocol(path2), exists=into_folder, flatten=not is_one)
    return [pair for pair in zip(sources, destinations, strict=True) if pair[0] in blobs]


def get_pairs(
    fs: ListingFileSystem, rpath: Any, lpath: Any, recursive: bool, maxdepth: int | None, found: Expansion
) -> list[tuple[str, str]]:
    """Return which blob or folder `get` copies to which local path.

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
    destination = make_path_posix(os.fspath(lpath)) if isinstance(lpath, (str, os.PathLike)) else lpath
    if is_one and is_pattern(fs, rpath, found):
        into_folder = len(sources) == 1
    else:
        is_folder = isinstance(destination, str) and (destination.endswith("/") or LocalFileSystem().isdir(destination))
        into_folder = is_one and is_folder and not str(rpath).endswith("/")
    return list(zip(sources, other_paths(sources, destination, exists=into_folder, flatten=not is_one), strict=True))


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
    if is_one and has_magic(source):
        into_folder = len(sources) == 1
    else:
        into_folder = is_one and source[-1:] != "/" and _is_folder_to_fill(fs, rpath)
    destinations = other_paths(sources, fs._strip_protocol(rpath), exists=into_folder, flatten=not is_one)
    return list(zip(sources, destinations, strict=True))


def refuse_mixed(fs: ListingFileSystem, pairs: Iterable[tuple[str, str]]) -> None:
    """Refuse copies of which one would overwrite the source or the destination of another one.

    Raises:
        LocationError: two sources have one destination, or a source is the destination of another one.
    """
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
    """Refuse to copy two blobs to one local file, as ``a/b`` and ``a//b`` would be.

    Raises:
        LocationError: two blobs have one destination.
    """
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
