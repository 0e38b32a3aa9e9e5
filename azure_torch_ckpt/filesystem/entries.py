"""Blobs, and the folders that their names imply, as the dicts ("entries") that fsspec returns."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeAlias

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError, RequestRefusedError
from azure_torch_ckpt.filesystem.paths import PathParts

__all__ = ["Entry", "folder_entries", "look_up", "own_blob", "tree_entries"]

Entry: TypeAlias = dict[str, Any]
"""``name``, ``size`` and ``type``; of a blob also ``etag``, ``last_modified`` and ``created``."""

_log = logging.getLogger(__name__)


def look_up(store: BlobStore, parts: PathParts) -> Entry:
    """Return the entry of one path, with one request for a blob and two for a folder.

    Where a blob and a folder have the same name, the entry is the blob's, unless the blob is empty: some tools mark
    folders by empty blobs.

    Raises:
        BlobNotFoundError: there is neither a blob nor a folder.
    """
    if not parts.name:
        next(store.list("", limit=1), None)  # raises if there is no container
        return _folder_entry(parts, "")
    blob = _blob(store, parts.name)
    if blob is not None and blob.is_folder:
        return _folder_entry(parts, parts.name)
    if blob is not None and (blob.size or blob.resource_type is not None):
        return _full_entry(parts, blob)
    try:
        if next(store.list(parts.folder, limit=1), None) is not None:
            return _folder_entry(parts, parts.name)
    except AccessDeniedError:
        if blob is None:
            raise
    except RequestRefusedError:  # an account with directories refuses to list below a blob
        pass
    if blob is None:
        raise BlobNotFoundError(f"there is no blob and no folder {store.location}/{parts.name}")
    return _full_entry(parts, blob)


def own_blob(store: BlobStore, parts: PathParts, *, only_folder: bool) -> list[BlobInfo]:
    """Return the blob that has exactly the name of a path, if there is one; with `only_folder`, if it is a folder."""
    blob = _blob(store, parts.name)
    return [] if blob is None or (only_folder and not blob.is_folder) else [blob]


def folder_entries(store: BlobStore, parts: PathParts) -> list[Entry]:
    """Return the direct children of a folder, sorted by name; nothing if there is no such folder.

    A name with an empty segment implies no folder of its own: ``a//b`` is a direct child of ``a``.
    """
    folders: dict[str, Entry] = {}
    blobs: list[BlobInfo] = []
    for child in _children(store, parts.folder):
        if isinstance(child, str) or child.is_folder:
            name = (child if isinstance(child, str) else child.path).rstrip("/")
            if name.startswith(parts.folder) and name != parts.name:
                folders[name] = _folder_entry(parts, name)
        elif _has_path(store, child):
            blobs.append(child)
    files = [_file_entry(parts, blob) for blob in blobs if blob.size or blob.path not in folders]
    return sorted([*files, *folders.values()], key=lambda entry: str(entry["name"]))


def tree_entries(store: BlobStore, parts: PathParts, prefix: str = "") -> tuple[list[Entry], list[Entry]]:
    """Return all blobs below a folder whose path there starts with `prefix`, and all folders that contain them."""
    blobs: list[BlobInfo] = []
    folders: dict[str, Entry] = {}
    for blob in store.list(parts.folder + prefix):
        if not blob.is_folder:
            blobs.append(blob)
        name = blob.path if blob.is_folder else blob.path.rpartition("/")[0]
        while len(name) > len(parts.folder) and name not in folders:
            if not name.endswith("/"):
                folders[name] = _folder_entry(parts, name)
            name = name.rpartition("/")[0]
    files = [
        _file_entry(parts, blob) for blob in blobs if (blob.size or blob.path not in folders) and _has_path(store, blob)
    ]
    return files, list(folders.values())


def _file_entry(parts: PathParts, info: BlobInfo) -> Entry:
    return {
        "name": parts.child(info.path),
        "size": info.size,
        "type": "file",
        "etag": info.etag,
        "last_modified": info.last_modified,
        "created": info.created,
    }


def _full_entry(parts: PathParts, info: BlobInfo) -> Entry:
    """`_file_entry` with the properties that the service returns only for a single blob."""
    return {
        **_file_entry(parts, info),
        "metadata": dict(info.metadata or {}),
        "content_settings": info.content,
        "tag_count": info.tag_count,
        "blob_type": info.kind,
    }


def _folder_entry(parts: PathParts, name: str) -> Entry:
    return {"name": parts.child(name).rstrip("/"), "size": 0, "type": "directory"}


def _blob(store: BlobStore, name: str) -> BlobInfo | None:
    """Return the blob of a name, with a credential that may read it or list it."""
    try:
        return store.stat(name)
    except BlobNotFoundError:
        return None
    except AccessDeniedError as error:
        try:
            first = next(store.list(name, limit=1), None)
        except AccessDeniedError:
            raise error from None
        return first if first is not None and first.path == name else None


def _children(store: BlobStore, prefix: str) -> Iterator[BlobInfo | str]:
    """Yield what `BlobStore.list_folder` yields, and the children of a folder without a name in its place."""
    for child in store.list_folder(prefix):
        if isinstance(child, str) and child[len(prefix) :] == "/":
            yield from _children(store, child)
        else:
            yield child


def _has_path(store: BlobStore, blob: BlobInfo) -> bool:
    """Whether a path of the filesystem can name the blob. A path that ends with a slash means a folder."""
    if not blob.path.endswith("/"):
        return True
    _log.warning("%s/%s is left out: no path can end with a slash. BlobIO reads such a blob", store.location, blob.path)
    return False
