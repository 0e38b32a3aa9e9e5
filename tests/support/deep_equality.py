"""Deep equality of two objects: values, types, and which parts are the same object or share memory."""

from __future__ import annotations

import collections
import io
import struct
from typing import Any

import numpy as np
import torch

from azure_torch_ckpt.objects import Unpacked, pack, unpack

__all__ = ["assert_alike", "through_codec", "through_torch"]


def through_torch(value: Any, **load: Any) -> Any:
    """The value after torch.save and torch.load: the codec must return the same."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, **load)


def through_codec(value: Any, **load: Any) -> Any:
    """The value after the codec, when every item arrives as it was sent."""
    packed = pack(value)
    arrived: set[str] = set()

    def fetch(unpacked: Unpacked) -> None:
        for name, item in unpacked.allocate().items():
            assert (item.dtype, item.shape) == (packed.tensors[name].dtype, packed.tensors[name].shape), name
            item.copy_(packed.tensors[name])
            assert name not in arrived
            arrived.add(name)

    unpacked = unpack(packed.skeleton, fetch=fetch, **load)
    fetch(unpacked)
    assert arrived == packed.tensors.keys() or "meta" in str(load.get("map_location"))
    return unpacked.value


def assert_alike(got: Any, wanted: Any) -> None:
    _Comparison().compare(got, wanted, "it")


class _Comparison:
    def __init__(self) -> None:
        self.twins: dict[int, Any] = {}  # of an object in `wanted`: the one in `got`
        self.back: dict[int, Any] = {}
        # Of a storage in `wanted`: the one in `got`, and by how much addresses differ between them.
        self.storages: dict[int, tuple[int, int]] = {}
        self.taken: dict[int, int] = {}

    def compare(self, got: Any, wanted: Any, where: str) -> None:
        assert type(got) is type(wanted), f"{where}: {type(got)} where {type(wanted)} was"
        if isinstance(wanted, (torch.Tensor, dict, list, set)) or hasattr(wanted, "__dict__"):
            if id(wanted) in self.twins or id(got) in self.back:
                assert self.twins.get(id(wanted)) is got, f"{where}: another object"
                assert self.back.get(id(got)) is wanted, f"{where}: one object where there were two"
                return
            self.twins[id(wanted)], self.back[id(got)] = got, wanted
        if isinstance(wanted, torch.Tensor):
            self.compare_tensors(got, wanted, where)
        elif isinstance(wanted, np.ndarray):
            assert (got.dtype, got.shape, got.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes()), where
        elif isinstance(wanted, dict):
            assert len(got) == len(wanted), where
            for (got_key, got_value), (key, value) in zip(got.items(), wanted.items(), strict=True):
                self.compare(got_key, key, f"a key of {where}")
                self.compare(got_value, value, f"{where}[{key!r}]")
        elif isinstance(wanted, (list, tuple, collections.deque)):
            assert len(got) == len(wanted), where
            for number, (got_part, part) in enumerate(zip(got, wanted, strict=True)):
                self.compare(got_part, part, f"{where}[{number}]")
        elif isinstance(wanted, (set, frozenset)) and len(wanted) == 1:
            self.compare(next(iter(got)), next(iter(wanted)), f"the element of {where}")
        elif isinstance(wanted, (float, complex)):
            assert struct.pack("dd", got.real, got.imag) == struct.pack("dd", wanted.real, wanted.imag), where
        elif not hasattr(wanted, "__dict__") or isinstance(wanted, type):
            assert got == wanted, where
        if hasattr(wanted, "__dict__") and not isinstance(wanted, type):
            self.compare(vars(got), vars(wanted), f"the attributes of {where}")

    def compare_tensors(self, got: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
        for what in ("dtype", "shape", "layout", "device", "requires_grad", "is_quantized", "is_leaf"):
            assert getattr(got, what) == getattr(wanted, what), f"{where}: another {what}"
        got, wanted = got.detach(), wanted.detach()
        if wanted.layout is torch.sparse_coo:
            assert got.is_coalesced() == wanted.is_coalesced(), where
            self.compare_tensors(got._indices(), wanted._indices(), f"indices of {where}")
            self.compare_tensors(got._values(), wanted._values(), f"values of {where}")
        elif wanted.layout is not torch.strided or wanted.is_quantized:
            got, wanted = (got.dequantize(), wanted.dequantize()) if wanted.is_quantized else (got, wanted)
            assert torch.equal(got.to_dense(), wanted.to_dense()), where
        elif not wanted.is_meta:
            assert got.stride() == wanted.stride(), where
            assert (got.is_conj(), got.is_neg()) == (wanted.is_conj(), wanted.is_neg()), where
            assert _bytes(got) == _bytes(wanted), f"{where}: other values"
            self.compare_memory(got, wanted, where)

    def compare_memory(self, got: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
        if wanted.untyped_storage().nbytes() == 0 or wanted.numel() == 0:
            return  # torch keeps the memory around an empty tensor, and no operation shows it
        here, there = got.untyped_storage().data_ptr(), wanted.untyped_storage().data_ptr()
        apart = got.data_ptr() - wanted.data_ptr()
        assert self.storages.setdefault(there, (here, apart)) == (here, apart), f"{where}: memory of its own"
        assert self.taken.setdefault(here, there) == there, f"{where}: shares memory that was another's"


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""
