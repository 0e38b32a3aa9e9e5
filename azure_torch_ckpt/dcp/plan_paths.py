"""Where the keys of a flattened state dict come from, in few bytes, for plans that travel between ranks."""

from __future__ import annotations

import json
import pickle
import zlib
from dataclasses import dataclass
from typing import Any

from azure_torch_ckpt.dcp.metadata.names import pack_names, unpack_names

__all__ = ["LocalPaths", "PackedPaths"]

_Paths = dict[str, tuple[Any, ...]]  # torch's FLATTEN_MAPPING


class LocalPaths(_Paths):
    """The path of each key, as torch's planner has it. A pickle of it is `PackedPaths`."""

    def packed(self) -> PackedPaths:
        odd: _Paths = {}
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
        return PackedPaths(pack_names(tuple(self)), zlib.compress(pickle.dumps((json.dumps(lengths), odd))))

    def __reduce__(self) -> tuple[Any, ...]:
        packed = self.packed()
        return PackedPaths, (packed.names, packed.rest)


@dataclass(frozen=True, slots=True)
class PackedPaths:
    """The paths of another rank of this job.

    Attributes:
        names: the keys (`metadata.names`). Mostly the plan's items have the same object, so a pickle has it once.
    """

    names: bytes
    rest: bytes

    def unpacked(self) -> _Paths:
        lengths, odd = pickle.loads(zlib.decompress(self.rest))
        paths: _Paths = {}
        for key, parts in zip(unpack_names(self.names), json.loads(lengths), strict=True):
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
