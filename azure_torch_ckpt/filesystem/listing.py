"""What lies where: blobs and the folders that their names make, as the dicts that fsspec hands out."""

from __future__ import annotations

import re
from typing import Any, Final, TypeAlias

from azure_torch_ckpt.errors import BlobNotFoundError
from azure_torch_ckpt.filesystem.content import FOLDER_MARK
from azure_torch_ckpt.filesystem.paths import PathParts
from azure_torch_ckpt.store import BlobInfo, BlobStore

__all__ = ["Entry", "file_entry", "folder_entries", "folder_entry", "is_commit_record", "look_up", "tree_entries"]

Entry: TypeAlias = dict[str, Any]
"""``name``, ``size`` and ``type``; of a blob also ``etag``, ``last_modified`` and ``created``."""

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


def folder_entry(parts: PathParts, name: str) -> Entry:
    return {"name": parts.child(name).rstrip("/"), "size": 0, "type": "directory"}


def look_up(store: BlobStore, parts: PathParts) -> Entry:
    """The entry of one path: one request for a blob, two for a folder.

    Where a blob and a folder have the same name, it is the blob, unless that is one of the empty ones by which other
    tools (and accounts with a hierarchical namespace) mark a folder.

    Raises:
        BlobNotFoundError: neither is there.
    """
    if not parts.name:
        next(store.list("", limit=1), None)  # fails if there is no container
        return folder_entry(parts, "")
    try:
        blob = store.stat(parts.name)
    except BlobNotFoundError:
        blob = None
    if blob is not None and blob.size:
        return file_entry(parts, blob)
    is_marker = blob is not None and (blob.metadata or {}).get(FOLDER_MARK) == "true"
    if is_marker or next(store.list(parts.folder, limit=1), None) is not None:
        return folder_entry(parts, parts.name)
    if blob is None:
        raise BlobNotFoundError(f"there is no blob and no folder {store.location}/{parts.name}")
    return file_entry(parts, blob)


def folder_entries(store: BlobStore, parts: PathParts) -> list[Entry]:
    """What lies right in a folder, in the order of the names; nothing if the folder is not there."""
    folders: dict[str, Entry] = {}
    blobs: list[BlobInfo] = []
    for found in store.list_folder(parts.folder):
        if isinstance(found, str):
            folders[found.rstrip("/")] = folder_entry(parts, found)
        elif found.path != parts.folder:
            blobs.append(found)
    files = [file_entry(parts, blob) for blob in blobs if blob.size or blob.path not in folders]
    return sorted([*files, *folders.values()], key=lambda entry: str(entry["name"]))


def tree_entries(store: BlobStore, parts: PathParts) -> tuple[list[Entry], list[Entry]]:
    """All blobs below a folder, at any depth, and all folders on the way."""
    blobs = list(store.list(parts.folder))
    folders: dict[str, Entry] = {}
    for blob in blobs:
        position = blob.path.rfind("/")
        while position >= len(parts.folder) and (name := blob.path[:position]) not in folders:
            folders[name] = folder_entry(parts, name)
            position = name.rfind("/")
    files = [
        file_entry(parts, blob)
        for blob in blobs
        if not blob.path.endswith("/") and (blob.size or blob.path not in folders)
    ]
    return files, list(folders.values())
