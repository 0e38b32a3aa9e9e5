"""`PackedPaths`: where the keys of a flattened state dict come from, in few bytes, for plans that travel."""

from __future__ import annotations

import json
import pickle
import zlib
from dataclasses import dataclass
from typing import Any

from azure_torch_ckpt.dcp.metadata.names import pack_names, unpack_names

__all__ = ["PackedPaths"]

_Paths = dict[str, tuple[Any, ...]]  # torch's FLATTEN_MAPPING


@dataclass(frozen=True, slots=True)
class PackedPaths:
    """The path of each key.

    Attributes:
        names: the keys (`metadata.names`); mostly the same object that is in the plan's items, so that a pickle of the
            plan has it once.
        rest: the lengths of the parts: mostly the key is the path joined with dots.
    """

    names: bytes
    rest: bytes

    @classmethod
    def of(cls, paths: _Paths) -> PackedPaths:
        odd: _Paths = {}
        lengths: list[list[int]] = []
        for key, path in paths.items():
            parts = [str(part) for part in path if type(part) in (str, int)]
            if len(parts) != len(path) or ".".join(parts) != key:
                odd[key] = path
                lengths.append([])
                continue
            # A number in a path is an index of a list.
            lengths.append(
                [~len(text) if type(part) is int else len(text) for part, text in zip(path, parts, strict=True)]
            )
        return cls(pack_names(tuple(paths)), zlib.compress(pickle.dumps((json.dumps(lengths), odd))))

    def unpacked(self) -> _Paths:
        """The inverse of `of`, for paths of another rank of this job."""
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
