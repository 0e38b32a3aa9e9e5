"""Pickle opcodes that stand for a value: which one, and how it is written in the data."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["NUMBERS", "PLAIN", "SIZED"]

PLAIN: dict[int, Callable[[], Any]] = {
    pickle.NONE[0]: lambda: None,
    pickle.NEWTRUE[0]: lambda: True,
    pickle.NEWFALSE[0]: lambda: False,
    pickle.EMPTY_LIST[0]: list,
    pickle.EMPTY_SET[0]: set,
}
NUMBERS = {
    pickle.BININT[0]: struct.Struct("<i"),
    pickle.BININT2[0]: struct.Struct("<H"),
    pickle.BINFLOAT[0]: struct.Struct(">d"),
}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")  # as pickle encodes it


def _long(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


# Opcodes whose argument begins with its length: the length's width in bytes, what the bytes become.
SIZED: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    pickle.LONG1[0]: (1, _long),
    pickle.LONG4[0]: (4, _long),
    pickle.BINUNICODE[0]: (4, _text),
    pickle.BINUNICODE8[0]: (8, _text),
    pickle.SHORT_BINBYTES[0]: (1, bytes),
    pickle.BINBYTES[0]: (4, bytes),
    pickle.BINBYTES8[0]: (8, bytes),
    pickle.BYTEARRAY8[0]: (8, bytearray),
}
