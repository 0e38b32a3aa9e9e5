"""What lies where: blobs and the folders that their names make, as the dicts that fsspec hands out."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError, RequestRefusedError
from azure_torch_ckpt.filesystem.paths import PathParts

__all__ = [
    "Entry",
    "file_entry",
    "folder_entries",
    "folder_entry",
    "is_commit_record",
    "look_up",
    "own_blob",
    "tree_entries",
]

Entry: TypeAlias = dict[str, Any]
"""``name``, ``size`` and ``type``; of a blob also ``etag``, ``last_modified`` and ``created``."""

_log = logging.getLogger(__name__)

# The blob that makes a checkpoint one: see dcp/layout.py, and transformers' index of a sharded model.
_COMMIT_RECORD: Final = re.compile(r"(?:.*/)?(?:(?:__\d+)?\.metadata|[^/]*\.safetensors\.index\.json)")


def is_commit_record(name: str) -> bool:
    """Whether a checkpoint is complete because this blob exists. It is removed first and copied last."""
    return _COMMIT_RECORD.fullmatch(name) is not None


def file_entry(parts: PathParts, info: BlobInfo) -> Entry:
    return {
        "name": parts.child(info.path),
        "size": info.size,
        "type": "file",
        "etag": info.etag,
        "last_modified": info.last_modified,
        "created": info.created,
    }


def full_entry(parts: PathParts, info: BlobInfo) -> Entry:
    """`file_entry`, with all that the service tells of a single blob."""
    return {
        **file_entry(parts, info),
        "metadata": dict(info.metadata or {}),
        "content_settings": info.content,
        "tag_count": info.tag_count,
        "blob_type": info.kind,
    }


def folder_entry(parts: PathParts, name: str) -> Entry:
    return {"name": parts.child(name).rstrip("/"), "size": 0, "type": "directory"}


def look_up(store: BlobStore, parts: PathParts) -> Entry:
    """The entry of one path: one request for a blob, two for a folder.

    Where a blob and a folder have the same name, it is the blob, unless that is an empty one, by which some tools mark
    a folder.

    Raises:
        BlobNotFoundError: neither is there.
    """
    if not parts.name:
        next(store.list("", limit=1), None)  # fails if there is no container
        return folder_entry(parts, "")
    blob = _blob(store, parts.name)
    if blob is not None and blob.is_folder:
        return folder_entry(parts, parts.name)
    if blob is not None and (blob.size or blob.resource_type is not None):
        return full_entry(parts, blob)
    try:
        if next(store.list(parts.folder, limit=1), None) is not None:
            return folder_entry(parts, parts.name)
    except AccessDeniedError:
        if blob is None:
            raise
    except RequestRefusedError:  # in an account with directories, below a blob
        pass
    if blob is None:
        raise BlobNotFoundError(f"there is no blob and no folder {store.location}/{parts.name}")
    return full_entry(parts, blob)


def own_blob(store: BlobStore, parts: PathParts, *, only_folder: bool) -> list[BlobInfo]:
    """The blob of the very name of a path, if there is one.

    Args:
        only_folder: and if it stands for a folder.
    """
    blob = _blob(store, parts.name)
    return [] if blob is None or (only_folder and not blob.is_folder) else [blob]


def folder_entries(store: BlobStore, parts: PathParts) -> list[Entry]:
    """What lies right in a folder, in the order of the names; nothing if the folder is not there.

    Names with an empty segment (``a//b``) have no folder of their own: ``a//b`` lies right in ``a``.
    """
    folders: dict[str, Entry] = {}
    blobs: list[BlobInfo] = []
    for found in _children(store, parts.folder):
        if isinstance(found, str) or found.is_folder:
            name = (found if isinstance(found, str) else found.path).rstrip("/")
            if name.startswith(parts.folder) and name != parts.name:
                folders[name] = folder_entry(parts, name)
        elif _has_path(store, found):
            blobs.append(found)
    files = [file_entry(parts, blob) for blob in blobs if blob.size or blob.path not in folders]
    return sorted([*files, *folders.values()], key=lambda entry: str(entry["name"]))


def tree_entries(store: BlobStore, parts: PathParts, begins: str = "") -> tuple[list[Entry], list[Entry]]:
    """All blobs below a folder, at any depth, and all folders on the way.

    Args:
        begins: only what begins so, after the folder.
    """
    blobs: list[BlobInfo] = []
    folders: dict[str, Entry] = {}
    for blob in store.list(parts.folder + begins):
        if not blob.is_folder:
            blobs.append(blob)
        name = blob.path if blob.is_folder else blob.path.rpartition("/")[0]
        while len(name) > len(parts.folder) and name not in folders:
            if not name.endswith("/"):
                folders[name] = folder_entry(parts, name)
            name = name.rpartition("/")[0]
    files = [
        file_entry(parts, blob) for blob in blobs if (blob.size or blob.path not in folders) and _has_path(store, blob)
    ]
    return files, list(folders.values())


def _blob(store: BlobStore, name: str) -> BlobInfo | None:
    """The blob of a name, for whoever may read it or list it."""
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
    """What `BlobStore.list_folder` gives, where what is in a folder without a name counts as in the one above."""
    for found in store.list_folder(prefix):
        if isinstance(found, str) and found[len(prefix) :] == "/":
            yield from _children(store, found)
        else:
            yield found


def _has_path(store: BlobStore, blob: BlobInfo) -> bool:
    """Whether a path of the filesystem can name the blob: the slash at a path's end says that a folder is meant."""
    if not blob.path.endswith("/"):
        return True
    _log.warning("%s/%s is left out: no path can end with a slash. BlobIO reads such a blob", store.location, blob.path)
    return False
