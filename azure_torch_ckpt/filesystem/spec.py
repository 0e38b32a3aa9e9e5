"""`AzureBlobFileSystem`, behind ``azblob://`` URLs. Its `to_json` names this module, which keeps its name therefore."""

from __future__ import annotations

import functools
import io
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

from fsspec.callbacks import DEFAULT_CALLBACK, Callback

from azure_torch_ckpt.blobs.blob_copy import copy_blob
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.dcp.removal import remove_empty_folders
from azure_torch_ckpt.errors import (
    BlobChangedError,
    BlobExistsError,
    BlobNotFoundError,
    LocationError,
    RequestRefusedError,
)
from azure_torch_ckpt.filesystem.blob_file import COPY_BUFFER, BlobFile, BlobText, open_blob
from azure_torch_ckpt.filesystem.commit_order import commit_last, delete_all, removal_order
from azure_torch_ckpt.filesystem.downloads import BlobSlice, FileCallbacks, read_slice, read_slices, save_to_disk
from azure_torch_ckpt.filesystem.entries import own_blob
from azure_torch_ckpt.filesystem.expansion import (
    copy_pairs,
    expand,
    get_pairs,
    put_pairs,
    refuse_mixed,
    refuse_one_file,
    roots_of_trees,
    without_folders,
)
from azure_torch_ckpt.filesystem.fsspec_options import check_choice, refuse_unknown, without_ignored
from azure_torch_ckpt.filesystem.listing_filesystem import ListingFileSystem
from azure_torch_ckpt.filesystem.paths import refuse_folder
from azure_torch_ckpt.location import has_empty_segment

__all__ = ["AzureBlobFileSystem"]

# Blobs of this size are written with one request, several at a time. A larger one occupies all connections by itself.
_ONE_REQUEST: Final = 8 * 1024 * 1024
_TEXT_OPTIONS: Final = ("encoding", "errors", "newline")
_BLOB_OPTIONS: Final = frozenset({"content_type", "if_etag", "metadata", "tags"})


class AzureBlobFileSystem(ListingFileSystem):
    """Blob Storage for everything that takes an fsspec URL: ``azblob://ACCOUNT/CONTAINER/NAME``.

        fs = fsspec.filesystem("azblob", credential=DefaultAzureCredential())
        fs.ls("azblob://account/container/runs")
        frame = pandas.read_parquet("azblob://account/container/table.parquet")

    Paths are those of `BlobLocation`, also ``https://HOST/CONTAINER/NAME``; a SAS is not part of a path. The names of
    blobs imply the folders: a folder exists as long as a blob is in it, and `mkdir` does nothing. Nothing is cached:
    every answer comes from the service. `exists`, `isdir` and `isfile` return False only if the service says that there
    is no such blob or folder; if the service cannot be asked, they raise.

    Args:
        endpoint: the service's URL, if it does not follow from the account: the emulator's
            (``http://127.0.0.1:10000/devstoreaccount1``), or that of another cloud.
        credential: as for `AzureBlobWriter`. Pass at most one of this and the next four.
        account_key, sas_token, connection_string: the same under the names that adlfs uses. The ``BlobEndpoint`` of a
            connection string is the `endpoint` for its account.
        anon: True for anonymous access.
        options: limits of connections, memory and time.
        ca_file: a PEM file with certificates to trust in addition to the platform's.

    Without a credential, the filesystem reads the environment for every path: ``AZURE_STORAGE_CONNECTION_STRING``, then
    ``AZURE_STORAGE_KEY``, then ``AZURE_STORAGE_SAS_TOKEN``, then what `DefaultAzureCredential` reads. See
    `azure_torch_ckpt.credentials.resolve`.

    `to_json` and `to_dict` omit the credential and `options`; a pickle contains both.

    Raises:
        CredentialError: more than one credential, or an unusable one.
        LocationError: `endpoint` is not a URL of Blob Storage. From all methods: a path without a container, or a name
            that breaks the service's rules.
        StoreError (from all methods): the service cannot be reached or refuses. `BlobNotFoundError` and
            `ContainerNotFoundError` are a `FileNotFoundError`, `AccessDeniedError` a `PermissionError`.
    """

    # Files

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: dict[str, Any] | None = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Open a blob as a file: as a `BlobIO` in a binary mode, else as a text file on one.

        ``r``, ``w`` and ``x`` have Python's meaning. ``a`` appends to an append blob. It reads any other blob and
        writes it again, with the new data behind the old and the same settings, unless another writer has changed the
        blob meanwhile: this suits a small log. There are no other modes, because a blob is written as a whole. ``w``
        cannot replace an append blob or a page blob.

        Args:
            block_size, cache_options: ignored, as are the other options of caches; see `TransferOptions`.
            kwargs: for a text, ``encoding``, ``errors``, ``newline``; when writing, ``content_type``, ``metadata`` and
                ``tags``; ``if_etag`` for either. All as for `BlobIO`.

        Raises:
            BlobNotFoundError: there is no such blob to read.
            BlobExistsError: the blob exists, and `mode` is ``"x"``.
            UnknownOptionError: another option.
            ValueError: another mode, an argument that this mode cannot use, or `compression` while writing: fsspec
                would never close the blob below such a file, and so never commit it.
        """
        kwargs = without_ignored(kwargs)
        refuse_folder(path)
        if compression is not None and not mode.startswith("r"):
            raise ValueError(
                "compression= works for reading only. To write, use fsspec.open(url, 'wb', compression=...), or "
                "gzip.open(file, 'wb') on a file of this filesystem"
            )
        if "b" in mode:
            for name in _TEXT_OPTIONS:
                if kwargs.pop(name, None) is not None:
                    raise ValueError(f"binary mode doesn't take an argument {name}=")
            return super().open(path, mode, compression=compression, **kwargs)
        text = {name: kwargs.pop(name) for name in _TEXT_OPTIONS if name in kwargs}
        file = self.open(path, mode.replace("t", "") + "b", compression=compression, **kwargs)
        return BlobText(file, **text) if isinstance(file, BlobFile) else io.TextIOWrapper(file, **text)

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, autocommit: bool = True, **settings: Any
    ) -> BlobFile:
        settings = without_ignored(settings)
        refuse_unknown("open", settings.keys() - _BLOB_OPTIONS)
        return open_blob(self._stores, path, mode, autocommit=autocommit, **settings)

    # Bytes

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **hints: Any) -> bytes:
        """Return the bytes of a blob or of a slice of it. Large ones are fetched in parallel."""
        refuse_unknown("cat_file", hints)
        refuse_folder(path)
        store, parts = self._at(path)[1:]
        return read_slice(store, BlobSlice(parts.name, start, end))

    def cat_ranges(
        self,
        paths: list[str],
        starts: int | list[int] | None,
        ends: int | list[int] | None,
        max_gap: int | None = None,
        on_error: str = "return",
        **hints: Any,
    ) -> list[bytes | Exception]:
        """Return slices of blobs: small ones are fetched at the same time, large ones in parallel ranges.

        Each slice comes from one state of its blob.

        Args:
            max_gap: ignored.
            on_error: ``"return"`` returns an error in place of a slice; ``"raise"`` raises it.
        """
        refuse_unknown("cat_ranges", hints)
        check_choice("on_error", on_error, "return", "raise")
        starts_ = starts if isinstance(starts, list) else [starts] * len(paths)
        ends_ = ends if isinstance(ends, list) else [ends] * len(paths)
        if len(starts_) != len(paths) or len(ends_) != len(paths):
            raise ValueError("paths, starts and ends must have the same length")
        by_store: dict[BlobStore, list[tuple[int, BlobSlice]]] = {}
        for number, (path, start, end) in enumerate(zip(paths, starts_, ends_, strict=True)):
            _, store, parts = self._at(path)
            by_store.setdefault(store, []).append((number, BlobSlice(parts.name, start, end)))
        result: list[bytes | Exception] = [b""] * len(paths)
        for store, wanted in by_store.items():
            for (number, _), content in zip(wanted, read_slices(store, [one for _, one in wanted]), strict=True):
                result[number] = content
        if on_error == "raise":
            for error in (content for content in result if isinstance(content, Exception)):
                raise error
        return result

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise", **hints: Any) -> Any:
        """Return the bytes of one blob, or a dict with the bytes of many, which are fetched in parallel.

        Args:
            on_error: ``"raise"`` raises an error; ``"return"`` returns it in place of the bytes; ``"omit"`` leaves the
                blob out.
        """
        refuse_unknown("cat", hints)
        check_choice("on_error", on_error, "raise", "return", "omit")
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
            mode: ``"overwrite"``, or ``"create"``, which raises `BlobExistsError` if the blob exists.
            settings: as for `open`.
        """
        check_choice("mode", mode, "overwrite", "create")
        settings = without_ignored(settings)
        refuse_folder(path)
        _, store, parts = self._at(path)
        view = memoryview(value)
        if mode == "create" or self._intrans or settings or view.nbytes > _ONE_REQUEST or not parts.name:
            # If the answer to the commit of a new blob is lost, its blocks show whether it was carried out.
            with self.open(path, "xb" if mode == "create" else "wb", **settings) as file:
                file.write(value)
            return
        store.put(parts.name, bytes(view))

    def pipe(self, path: Any, value: bytes | None = None, **settings: Any) -> None:
        """Write one blob, or several at a time from a dict of paths and bytes."""
        values: dict[str, Any] = path if isinstance(path, dict) else {path: value}
        tasks = [functools.partial(self.pipe_file, one, content, **settings) for one, content in values.items()]
        if self._intrans:
            for task in tasks:
                task()
        else:
            self._run_all(tasks)

    # Between a disk and blobs

    def get_file(
        self, rpath: str, lpath: Any, callback: Callback = DEFAULT_CALLBACK, outfile: Any = None, **hints: Any
    ) -> None:
        """Copy a blob to a local file, which appears when it is complete. A folder becomes a local folder."""
        refuse_unknown("get_file", hints)
        if outfile is not None or hasattr(lpath, "write"):
            super().get_file(rpath, lpath, callback=callback, outfile=outfile)
            return
        try:
            self._fetch([(rpath, lpath)], FileCallbacks([callback]))
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
                self._at(source)  # refuses ".." in a name, as for files
                os.makedirs(target, exist_ok=True)
        files = [pair for pair in pairs if pair[0] in blobs]
        self._fetch(files, FileCallbacks([callback.branched(*pair) for pair in files], callback))

    def _fetch(self, pairs: list[tuple[str, str]], progress: FileCallbacks) -> None:
        by_store: dict[BlobStore, list[tuple[int, str, str]]] = {}
        refuse_one_file(self, pairs)
        for number, (source, target) in enumerate(pairs):
            _, store, parts = self._at(source)
            by_store.setdefault(store, []).append((number, parts.name, str(target)))
            os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        for store, files in by_store.items():
            save_to_disk(store, files, progress)

    def put_file(
        self, lpath: str, rpath: str, callback: Callback = DEFAULT_CALLBACK, mode: str = "overwrite", **settings: Any
    ) -> None:
        """Copy a local file, but no folder, to a blob, which appears when it is complete; see `pipe_file`."""
        check_choice("mode", mode, "overwrite", "create")
        if os.path.isdir(lpath):
            return
        size = os.stat(lpath).st_size
        progress = FileCallbacks([callback])
        with open(lpath, "rb") as local:
            if size <= _ONE_REQUEST:
                content = local.read()
                self.pipe_file(rpath, content, mode, **settings)
                progress(0, len(content), len(content))
                return
            with self.open(rpath, "xb" if mode == "create" else "wb", **settings) as remote:
                while data := local.read(COPY_BUFFER):
                    remote.write(data)
                    progress(0, len(data), size)

    def put(
        self,
        lpath: Any,
        rpath: Any,
        recursive: bool = False,
        callback: Callback = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **settings: Any,
    ) -> None:
        """Copy local files to blobs, small ones several at a time. The metadata of a checkpoint is written last."""
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
                self._run_all(functools.partial(put, pair) for pair in group if pair in small)

    # Between blobs

    def cp_file(self, path1: str, path2: str, **hints: Any) -> None:
        """Copy a blob on the service's side or, where the service cannot, through this machine."""
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
        """Copy blobs, several at a time. The metadata of a checkpoint is copied last.

        Args:
            on_error: ``"ignore"`` leaves out blobs that do not exist any more, and is the default with `recursive`;
                ``"raise"`` raises `BlobNotFoundError`.

        Raises:
            LocationError: two blobs have one destination, or one would overwrite another that is to be copied.
        """
        refuse_unknown("copy", hints)
        check_choice("on_error", on_error, None, "ignore", "raise")
        ignore = recursive if on_error is None else on_error == "ignore"
        pairs = copy_pairs(self, path1, path2, recursive, expand(self, path1, recursive, maxdepth))
        self._copy_all(pairs, ignore_missing=ignore, strict=False)

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **hints: Any) -> None:
        """Copy blobs, wait for the copies, then remove the sources.

        A source that was written to meanwhile stays, and raises `BlobChangedError`. After any error, each blob is
        complete at its source, at its destination, or at both.

        Raises:
            LocationError: two blobs have one destination, or one would overwrite another that is to be moved. Nothing
                was moved.
            AccessDeniedError: a blob has index tags that may not be read or written. This blob was not moved.
            BlobNotFoundError: there is no such blob; or it is a folder, and `recursive` is False.
        """
        refuse_unknown("mv", hints)
        found = expand(self, path1, recursive, maxdepth)
        pairs = copy_pairs(self, path1, path2, recursive, found)
        if not pairs:
            raise BlobNotFoundError(f"there is no blob {path1!r} to move. To move a folder, pass recursive=True")
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        copied = self._copy_all(pairs, ignore_missing=False, strict=True)
        for group in reversed(commit_last(pairs, lambda pair: pair[0])):
            self._run_all(functools.partial(self._delete_copied, pair[0], copied[pair]) for pair in group)
        if recursive:
            self._remove_emptied([one for one, entry in found.items() if entry is None or entry["type"] == "directory"])

    def _remove_emptied(self, folders: list[str]) -> None:
        """Remove the directories that are empty, if the account has a hierarchical namespace."""
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
                f"{self.unstrip_protocol(path)} was written to while it was being moved. Its old content was copied, "
                "and its new content stays where it is"
            ) from error

    def _copy(self, source: str, destination: str, *, strict: bool) -> str:
        source_location, source_store, _ = self._at(source)
        location, store, parts = self._at(destination)
        if not parts.name:
            raise LocationError(f"{location} is a container. Append the name of a blob")
        return copy_blob(source_store, source_location, store, location, strict=strict).etag

    def _copy_all(
        self, pairs: list[tuple[str, str]], *, ignore_missing: bool, strict: bool
    ) -> dict[tuple[str, str], str]:
        """Copy blobs, with all their settings if `strict`, and return the ETags of the sources."""
        refuse_mixed(self, pairs)
        copied: dict[tuple[str, str], str] = {}

        def copy(pair: tuple[str, str]) -> None:
            try:
                copied[pair] = self._copy(*pair, strict=strict)
            except BlobNotFoundError:
                if not ignore_missing:
                    raise

        for group in commit_last(pairs, lambda pair: pair[1]):
            self._run_all(functools.partial(copy, pair) for pair in group if pair[0] != pair[1])
        return copied

    # Removal and creation

    def rm_file(self, path: str) -> None:
        """Remove a blob. Raises `BlobNotFoundError` if it does not exist."""
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
        """Remove blobs and, with `recursive`, everything below folders, several blobs at a time.

        The metadata of a checkpoint is removed before its data. Containers are not removed. If the account has a
        hierarchical namespace, directories are removed with their content.

        Raises:
            BlobNotFoundError: there is no such blob; or it is a folder, and `recursive` is False.
        """
        if not recursive or maxdepth is not None:
            if not recursive:
                refuse_folder(*(path if isinstance(path, list) else [path]))
            found = expand(self, path, recursive, maxdepth)
            for group in reversed(commit_last(without_folders(found), str)):
                self._run_all(functools.partial(self.rm_file, one) for one in group)
            return
        for root in roots_of_trees(self, path):
            self._remove_tree(root)

    def _remove_tree(self, path: str) -> None:
        location, store, parts = self._at(path)
        try:
            blobs = list(store.list(parts.folder))
        except RequestRefusedError:  # an account with directories refuses to list below a blob
            blobs = []
        if parts.name:
            blobs += own_blob(store, parts, only_folder=str(path).endswith("/"))
            if not blobs:
                raise BlobNotFoundError(f"there is no blob and no folder {location}")
        for group in removal_order(blobs):
            delete_all(store, group)

    def mkdir(self, path: str, create_parents: bool = True, *, create_container: bool = False, **hints: Any) -> None:
        """Do nothing, because blobs imply their folders; with `create_container`, create a missing container."""
        refuse_unknown("mkdir", hints)
        if create_container:
            self._at(path)[1].create_container()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing, because blobs imply their folders.

        Raises:
            BlobExistsError: there is such a blob or folder, and `exist_ok` is False.
        """
        if not exist_ok and self.exists(path):
            raise BlobExistsError(f"{self.unstrip_protocol(self._strip_protocol(path))} exists already")

    def _run_all(self, tasks: Iterable[Callable[[], object]]) -> None:
        run_all(tasks, self._stores.access.options.concurrency, "blob-files")
