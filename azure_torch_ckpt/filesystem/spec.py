"""`AzureBlobFileSystem`: the fsspec filesystem behind ``azblob://`` URLs."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

from fsspec.callbacks import DEFAULT_CALLBACK, Callback

from azure_torch_ckpt.blobs.blob_copy import copy_blob
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.dcp.removal import remove_empty_folders
from azure_torch_ckpt.errors import (
    BlobChangedError,
    BlobExistsError,
    BlobNotFoundError,
    LocationError,
    RequestRefusedError,
)
from azure_torch_ckpt.filesystem.content import Range, delete_all, each, read_blob, read_ranges, save_to_disk
from azure_torch_ckpt.filesystem.hints import refuse_unknown, without_hints
from azure_torch_ckpt.filesystem.listing import own_blob
from azure_torch_ckpt.filesystem.moving import (
    Progress,
    commit_last,
    copy_pairs,
    expand,
    get_pairs,
    put_pairs,
    refuse_mixed,
    removal_order,
    roots_of_trees,
    without_folders,
)
from azure_torch_ckpt.filesystem.opening import OpeningFileSystem
from azure_torch_ckpt.filesystem.paths import refuse_folder
from azure_torch_ckpt.location import has_empty_segment
from azure_torch_ckpt.options import TransferOptions

__all__ = ["AzureBlobFileSystem"]

_PIECE = 32 * 1024 * 1024
# What is written with one request, and so several blobs at a time; a larger one keeps all connections busy by itself.
_ONE_REQUEST = 8 * 1024 * 1024


class AzureBlobFileSystem(OpeningFileSystem):
    """Blob Storage for everything that takes an fsspec URL: ``azblob://ACCOUNT/CONTAINER/NAME``.

        fs = fsspec.filesystem("azblob", credential=DefaultAzureCredential())
        fs.ls("azblob://account/container/runs")
        frame = pandas.read_parquet("azblob://account/container/table.parquet")

    Paths are those of `BlobLocation`, also ``https://HOST/CONTAINER/NAME``; a SAS is not part of a path. Folders are
    what the names of blobs make them, so there is none without a blob, and `mkdir` does nothing. Nothing is cached:
    every answer is the service's of that moment. `exists`, `isdir` and `isfile` are false only if the service says that
    nothing is there; if it cannot be asked, they raise.

    Args:
        endpoint: the service's URL, where it does not follow from the account: that of the emulator
            (``http://127.0.0.1:10000/devstoreaccount1``), or another cloud's.
        credential: as for `AzureBlobWriter`. At most one of this and the next four is given.
        account_key, sas_token, connection_string: the same under the names that adlfs has. The ``BlobEndpoint`` of a
            connection string counts as `endpoint` for its account.
        anon: True for anonymous access.
        options: limits of connections, memory and time.
        ca_file: a PEM file with certificates to trust besides the platform's.

    Without a credential, the environment is looked at for every path: ``AZURE_STORAGE_CONNECTION_STRING``, then
    ``AZURE_STORAGE_KEY``, then ``AZURE_STORAGE_SAS_TOKEN``, then what `DefaultAzureCredential` finds.

    `to_json` and `to_dict` leave the credential and `options` out; a pickle has both.

    Raises:
        CredentialError: more than one credential, or one that cannot be used.
        LocationError: `endpoint` is no URL of Blob Storage. Of all methods: a path that names no container, or that
            breaks the service's rules for names.
        StoreError (all methods): the service cannot be reached or refuses. `BlobNotFoundError` and
            `ContainerNotFoundError` are a `FileNotFoundError`, `AccessDeniedError` a `PermissionError`.
    """

    # Reading and writing

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **hints: Any) -> bytes:
        """A blob's bytes, or a slice of them; large ones in parallel."""
        refuse_unknown("cat_file", hints)
        refuse_folder(path)
        store, parts = self._at(path)[1:]
        return read_blob(store, Range(parts.name, start, end))

    def cat_ranges(
        self,
        paths: list[str],
        starts: int | list[int] | None,
        ends: int | list[int] | None,
        max_gap: int | None = None,
        on_error: str = "return",
        **hints: Any,
    ) -> list[bytes | Exception]:
        """Slices of blobs, small ones side by side and large ones in parallel parts, each of one state of its blob.

        Args:
            max_gap: ignored.
            on_error: ``"return"`` puts an error into the place of a slice; ``"raise"`` raises it.
        """
        refuse_unknown("cat_ranges", hints)
        _check("on_error", on_error, "return", "raise")
        starts_ = starts if isinstance(starts, list) else [starts] * len(paths)
        ends_ = ends if isinstance(ends, list) else [ends] * len(paths)
        if len(starts_) != len(paths) or len(ends_) != len(paths):
            raise ValueError("paths, starts and ends must have the same length")
        places = [self._at(path) for path in paths]
        result: list[bytes | Exception] = [b""] * len(paths)
        for container in {store.location for _, store, _ in places}:
            numbers = [number for number, (_, store, _) in enumerate(places) if store.location == container]
            wanted = [Range(places[number][2].name, starts_[number], ends_[number]) for number in numbers]
            for number, content in zip(numbers, read_ranges(places[numbers[0]][1], wanted), strict=True):
                result[number] = content
        errors = [content for content in result if isinstance(content, Exception)]
        if errors and on_error != "return":
            raise errors[0]
        return result

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise", **hints: Any) -> Any:
        """The bytes of one blob, or a dict with those of many, fetched in parallel.

        Args:
            on_error: ``"raise"``; ``"return"`` has the error in the place of the bytes, ``"omit"`` nothing.
        """
        refuse_unknown("cat", hints)
        _check("on_error", on_error, "raise", "return", "omit")
        found = expand(self, path, recursive, None)
        paths = list(found)
        if len(paths) == 1 and not isinstance(path, list) and paths[0] == self._strip_protocol(path):
            return self.cat_file(path)
        if recursive:
            paths = without_folders(found)
        contents = self.cat_ranges(paths, None, None, on_error="return" if on_error != "raise" else "raise")
        return {
            one: content
            for one, content in zip(paths, contents, strict=True)
            if on_error != "omit" or isinstance(content, bytes)
        }

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **settings: Any) -> None:
        """Write a blob.

        Args:
            mode: ``"overwrite"``, or ``"create"``, which raises `BlobExistsError` if there is one.
            settings: those of `open`.
        """
        _check("mode", mode, "overwrite", "create")
        settings = without_hints(settings)
        refuse_folder(path)
        _, store, parts = self._at(path)
        view = memoryview(value)
        if mode == "create" or self._intrans or settings or view.nbytes > _ONE_REQUEST or not parts.name:
            # By its blocks, a new blob is known again where the answer to its commit is lost.
            with self.open(path, "xb" if mode == "create" else "wb", **settings) as file:
                file.write(value)
            return
        store.put(parts.name, bytes(view))

    def pipe(self, path: Any, value: bytes | None = None, **settings: Any) -> None:
        """Write a blob, or those of a dict from paths to bytes, several at a time."""
        values: dict[str, Any] = path if isinstance(path, dict) else {path: value}
        tasks = [functools.partial(self.pipe_file, one, content, **settings) for one, content in values.items()]
        if self._intrans:
            for task in tasks:
                task()
        else:
            each(tasks, self._threads)

    # Between a disk and blobs

    def get_file(
        self, rpath: str, lpath: Any, callback: Callback = DEFAULT_CALLBACK, outfile: Any = None, **hints: Any
    ) -> None:
        """Copy a blob to a local file, which appears when all of it is there. A folder becomes a local one."""
        refuse_unknown("get_file", hints)
        if outfile is not None or hasattr(lpath, "write"):
            super().get_file(rpath, lpath, callback=callback, outfile=outfile)
            return
        try:
            self._fetch([(rpath, lpath)], Progress([callback]))
        except BlobNotFoundError:
            if not self.isdir(rpath):
                raise
            os.makedirs(lpath, exist_ok=True)

    def get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Callback = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **hints: Any,
    ) -> None:
        """Copy blobs to a local disk, small ones several at a time."""
        refuse_unknown("get", hints)
        if isinstance(rpath, list) and isinstance(lpath, list):
            pairs = list(zip(rpath, lpath, strict=True))
            blobs = {source for source, _ in pairs}
        else:
            found = expand(self, rpath, recursive, maxdepth)
            pairs, blobs = get_pairs(self, rpath, lpath, recursive, maxdepth, found), set(without_folders(found))
        for source, target in pairs:
            if source not in blobs:
                self._at(source)  # refuses ".." in a name, as for the files
                os.makedirs(target, exist_ok=True)
        files = [pair for pair in pairs if pair[0] in blobs]
        self._fetch(files, Progress.of_pairs(callback, files))

    def _fetch(self, pairs: list[tuple[str, str]], progress: Progress) -> None:
        by_store: dict[BlobStore, list[tuple[int, str, str]]] = {}
        sources: dict[str, str] = {}
        for source, target in pairs:
            other = sources.setdefault(os.path.normpath(target), source)
            if other != source:
                raise LocationError(
                    f"{self.unstrip_protocol(other)} and {self.unstrip_protocol(source)} would both be {target}: no "
                    "local path has an empty segment. Nothing was copied; get them one by one"
                )
        for number, (source, target) in enumerate(pairs):
            _, store, parts = self._at(source)
            by_store.setdefault(store, []).append((number, parts.name, str(target)))
            os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        for store, files in by_store.items():
            save_to_disk(store, files, progress)

    def put_file(
        self, lpath: str, rpath: str, callback: Callback = DEFAULT_CALLBACK, mode: str = "overwrite", **settings: Any
    ) -> None:
        """Copy a local file to a blob, which appears when all of it is there. A folder is nothing to copy.

        `mode` and `settings` are those of `pipe_file`.
        """
        _check("mode", mode, "overwrite", "create")
        if os.path.isdir(lpath):
            return
        size = os.stat(lpath).st_size
        progress = Progress([callback])
        with open(lpath, "rb") as local:
            if size <= _ONE_REQUEST:
                content = local.read()
                self.pipe_file(rpath, content, mode, **settings)
                progress(0, len(content), len(content))
                return
            with self.open(rpath, "xb" if mode == "create" else "wb", **settings) as remote:
                while piece := local.read(_PIECE):
                    remote.write(piece)
                    progress(0, len(piece), size)

    def put(
        self,
        lpath: Any,
        rpath: Any,
        recursive: bool = False,
        callback: Callback = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **settings: Any,
    ) -> None:
        """Copy local files to blobs, small ones several at a time; what makes a checkpoint complete comes last."""
        files = [pair for pair in put_pairs(self, lpath, rpath, recursive, maxdepth) if not os.path.isdir(pair[0])]
        callback.set_size(len(files))
        lock = threading.Lock()

        def put(pair: tuple[str, str]) -> None:
            with callback.branched(*pair) as child:
                self.put_file(*pair, callback=child, **settings)
            with lock:
                callback.relative_update(1)

        small = {pair for pair in files if os.stat(pair[0]).st_size <= _ONE_REQUEST}
        for group in commit_last(files, lambda pair: pair[1]):
            for pair in group:
                if pair not in small or self._intrans:
                    put(pair)
            if not self._intrans:
                each([functools.partial(put, pair) for pair in group if pair in small], self._threads)

    # Between blobs

    def cp_file(self, path1: str, path2: str, **hints: Any) -> None:
        """Copy a blob, on the service's side within an account, through this machine to another one."""
        refuse_unknown("cp_file", hints)
        refuse_folder(path1, path2)
        self._copy(path1, path2, strict=False)

    def copy(
        self,
        path1: Any,
        path2: Any,
        recursive: bool = False,
        maxdepth: int | None = None,
        on_error: str | None = None,
        **hints: Any,
    ) -> None:
        """Copy blobs, several at a time; what makes a checkpoint complete comes last.

        Args:
            on_error: ``"ignore"`` leaves out what is not there any more, and is the default with `recursive`;
                ``"raise"`` raises `BlobNotFoundError`.

        Raises:
            LocationError: two blobs would have one target, or one would be written over another that is to be copied.
        """
        refuse_unknown("copy", hints)
        _check("on_error", on_error, None, "ignore", "raise")
        ignore = recursive if on_error is None else on_error == "ignore"
        pairs = copy_pairs(self, path1, path2, recursive, expand(self, path1, recursive, maxdepth))
        self._copy_all(pairs, ignore_missing=ignore, strict=False)

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **hints: Any) -> None:
        """Copy blobs, wait for the copies, then remove the sources.

        A source that somebody wrote to meanwhile stays, and raises `BlobChangedError`. Whatever goes wrong, each blob
        is whole at one of its two places, or at both.

        Raises:
            LocationError: two blobs would have one target, or one would be written over another that is to be moved.
                Nothing was moved.
            AccessDeniedError: a blob has index tags, and they may not be read or written. Nothing of it was moved.
            BlobNotFoundError: nothing is there, or a folder is, and `recursive` is not given.
        """
        refuse_unknown("mv", hints)
        found = expand(self, path1, recursive, maxdepth)
        pairs = copy_pairs(self, path1, path2, recursive, found)
        if not pairs:
            raise BlobNotFoundError(f"there is no blob {path1!r} to move. To move a folder, pass recursive=True")
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        copied = self._copy_all(pairs, ignore_missing=False, strict=True)
        for group in reversed(commit_last(pairs, lambda pair: pair[0])):
            each([functools.partial(self._delete_copied, pair[0], copied[pair]) for pair in group], self._threads)
        if recursive:
            self._remove_emptied([one for one, entry in found.items() if entry is None or entry["type"] == "directory"])

    def _remove_emptied(self, folders: list[str]) -> None:
        """Remove directories, where the account has any, that nothing is left in."""
        by_store: dict[BlobStore, list[str]] = {}
        for folder in folders:
            _, store, parts = self._at(folder)
            if parts.name and not has_empty_segment(parts.name):
                by_store.setdefault(store, []).append(parts.name)
        for store, names in by_store.items():
            remove_empty_folders(store, store.location, names, set(names))

    def _delete_copied(self, path: str, etag: str) -> None:
        _, store, parts = self._at(path)
        try:
            store.delete(parts.name, if_etag=etag)
        except BlobChangedError as error:
            raise BlobChangedError(
                f"{self.unstrip_protocol(path)} was written to while it was being moved. What it was before is copied, "
                "and what it is now was left"
            ) from error

    def _copy(self, source: str, target: str, *, strict: bool) -> str:
        source_location, source_store, _ = self._at(source)
        target_location, target_store, parts = self._at(target)
        if not parts.name:
            raise LocationError(f"{target_location} is a container. Append the name of a blob")
        return copy_blob(source_store, source_location, target_store, target_location, strict=strict).etag

    def _copy_all(
        self, pairs: list[tuple[str, str]], *, ignore_missing: bool, strict: bool
    ) -> dict[tuple[str, str], str]:
        """Copy, with everything that belongs to a blob if `strict`; return the ETags of the sources."""
        refuse_mixed(self, pairs)
        copied: dict[tuple[str, str], str] = {}

        def copy(pair: tuple[str, str]) -> None:
            try:
                copied[pair] = self._copy(*pair, strict=strict)
            except BlobNotFoundError:
                if not ignore_missing:
                    raise

        for group in commit_last(pairs, lambda pair: pair[1]):
            each([functools.partial(copy, pair) for pair in group if pair[0] != pair[1]], self._threads)
        return copied

    # Removing and making

    def rm_file(self, path: str) -> None:
        """Remove a blob. Raises `BlobNotFoundError` if there is none."""
        refuse_folder(path)
        location, store, parts = self._at(path)
        try:
            if parts.name and store.delete(parts.name):
                return
        except RequestRefusedError as error:
            if error.error_code != "OperationNotSupportedOnDirectory":
                raise
            raise BlobNotFoundError(f"{location} is a folder, not a blob. Remove it with recursive=True") from error
        raise BlobNotFoundError(f"there is no blob {location}")

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove blobs and, with `recursive`, all that lies below folders, several at a time.

        Of a checkpoint, the metadata goes first: it is gone before its data begins to go. Containers stay. Where the
        account has directories, they go with what is in them.

        Raises:
            BlobNotFoundError: nothing is there, or a folder is, and `recursive` is not given.
        """
        if not recursive or maxdepth is not None:
            if not recursive:
                refuse_folder(*(path if isinstance(path, list) else [path]))
            found = expand(self, path, recursive, maxdepth)
            for group in reversed(commit_last(without_folders(found), str)):
                each([functools.partial(self.rm_file, one) for one in group], self._threads)
            return
        for root in roots_of_trees(self, path):
            self._remove_tree(root)

    def _remove_tree(self, path: str) -> None:
        location, store, parts = self._at(path)
        try:
            blobs = list(store.list(parts.folder))
        except RequestRefusedError:  # where the account has directories, and this is a blob
            blobs = []
        if parts.name:
            blobs += own_blob(store, parts, only_folder=str(path).endswith("/"))
            if not blobs:
                raise BlobNotFoundError(f"there is no blob and no folder {location}")
        for group in removal_order(blobs):
            delete_all(store, group)

    def mkdir(self, path: str, create_parents: bool = True, *, create_container: bool = False, **hints: Any) -> None:
        """Nothing, for folders come with the blobs in them; with `create_container`, make the container if need be."""
        refuse_unknown("mkdir", hints)
        if create_container:
            self._at(path)[1].create_container()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing, for folders come with the blobs in them.

        Raises:
            BlobExistsError: something is there, and `exist_ok` is False.
        """
        if not exist_ok and self.exists(path):
            raise BlobExistsError(f"{self.unstrip_protocol(self._strip_protocol(path))} exists already")

    @property
    def _threads(self) -> int:
        return (self._stores.options or TransferOptions()).concurrency


def _check(name: str, value: str | None, *allowed: str | None) -> None:
    if value not in allowed:
        raise ValueError(f"{name}= is one of {', '.join(map(repr, allowed))}, not {value!r}")
