"""What saves of models that never committed left behind: files of theirs that no index names."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.store import BlobInfo, BlobStore
from azure_torch_ckpt.blobs.workers import Workers
from azure_torch_ckpt.dcp.removal import Remains
from azure_torch_ckpt.errors import BlobNotFoundError
from azure_torch_ckpt.huggingface.format import INDEX, INDEX_LIMIT, parse_index
from azure_torch_ckpt.huggingface.layout import SAVED_FILE
from azure_torch_ckpt.location import BlobLocation, has_empty_segment
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["find_model_remains", "has_saved_files", "mixed_folders", "other_files_at", "saved_files_at"]

_INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(slots=True)
class _Model:
    """A folder with files of our saves: those by save id, and the indices that lie beside them."""

    folder: str
    saves: dict[str, list[BlobInfo]] = field(default_factory=dict)
    indices: list[BlobInfo] = field(default_factory=list)


def has_saved_files(listed: Iterable[BlobInfo]) -> bool:
    """Whether there is a file that is named as `AzureBlobHuggingFaceWriter` names them."""
    return any(SAVED_FILE.fullmatch(_name(blob)) for blob in listed)


def find_model_remains(
    store: BlobStore, location: BlobLocation, listed: Sequence[BlobInfo], oldest_to_keep: datetime.datetime
) -> list[Remains]:
    """The files of saves that never committed a model, and those that a removal which was broken off left.

    Only files that are named as `AzureBlobHuggingFaceWriter` names them, and that no ``*.safetensors.index.json``
    beside them names, are considered. A save that still runs looks just like one that failed, so only saves that
    nothing was added to since `oldest_to_keep` count.

    The index of a folder is fetched where more than one save, or one later than the index, has left files.

    Args:
        store: of the container that `location` lies in.
        listed: blobs of the container, of a listing that was made before now.

    Raises:
        CheckpointError: an index cannot be read, so nobody can tell what it names.
        StoreError: the service could not be asked.
    """
    models = {model.folder: model for model in _models(listed)}
    doubtful = [model for model in models.values() if _is_old(model, oldest_to_keep) and not _is_plainly_sound(model)]
    named: dict[str, set[str]] = {model.folder: set() for model in doubtful}
    cancel = Cancel()

    def read(model: _Model, path: str) -> None:
        try:
            data, _ = store.read(path, limit=INDEX_LIMIT)
        except BlobNotFoundError:
            return
        named[model.folder].update(parse_index(data, f"{store.location}/{path}").files.values())

    with Workers(store.options.concurrency, "blob-prune", cancel.cancel) as workers:
        for model in doubtful:
            # Not only those that the listing saw: a save may have been committed since.
            paths = {blob.path for blob in model.indices} | {_join(model.folder, INDEX)}
            for path in sorted(paths):
                workers.submit(functools.partial(read, model, path))
        workers.finish()
    found = []
    for model in doubtful:
        where = location.container_root()
        url = str(where.join(model.folder) if model.folder else where)
        for save_id, blobs in sorted(model.saves.items()):
            stray = [blob for blob in blobs if _name(blob) not in named[model.folder]]
            if stray and _newest(blobs) <= oldest_to_keep:
                size = sum(blob.size for blob in stray)
                found.append(Remains(url, save_id, [blob.path for blob in stray], size, _newest(blobs)))
    return found


def saved_files_at(store: BlobStore, location: BlobLocation) -> set[str]:
    """Names of the files right at `location` that `AzureBlobHuggingFaceWriter` made, named by an index or not.

    None where an index of another name lies beside them, which may name any of them.

    Raises:
        StoreError: the service could not be asked.
    """
    names = _names_at(store, location)
    if any(name.endswith(_INDEX_SUFFIX) and name != INDEX for name in names):
        return set()
    return {name for name in names if SAVED_FILE.fullmatch(name)}


def other_files_at(store: BlobStore, location: BlobLocation) -> list[str]:
    """Names of the safetensors files right at `location` that `AzureBlobHuggingFaceWriter` did not make.

    Raises:
        StoreError: the service could not be asked.
    """
    names = _names_at(store, location)
    return sorted(name for name in names if name.endswith(".safetensors") and not SAVED_FILE.fullmatch(name))


def _names_at(store: BlobStore, location: BlobLocation) -> list[str]:
    prefix = location.prefix
    return [blob.path[len(prefix) :] for blob in store.list_folder(prefix) if isinstance(blob, BlobInfo)]


def mixed_folders(listed: Sequence[BlobInfo]) -> list[str]:
    """Folders with files of several saves of models, or of one without an index: a save is running there, or has died.

    By the listing alone, so folders are left out whose files an index of another name may name.
    """
    return [
        model.folder
        for model in _models(listed)
        if (len(model.saves) > 1 or not model.indices) and all(_name(blob) == INDEX for blob in model.indices)
    ]


def _models(listed: Sequence[BlobInfo]) -> list[_Model]:
    models: dict[str, _Model] = {}
    for blob in listed:
        match = SAVED_FILE.fullmatch(_name(blob))
        if match is not None and not has_empty_segment(blob.path):  # "m//x" is not in the folder of "m/x"
            folder = blob.path.rpartition("/")[0]
            models.setdefault(folder, _Model(folder)).saves.setdefault(match[1], []).append(blob)
    for blob in listed:
        folder = blob.path.rpartition("/")[0]
        if folder in models and blob.path.endswith(_INDEX_SUFFIX):
            models[folder].indices.append(blob)
    return [models[folder] for folder in sorted(models)]


def _is_old(model: _Model, oldest_to_keep: datetime.datetime) -> bool:
    return any(_newest(blobs) <= oldest_to_keep for blobs in model.saves.values())


def _is_plainly_sound(model: _Model) -> bool:
    """Whether the index must name the files: it is younger, and there is no other save that it could name."""
    if len(model.saves) != 1 or len(model.indices) != 1 or _name(model.indices[0]) != INDEX:
        return False
    [blobs] = model.saves.values()
    return _newest(blobs) <= model.indices[0].last_modified and all(
        blob.path.endswith(".safetensors") for blob in blobs
    )


def _newest(blobs: Iterable[BlobInfo]) -> datetime.datetime:
    return max(blob.last_modified for blob in blobs)


def _name(blob: BlobInfo) -> str:
    return blob.path.rpartition("/")[2]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
