"""The paths of the filesystem, ``ACCOUNT/CONTAINER/NAME``, the URLs that they mean, and the `BlobStore` for a path."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, unquote

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential, environment_values, named_endpoint
from azure_torch_ckpt.errors import CredentialError, LocationError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["PROTOCOL", "PathParts", "Stores", "one_credential", "parents", "refuse_folder", "strip", "unstrip"]

PROTOCOL: Final = "azblob"

_URL: Final = re.compile(r"(azblob|https?):/{0,2}(.*)\Z", re.DOTALL | re.IGNORECASE)
_SIGNATURE: Final = re.compile(r"[?&]sig=", re.IGNORECASE)
_PUBLIC_CLOUD: Final = re.compile(r"([a-z0-9]{3,24})\.blob\.core\.windows\.net(?::443)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class PathParts:
    """The parts of a stripped path: account (or full host name), container and name of a blob or folder.

    `container` and `name` are empty where the path has none.
    """

    account: str
    container: str
    name: str

    @classmethod
    def of(cls, path: str) -> PathParts:
        account, _, rest = path.partition("/")
        container, _, name = rest.partition("/")
        return cls(account, container, name)

    @property
    def folder(self) -> str:
        """The prefix of the names of all blobs below this path."""
        return self.name + "/" if self.name else ""

    def child(self, name: str) -> str:
        """Return the path of another blob in the same container."""
        return f"{self.account}/{self.container}/{name}"


def strip(path: str | os.PathLike[str]) -> str:
    """Return the path without its protocol: ``account/container/name`` for ``azblob://account/container/name``.

    Nothing is decoded, because libraries join ``azblob://`` and a path: ``%20`` may well be a part of a blob's name.
    The escapes of an ``https://`` URL are decoded. The host of an account in the public cloud becomes the account. A
    ``?`` is a character of the name, or of a pattern for ``glob``.

    Raises:
        LocationError: the URL holds a SAS, which no path below it could carry, or begins with ``http://``.
    """
    text = os.fspath(path)
    if _SIGNATURE.search(text):
        raise LocationError(
            "The URL holds a SAS. A filesystem joins names to its paths, so the SAS would end up in the middle of one. "
            "Pass it as sas_token=, or in AZURE_STORAGE_SAS_TOKEN"
        )
    match = _URL.match(text)
    if match is None:
        return text.rstrip("/")
    scheme, rest = match[1].lower(), match[2]
    account, slash, name = rest.partition("/")
    if scheme == "http" or (scheme == "https" and _has_account_in_path(account)):
        raise LocationError(
            "A path cannot contain an endpoint that has the account in its path, as the emulator's has. Pass "
            "endpoint=http://127.0.0.1:10000/devstoreaccount1, and paths like azblob://devstoreaccount1/CONTAINER/NAME"
        )
    account = account.lower()
    public = _PUBLIC_CLOUD.fullmatch(account)
    name = unquote(name) if scheme == "https" else name
    return ((public[1] if public else account) + slash + name).rstrip("/")


def refuse_folder(*paths: Any) -> None:
    """Raise `LocationError` for a path that names a folder where a blob is expected: ``m/`` is not the blob ``m``."""
    for path in paths:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith("/"):
            raise LocationError(
                f"A path that ends with a slash names a folder, but a blob is needed here. Omit the slash after "
                f"{strip(path)[:200]!r} to name the blob"
            )


def parents(paths: Iterable[str]) -> set[str]:
    """Return all folders above the paths: ``a`` and ``a/b`` for ``a/b/c``."""
    return {path[:position] for path in paths for position, char in enumerate(path) if char == "/"}


def unstrip(path: str) -> str:
    """Return the path with its protocol: the inverse of `strip`."""
    return path if path.startswith(f"{PROTOCOL}://") else f"{PROTOCOL}://{path}"


@functools.lru_cache(maxsize=256)
def _container(account: str, container: str, endpoint: str | None) -> BlobLocation:
    if endpoint is None:
        return BlobLocation.parse(f"{PROTOCOL}://{account}/{quote(container, safe='')}")
    root = BlobLocation.parse(f"{endpoint.rstrip('/')}/{quote(container, safe='')}")
    if account != root.account and account != root.endpoint.partition("://")[2]:
        raise LocationError(
            f"The path belongs to the account {account[:200]!r}, but endpoint= to {root.account!r}. Use one "
            "filesystem for each account"
        )
    return root


def _has_account_in_path(host: str) -> bool:
    try:
        return BlobLocation.parse(f"https://{host}/account/container").is_path_style
    except LocationError:
        return False


def one_credential(
    credential: Credential,
    account_key: str | None,
    sas_token: str | None,
    connection_string: str | None,
    anon: bool | None,
) -> Credential:
    """Return the credential that was passed under one of these names, or None. More are a `CredentialError`."""
    given: dict[str, Credential] = {
        name: value
        for name, value in (
            ("credential", credential),
            ("account_key", account_key),
            ("sas_token", sas_token),
            ("connection_string", connection_string),
            ("anon", False if anon else None),
        )
        if value is not None
    }
    if len(given) > 1:
        raise CredentialError(f"{', '.join(given)} were passed together, and each is a credential. Pass one of them")
    return next(iter(given.values()), None)


@dataclass(slots=True)
class Stores:
    """Finds the location and the store for a path, without a request.

    Attributes:
        endpoint: the service's endpoint, if it does not follow from a path's account or from a connection string.
        access: with the credential that the user passed. None means the environment's, which is read for every path.
    """

    endpoint: str | None
    access: Access
    _stores: dict[BlobLocation, BlobStore] = field(default_factory=dict, repr=False)
    _environment: tuple[str | None, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            try:
                BlobLocation.parse(self.endpoint.rstrip("/") + "/container")
            except LocationError as error:
                raise LocationError(
                    "endpoint= is not a URL of Blob Storage. It looks like https://ACCOUNT.blob.core.windows.net or "
                    "http://127.0.0.1:10000/devstoreaccount1, without a container"
                ) from error
            if "?" in self.endpoint:
                raise LocationError("endpoint= has a query. Pass a SAS as sas_token=")

    def locate(self, path: str) -> BlobLocation:
        """Return the location of the blob or folder that a stripped path names.

        `LocationError`: the path has no container, breaks the service's rules for names, or belongs to another account
        than the endpoint.
        """
        parts = PathParts.of(path)
        endpoint = self.endpoint or named_endpoint(self.access.credential, parts.account)
        if not parts.container:
            raise LocationError(
                f"The path {path[:200]!r} has no container. A path looks like {PROTOCOL}://ACCOUNT/CONTAINER/NAME"
            )
        return dataclasses.replace(_container(parts.account, parts.container, endpoint), path=parts.name)

    def store(self, location: BlobLocation) -> BlobStore:
        """Return the store for a location's container: always the same one, because it keeps connections."""
        environment = environment_values() if self.access.credential is None else ()
        if environment != self._environment:  # may be a new SAS
            self._environment, self._stores = environment, {}
        root = location.container_root()
        store = self._stores.get(root)
        if store is None:
            store = self._stores[root] = BlobStore(root, self.access)
        return store
