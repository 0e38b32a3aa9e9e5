"""Where the keys of a flattened state dict come from, in few bytes, for plans that travel between ranks."""

from __future__ import annotations

import json
import pickle
import zlib
from typing import Any

from azure_torch_ckpt.dcp.metadata.names import pack_names, unpack_names

__all__ = ["LocalPaths", "unpack_paths"]


class LocalPaths(dict[str, tuple[Any, ...]]):
    """The path of each key, as torch's planner has it. A pickle of it is bytes for `unpack_paths`.

    Args:
        names: that the receiver knows; mostly they are the keys.
    """

    def __init__(self, paths: dict[str, tuple[Any, ...]], names: tuple[str, ...]) -> None:
        super().__init__(paths)
        self._names = names

    def packed(self) -> bytes:
        odd: dict[str, tuple[Any, ...]] = {}
        lengths: list[list[int]] = []
        for key, path in self.items():
            # Mostly a key is its path joined with dots, so lengths suffice. A number in a path is an index of a list.
            parts = [str(part) for part in path if type(part) in (str, int)]
            if len(parts) != len(path) or ".".join(parts) != key:
                odd[key] = path
                lengths.append([])
                continue
            lengths.append(
                [~len(text) if type(part) is int else len(text) for part, text in zip(path, parts, strict=True)]
            )
        known = tuple(self) == self._names
        packed = b"" if known else pack_names(tuple(self))
        rest = zlib.compress(pickle.dumps((known, json.dumps(lengths), odd)))
        return len(packed).to_bytes(8, "little") + packed + rest

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (self.packed(),)


def unpack_paths(packed: Any, names: tuple[str, ...]) -> Any:
    """The paths in a pickle of another rank of this job; anything else is returned as it is."""
    if not isinstance(packed, bytes):
        return packed
    end = 8 + int.from_bytes(packed[:8], "little")
    known, lengths, odd = pickle.loads(zlib.decompress(packed[end:]))
    paths: dict[str, tuple[Any, ...]] = {}
    for key, parts in zip(names if known else unpack_names(packed[8:end]), json.loads(lengths), strict=True):
        if key in odd:
            paths[key] = odd[key]
            continue
        path: list[str | int] = []
        at = 0
        for length in parts:
            text = key[at : at + (length if length >= 0 else ~length)]
            path.append(text if length >= 0 else int(text))
            at += len(text) + 1
        paths[key] = tuple(path)
    return paths
