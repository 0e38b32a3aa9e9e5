"""What saves by `AzureBlobHuggingFaceWriter` that never committed left behind: files of theirs that no index names."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.removal import Remains, leftovers_in, newest
from azure_torch_ckpt.errors import BlobNotFoundError
from azure_torch_ckpt.huggingface.blob_names import INDEX, INDEX_LIMIT, INDEX_SUFFIX, parse_index, save_id_of
from azure_torch_ckpt.location import BlobLocation, has_empty_segment

__all__ = ["find_model_leftovers", "folders_of_mixed_saves", "has_saved_files", "other_files_at", "saved_files_at"]


@dataclass(slots=True)
class _ModelFolder:
    """A folder with files of our saves: those by save id, and the indices beside them."""

    path: str
    saves: dict[str, list[BlobInfo]] = field(default_factory=dict)
    indices: list[BlobInfo] = field(default_factory=list)


def has_saved_files(listed: Iterable[BlobInfo]) -> bool:
    """Whether any of the blobs is named as `AzureBlobHuggingFaceWriter` names them."""
    return any(save_id_of(_name(blob)) is not None for blob in listed)


def find_model_leftovers(
    store: BlobStore, location: BlobLocation, listed: Sequence[BlobInfo], oldest_to_keep: datetime.datetime
) -> list[Remains]:
    """Find the leftovers of saves by `AzureBlobHuggingFaceWriter`, as `find_leftovers` does for `AzureBlobWriter`.

    Only files that are named as it names them, and that no ``*.safetensors.index.json`` beside them names, are
    considered. The index of a folder is fetched where more than one save, or one later than the index, has left files.
    """

    def is_plainly_sound(folder: _ModelFolder) -> bool:
        # The index is younger than the files, and there is no other save that it could name.
        if len(folder.saves) != 1 or len(folder.indices) != 1 or _name(folder.indices[0]) != INDEX:
            return False
        [blobs] = folder.saves.values()
        return newest(blobs) <= folder.indices[0].last_modified and all(
            blob.path.endswith(".safetensors") for blob in blobs
        )

    def named_in(folder: _ModelFolder) -> set[str]:
        named: set[str] = set()
        for path in sorted({blob.path for blob in folder.indices} | {_join(folder.path, INDEX)}):
            try:
                data, _ = store.read(path, limit=INDEX_LIMIT)
            except BlobNotFoundError:
                continue
            files = parse_index(data, f"{store.location}/{path}").files
            named.update(_join(folder.path, name) for name in files.values())
        return named

    return leftovers_in(store, location, _model_folders(listed), oldest_to_keep, is_plainly_sound, named_in)


def saved_files_at(store: BlobStore, location: BlobLocation) -> set[str]:
    """List the files directly below `location` that `AzureBlobHuggingFaceWriter` made, named by an index or not.

    The result is empty where there is an index of another name, which may name any of them.
    """
    names = _names_at(store, location)
    if any(name.endswith(INDEX_SUFFIX) and name != INDEX for name in names):
        return set()
    return {name for name in names if save_id_of(name) is not None}


def other_files_at(store: BlobStore, location: BlobLocation) -> list[str]:
    """List the safetensors files directly below `location` that `AzureBlobHuggingFaceWriter` did not make."""
    names = _names_at(store, location)
    return sorted(name for name in names if name.endswith(".safetensors") and save_id_of(name) is None)


def _names_at(store: BlobStore, location: BlobLocation) -> list[str]:
    prefix = location.prefix
    return [blob.path[len(prefix) :] for blob in store.list_folder(prefix) if isinstance(blob, BlobInfo)]


def folders_of_mixed_saves(listed: Sequence[BlobInfo]) -> list[str]:
    """Find the folders with files of several saves, or of one without an index: a save is running there, or died.

    The listing alone decides, so folders are left out whose files an index of another name may name.
    """
    return [
        folder.path
        for folder in _model_folders(listed)
        if (len(folder.saves) > 1 or not folder.indices) and all(_name(blob) == INDEX for blob in folder.indices)
    ]


def _model_folders(listed: Sequence[BlobInfo]) -> list[_ModelFolder]:
    folders: dict[str, _ModelFolder] = {}
    for blob in listed:
        save_id = save_id_of(_name(blob))
        if save_id is not None and not has_empty_segment(blob.path):  # "m//x" is not in the folder of "m/x"
            path = blob.path.rpartition("/")[0]
            folders.setdefault(path, _ModelFolder(path)).saves.setdefault(save_id, []).append(blob)
    for blob in listed:
        path = blob.path.rpartition("/")[0]
        if path in folders and blob.path.endswith(INDEX_SUFFIX):
            folders[path].indices.append(blob)
    return [folders[path] for path in sorted(folders)]


def _name(blob: BlobInfo) -> str:
    return blob.path.rpartition("/")[2]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
