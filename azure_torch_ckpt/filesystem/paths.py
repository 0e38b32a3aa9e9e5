"""The paths of the filesystem, ``ACCOUNT/CONTAINER/NAME``, and how they become URLs and the reverse."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote

from azure_torch_ckpt.errors import LocationError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["PROTOCOL", "PathParts", "locate", "parents", "refuse_folder", "strip", "unstrip"]

PROTOCOL: Final = "azblob"

_URL: Final = re.compile(r"(azblob|https?):/{0,2}(.*)\Z", re.DOTALL | re.IGNORECASE)
_SIGNATURE: Final = re.compile(r"[?&]sig=", re.IGNORECASE)
_PUBLIC_CLOUD: Final = re.compile(r"([a-z0-9]{3,24})\.blob\.core\.windows\.net(?::443)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class PathParts:
    """The parts of a stripped path.

    Attributes:
        account: the storage account, or a full host name.
        container: the container's name; empty if the path is the account.
        name: the name of a blob or a folder; empty if the path is the container.
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
    """Refuse paths that name a folder where a blob is expected: ``m/`` is not the blob ``m``.

    Raises:
        LocationError: a path ends with a slash.
    """
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


def locate(path: str, endpoint: str | None) -> BlobLocation:
    """Return the location of the blob or folder that a path names.

    Args:
        path: a stripped path.
        endpoint: the service's endpoint, if it does not follow from the account.

    Raises:
        LocationError: the path has no container, breaks the service's rules for names, or belongs to another account
            than the endpoint.
    """
    parts = PathParts.of(path)
    if not parts.container:
        raise LocationError(
            f"The path {path[:200]!r} has no container. A path looks like {PROTOCOL}://ACCOUNT/CONTAINER/NAME"
        )
    root = _container(parts.account, parts.container, endpoint)
    return dataclasses.replace(root, path=parts.name)


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
