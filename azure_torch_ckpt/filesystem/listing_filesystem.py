"""`ListingFileSystem`: the constructor of the filesystem, and the methods that ask which blobs and folders exist."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, cast

from fsspec.spec import AbstractFileSystem

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential, PickledCredential
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError, ContainerNotFoundError, RequestRefusedError
from azure_torch_ckpt.filesystem.entries import Entry, folder_entries, look_up, tree_entries
from azure_torch_ckpt.filesystem.fsspec_options import MEANT_ELSEWHERE, refuse_unknown
from azure_torch_ckpt.filesystem.paths import PROTOCOL, PathParts, Stores, one_credential, strip, unstrip
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["ListingFileSystem"]

_SECRET = frozenset({"credential", "account_key", "sas_token", "connection_string"})


class ListingFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is not annotated
    """Base of `AzureBlobFileSystem`, where the arguments are documented."""

    protocol = PROTOCOL

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        credential: Credential = None,
        account_key: str | None = None,
        sas_token: str | None = None,
        connection_string: str | None = None,
        anon: bool | None = None,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
        **hints: Any,
    ) -> None:
        refuse_unknown(type(self).__name__, hints)
        super().__init__(use_listings_cache=False)
        given = one_credential(credential, account_key, sas_token, connection_string, anon)
        self._stores = Stores(endpoint, Access(given, options, ca_file))

    def __repr__(self) -> str:
        endpoint = "" if self._stores.endpoint is None else repr(self._stores.endpoint)
        return f"{type(self).__name__}({endpoint})"

    def __reduce__(self) -> tuple[Any, ...]:
        name = next((name for name, value in self.storage_options.items() if name in _SECRET and value is not None), "")
        credential = PickledCredential.of(self._stores.access.credential)
        return _restore, (type(self), name, credential, self._public_options())

    def _public_options(self) -> dict[str, Any]:
        options: dict[str, Any] = self.storage_options
        return {name: value for name, value in options.items() if name not in _SECRET and name != "loop"}

    def to_dict(self, *, include_password: bool = True) -> dict[str, Any]:
        """Return fsspec's form, without `options` and the credential: the process that restores it passes its own."""
        public = type(self).__new__(type(self))
        public.storage_args = ()
        public.storage_options = {
            name: value for name, value in self._public_options().items() if name != "options" and value is not None
        }
        return cast("dict[str, Any]", super(ListingFileSystem, public).to_dict(include_password=include_password))

    @property
    def fsid(self) -> str:
        return PROTOCOL if self._stores.endpoint is None else f"{PROTOCOL}+{self._stores.endpoint}"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return [strip(one) for one in path] if isinstance(path, list) else strip(path)

    def unstrip_protocol(self, name: str) -> str:
        """Return the path with its protocol. Nothing is encoded, because `open` and other methods decode nothing."""
        return unstrip(name)

    def info(self, path: str, **hints: Any) -> Entry:
        """Return the ``name``, ``size`` and ``type`` of a blob or folder.

        Of a blob, the dict also has what `ls` returns, ``metadata`` (a dict), ``content_settings`` (Content-Type and
        the like, under azure-storage-blob's names), ``tag_count`` and ``blob_type``.

        Raises:
            BlobNotFoundError: there is neither a blob nor a folder.
        """
        refuse_unknown("info", hints)
        store, parts = self._at(path)[1:]
        return look_up(store, parts)

    def ls(self, path: str, detail: bool = True, **hints: Any) -> list[Any]:
        """List the direct children of a folder, or a blob itself: dicts or, without `detail`, names.

        Raises:
            BlobNotFoundError: there is neither a blob nor a folder.
        """
        refuse_unknown("ls", hints)
        store, parts = self._at(path)[1:]
        try:
            entries = folder_entries(store, parts)
        except (AccessDeniedError, RequestRefusedError):
            # A blob needs no permission to list. An account with directories refuses to list below a blob.
            entry = look_up(store, parts)
            if entry["type"] != "file":
                raise
            entries = [entry]
        if not entries and parts.name:
            entry = look_up(store, parts)
            entries = [entry] if entry["type"] == "file" else []
        return entries if detail else [entry["name"] for entry in entries]

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        prefix: str = "",
        **hints: Any,
    ) -> Any:
        """Find all blobs below a folder, with one request for 5,000 of them, or a blob itself.

        Args:
            prefix: only paths that start with the folder's path, a slash, and this prefix.
        """
        refuse_unknown("find", hints)
        if prefix:
            return self._find_with(prefix, path, maxdepth, withdirs, detail)
        if maxdepth is not None:
            return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail)
        store, parts = self._at(path)[1:]
        try:
            files, folders = tree_entries(store, parts)
        except (AccessDeniedError, RequestRefusedError):  # as in `ls`
            entry = self._info_or_none(path)
            if entry is not None and entry["type"] != "file":
                raise
            files, folders = [] if entry is None else [entry], []
        found = {entry["name"]: entry for entry in files}
        if withdirs:
            found |= {entry["name"]: entry for entry in folders}
            if found:
                root = self._strip_protocol(path)
                found.setdefault(root, {"name": root, "size": 0, "type": "directory"})
        if not found and parts.name:
            entry = self._info_or_none(path)
            if entry is not None and entry["type"] == "file":
                found[entry["name"]] = entry
        names = sorted(found)
        return {name: found[name] for name in names} if detail else names

    def _find_with(self, prefix: str, path: str, maxdepth: int | None, withdirs: bool, detail: bool) -> Any:
        """`find` with a prefix, which lists only the blobs that start with it."""
        root = self._strip_protocol(path)
        above, _, begins = f"{root}/{prefix}".rpartition("/")
        found: dict[str, Entry] = {}
        depth = None if maxdepth is None else maxdepth - (above.count("/") - root.count("/"))
        store, parts = self._at(above)[1:]
        if depth is None:
            files, folders = tree_entries(store, parts, begins)
            found = {entry["name"]: entry for entry in (*files, *(folders if withdirs else ()))}
        elif depth >= 1:
            found = super().find(above, maxdepth=depth, withdirs=withdirs, detail=True)
        names = sorted(name for name in found if name.startswith(f"{root}/{prefix}"))
        return {name: found[name] for name in names} if detail else names

    def du(
        self, path: str, total: bool = True, maxdepth: int | None = None, withdirs: bool = False, **more: Any
    ) -> Any:
        """Return the bytes of all blobs below a folder, or of each of them. `more` is passed to `find`."""
        found = self.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True, **more)
        sizes = {name: entry["size"] for name, entry in found.items()}
        return sum(sizes.values()) if total else sizes

    def exists(self, path: str, **hints: Any) -> bool:
        """Whether there is a blob or a folder. Raises if the service cannot be asked or denies access.

        As in other filesystems, unknown options are accepted, except those that would change the answer elsewhere.
        """
        refuse_unknown("exists", hints.keys() & MEANT_ELSEWHERE)
        return self._info_or_none(path) is not None

    def isfile(self, path: str) -> bool:
        entry = self._info_or_none(path)
        return entry is not None and entry["type"] == "file"

    def isdir(self, path: str) -> bool:
        entry = self._info_or_none(path)
        return entry is not None and entry["type"] == "directory"

    def modified(self, path: str) -> datetime.datetime:
        """Return when a blob was last written. Raises `BlobNotFoundError` for a folder, too: folders have no times."""
        return cast(datetime.datetime, self._file_info(path)["last_modified"])

    def created(self, path: str) -> datetime.datetime:
        """Return when a blob was created. Raises `BlobNotFoundError` for a folder, too: folders have no times."""
        return cast(datetime.datetime, self._file_info(path)["created"])

    def ukey(self, path: str) -> str:
        """Return a string that changes with every write, because it follows from the ETag."""
        entry = self._file_info(path)
        return hashlib.sha256(f"{entry['name']}\n{entry['etag']}".encode()).hexdigest()

    def checksum(self, path: str) -> int:
        """Return a number that changes with every write."""
        return int(self.ukey(path), 16)

    def walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: str | Callable[[OSError], object] = "omit",
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Walk as ``os.walk`` does. ``"omit"`` leaves out a missing folder, but raises where access is denied."""
        handler = _omit_missing if on_error == "omit" else on_error
        yield from super().walk(path, maxdepth=maxdepth, topdown=topdown, on_error=handler, **kwargs)

    def _at(self, path: str) -> tuple[BlobLocation, BlobStore, PathParts]:
        stripped = self._strip_protocol(path)
        location = self._stores.locate(stripped)
        return location, self._stores.store(location), PathParts.of(stripped)

    def _info_or_none(self, path: str) -> Entry | None:
        try:
            return self.info(path)
        except FileNotFoundError:
            return None

    def _file_info(self, path: str) -> Entry:
        entry = self.info(path)
        if entry["type"] != "file":
            raise BlobNotFoundError(f"{self.unstrip_protocol(entry['name'])} is a folder, not a blob")
        return entry


def _omit_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError) or isinstance(error, ContainerNotFoundError):
        raise error


def _restore(
    kind: type[ListingFileSystem], name: str, credential: PickledCredential, options: dict[str, Any]
) -> ListingFileSystem:
    if name:  # the name of the argument, so that the filesystem equals one that is made by the same call
        options = {**options, name: credential.restore()}
    return kind(**options)
