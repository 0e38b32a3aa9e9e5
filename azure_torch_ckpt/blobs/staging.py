"""`Staging`: the blocks of one upload, and their ids. The ids have the length of blocks that others have staged."""

from __future__ import annotations

import base64
import binascii
import logging
import random
import string
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from azure_torch_ckpt.blobs.service_copy import CopySource
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError, RequestRefusedError
from azure_torch_ckpt.options import MAX_BLOCKS
from azure_torch_ckpt.transport.buffers import Cancel, Gather

__all__ = ["BLOCK_ID_LENGTH", "Staging", "block_id"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

BLOCK_ID_LENGTH = 48
"""Bytes of each block id that this package makes. All uncommitted blocks of a blob must have ids of one length
(https://learn.microsoft.com/rest/api/storageservices/put-block#remarks); azcopy and the SDK for .NET take 48, too."""
_OTHER_LENGTH = "InvalidBlobOrBlock"
_ALPHABET = string.ascii_letters + string.digits + "-_"
_DIGITS = {character: value for value, character in enumerate(_ALPHABET)}
# The shortest ids that two simultaneous uploads most certainly choose differently: 16 million.
_SHORTEST = 4
_random = random.SystemRandom()
# Others may stage blocks meanwhile and change the length again, though hardly twice.
_ATTEMPTS = 4


def block_id(stem: str, number: int) -> str:
    """Return the id of one block.

    Args:
        stem: unique to one upload; 32 characters at most.
        number: of the block; below 10**15.
    """
    return f"{stem}-{number:0{BLOCK_ID_LENGTH - 1 - len(stem)}d}"


class Staging:
    """Stages blocks of one blob, from any thread, and has the ids to commit.

    If another writer has staged blocks for the blob, or a killed upload left some, the service refuses ids of another
    length, for a week. Removing those blocks would write the blob. So the ids get that length here, and the commit
    drops the other blocks.
    """

    def __init__(self, store: BlobStore, path: str) -> None:
        self._store = store
        self._path = path
        self._lock = threading.Lock()
        # Ids differ between two uploads to one name, so that neither commits a block of the other.
        stem = uuid.uuid4().hex
        self._name: Callable[[int], str] = lambda number: block_id(stem, number)

    def ids(self, numbers: Iterable[int]) -> list[str]:
        """Return the ids of blocks that are staged. Each has a number below `MAX_BLOCKS`."""
        return [self._name(number) for number in numbers]

    def stage(self, number: int, body: Gather, crc64: int | None, cancel: Cancel) -> None:
        """`BlobStore.stage_block`."""
        self._staged(number, lambda name: self._store.stage_block(self._path, name, body, crc64, cancel=cancel))

    def stage_from(self, number: int, source: CopySource, offset: int, length: int, cancel: Cancel) -> int | None:
        """`BlobStore.stage_block_from`."""
        return self._staged(
            number,
            lambda name: self._store.stage_block_from(self._path, name, source, offset, length, cancel=cancel),
        )

    def _staged(self, number: int, stage: Callable[[str], _T]) -> _T:
        for attempt in range(_ATTEMPTS):
            name = self._name
            try:
                return stage(name(number))
            except RequestRefusedError as error:
                if error.error_code != _OTHER_LENGTH or attempt == _ATTEMPTS - 1:
                    raise
                self._give_way(name, error)
        raise AssertionError

    def _give_way(self, refused: Callable[[int], str], error: RequestRefusedError) -> None:
        with self._lock:
            if self._name is not refused:  # another thread has changed it
                return
            try:
                others = self._store.uncommitted_blocks(self._path)
            except AccessDeniedError as denied:  # a credential for writing only
                raise error from denied
            except BlobNotFoundError:
                return  # the other blocks are gone
            if not others:
                return
            self._name = _like(others, error)
            _log.info(
                "%s/%s has %d uncommitted blocks of other writers; the ids of this upload get the same length",
                self._store.location,
                self._path,
                len(others),
            )


def _like(others: Sequence[str], error: RequestRefusedError) -> Callable[[int], str]:
    """Return names as long as the others' and different from them: numbers of that many digits, from a random one
    on."""
    try:
        existing = [base64.b64decode(other, validate=True).decode("latin-1") for other in others]
    except binascii.Error:
        raise error from None
    length = len(existing[0])
    if length < _SHORTEST:
        raise error
    values = [_value(name) for name in existing if set(name) <= _DIGITS.keys()]
    for _ in range(_ATTEMPTS):
        start = _random.randrange(len(_DIGITS) ** length - MAX_BLOCKS)
        if not any(start <= value < start + MAX_BLOCKS for value in values):
            return lambda number: _name(start + number, length)
    raise error


def _name(value: int, length: int) -> str:
    digits = []
    for _ in range(length):
        value, digit = divmod(value, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def _value(name: str) -> int:
    value = 0
    for character in name:
        value = value * len(_ALPHABET) + _DIGITS[character]
    return value
