"""Keys of a state dict in few bytes: those of layers differ in a number, and little is left without it."""

from __future__ import annotations

import functools
import json
import re
import zlib

__all__ = ["pack_names", "unpack_names"]

_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])", re.ASCII)
_MARK = "\0"


@functools.lru_cache(maxsize=8)
def pack_names(names: tuple[str, ...]) -> bytes:
    """Encode names. Equal names become equal bytes."""
    forms: dict[str, int] = {}
    numbers: list[int] = []
    kinds: list[int | str] = []
    for name in names:
        if _MARK in name:
            kinds.append(name)
            continue
        kinds.append(forms.setdefault(_NUMBER.sub(_MARK, name), len(forms)))
        numbers += map(int, _NUMBER.findall(name))
    # Two lone surrogates that JSON escapes could come back as one character.
    text = json.dumps([list(forms), kinds, numbers], ensure_ascii=False)
    return zlib.compress(text.encode("utf-8", "surrogatepass"))


@functools.lru_cache(maxsize=8)
def unpack_names(packed: bytes) -> tuple[str, ...]:
    """The inverse of `pack_names`."""
    forms, kinds, numbers = json.loads(zlib.decompress(packed))
    forms = [form.split(_MARK) for form in forms]
    left = iter(numbers)
    names = []
    for kind in kinds:
        if isinstance(kind, str):
            names.append(kind)
            continue
        first, *others = forms[kind]
        names.append(first + "".join(f"{next(left)}{part}" for part in others))
    return tuple(names)
