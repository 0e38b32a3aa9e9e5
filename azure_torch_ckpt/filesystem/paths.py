"""The paths of the filesystem: ``ACCOUNT/CONTAINER/NAME``, and their way to a URL and back."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote

from azure_torch_ckpt.errors import LocationError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["PROTOCOL", "PathParts", "locate", "refuse_folder", "strip", "unstrip"]

PROTOCOL: Final = "azblob"

_URL: Final = re.compile(r"(azblob|https?):/{0,2}(.*)\Z", re.DOTALL | re.IGNORECASE)
_SIGNATURE: Final = re.compile(r"[?&]sig=", re.IGNORECASE)
_PUBLIC_CLOUD: Final = re.compile(r"([a-z0-9]{3,24})\.blob\.core\.windows\.net(?::443)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class PathParts:
    """A stripped path, taken apart.

    Attributes:
        account: the storage account, or a full host name.
        container: its name; empty for the account itself.
        name: of a blob, or the prefix of names that a folder is; empty for the container itself.
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
        """What the names of everything below begin with."""
        return self.name + "/" if self.name else ""

    def child(self, name: str) -> str:
        """The path of another name in the same container."""
        return f"{self.account}/{self.container}/{name}"


def strip(path: str | os.PathLike[str]) -> str:
    """The path without its protocol: ``azblob://account/container/name`` is ``account/container/name``.

    Nothing is decoded, for libraries join ``azblob://`` and a path: ``%20`` may well be a part of a blob's name. A URL
    with ``https://`` is one, and its escapes are decoded. The host of an account in the public cloud becomes the
    account. A ``?`` is a character of the name, or of a pattern for ``glob``.

    Raises:
        LocationError: a SAS in the URL, for no path below it could be made; or ``http://``.
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
            "An endpoint with the account in its path (the emulator's) is not part of the filesystem's paths. Pass "
            "endpoint=http://127.0.0.1:10000/devstoreaccount1, and paths like azblob://devstoreaccount1/CONTAINER/NAME"
        )
    account = account.lower()
    public = _PUBLIC_CLOUD.fullmatch(account)
    name = unquote(name) if scheme == "https" else name
    return ((public[1] if public else account) + slash + name).rstrip("/")


def refuse_folder(*paths: Any) -> None:
    """Refuse what names a folder where a blob is meant: ``m/`` is not the blob ``m``.

    Raises:
        LocationError: one of the paths ends with a slash.
    """
    for path in paths:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith("/"):
            raise LocationError(
                f"A path that ends with a slash names a folder, and this is for a blob. Leave the slash after "
                f"{strip(path)[:200]!r} away if the blob of that name is meant"
            )


def unstrip(path: str) -> str:
    """The path with its protocol: the inverse of `strip`."""
    return path if path.startswith(f"{PROTOCOL}://") else f"{PROTOCOL}://{path}"


def locate(path: str, endpoint: str | None) -> BlobLocation:
    """The blob or folder that a path names.

    Args:
        endpoint: of the service, where it does not follow from the account.

    Raises:
        LocationError: the path names no container, breaks the service's rules for names, or is for another account
            than the endpoint.
    """
    parts = PathParts.of(path)
    if not parts.container:
        raise LocationError(
            f"The path {path[:200]!r} names no container. A path looks like {PROTOCOL}://ACCOUNT/CONTAINER/NAME"
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
            f"The path is for the account {account[:200]!r}, but endpoint= is that of {root.account!r}. Use one "
            "filesystem for each account"
        )
    return root


def _has_account_in_path(host: str) -> bool:
    try:
        return BlobLocation.parse(f"https://{host}/account/container").is_path_style
    except LocationError:
        return False
