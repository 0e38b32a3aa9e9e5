"""The URL of a checkpoint that was found already, for code that would ask fsspec whether it is there."""

from __future__ import annotations

import datetime
from typing import Any, Final

import fsspec
from fsspec.spec import AbstractFileSystem

__all__ = ["FoundCheckpoint"]

_PROTOCOL: Final = "azblob-found"


class FoundCheckpoint(str):
    """A URL that brings its own answers along.

    Lightning's Trainer, told to resume from ``"last"``, takes the candidates that a callback names, makes an fsspec
    filesystem of ``str(candidate)``, and asks that one for ``exists(candidate)`` and ``modified(candidate)``. For
    ``https://`` that would be fsspec's HTTP filesystem, which has no credential, takes every refusal for "not there",
    and knows no times. So until it has been asked for its time, ``str()`` of this object leads to a filesystem that
    answers with what the object knows; from then on, and in everything but ``str()`` before, it is its URL.

    Args:
        url: without a SAS, for Lightning prints it.
        modified: when the checkpoint was completed, with time zone.
    """

    modified: datetime.datetime

    def __new__(cls, url: str, modified: datetime.datetime) -> FoundCheckpoint:
        found = super().__new__(cls, url)
        found.modified = modified
        found._asked = False
        return found

    _asked: bool

    def __str__(self) -> str:
        return self[:] if self._asked else f"{_PROTOCOL}://"

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self[:],)


class _FoundFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is not annotated
    """The filesystem that a `FoundCheckpoint` leads to."""

    protocol = _PROTOCOL

    def exists(self, path: str, **_: Any) -> bool:
        return isinstance(path, FoundCheckpoint)

    def modified(self, path: FoundCheckpoint) -> datetime.datetime:
        path._asked = True
        return path.modified


fsspec.register_implementation(_PROTOCOL, _FoundFileSystem, clobber=True)
