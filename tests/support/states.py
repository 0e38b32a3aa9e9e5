"""Tensors of arbitrary bits for tests of saving and loading, and comparisons bit for bit."""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, TransferOptions

# torch's own planner cannot size the others, and its FileSystemWriter fails on them as ours does.
DTYPES = [
    dtype
    for dtype in sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
    if not str(dtype).startswith(("torch.q", "torch.bits"))
    and dtype not in [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in range(1, 8)]
]


def _is_copied(dtype: torch.dtype) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.empty(1, dtype=dtype).clone()
    except NotImplementedError:
        return False
    return True


# The others no reader of torch's own can load: float4 until torch 2.10.
COPIED = [dtype for dtype in DTYPES if _is_copied(dtype)]


@dataclass(frozen=True)
class Place:
    """A checkpoint's URL, and the account key to get there. Saves and loads in this process alone."""

    url: str
    key: str

    def writer(self, options: TransferOptions | None = None) -> AzureBlobWriter:
        return AzureBlobWriter(self.url, credential=self.key, options=options)

    def reader(self, options: TransferOptions | None = None) -> AzureBlobReader:
        return AzureBlobReader(self.url, credential=self.key, options=options)

    def save(self, state: dict[Any, Any], options: TransferOptions | None = None) -> None:
        dcp.save(state, storage_writer=self.writer(options))

    def load(
        self, state: dict[Any, Any], options: TransferOptions | None = None, planner: dcp.LoadPlanner | None = None
    ) -> None:
        dcp.load(state, storage_reader=self.reader(options), planner=planner)

    def stored_bytes(self, fqn: str, *offset: int) -> int:
        """Length of a stored item, with what lies around the tensor's raw bytes."""
        info = self.reader().read_metadata().storage_data[MetadataIndex(fqn, torch.Size(offset))]
        return int(info.length)


def fill(tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Fill with arbitrary bits, all sorts of NaN among them; with 0 and 1 for bool, which has no other values."""
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    raw.random_(0, 2 if tensor.dtype is torch.bool else 256, generator=torch.Generator().manual_seed(seed))
    return tensor


def bits(tensor: torch.Tensor) -> bytes:
    """The row-major bytes of a tensor's value, read without the code under test."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype is torch.float4_e2m1fn_x2:  # which torch 2.9 cannot copy
        tensor = tensor.view(torch.uint8)
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""


def assert_same(loaded: torch.Tensor, saved: torch.Tensor, what: str = "") -> None:
    assert (loaded.dtype, loaded.shape) == (saved.dtype, saved.shape), what
    assert bits(loaded) == bits(saved), what


def cleared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors of other content to load into."""
    return {key: fill(torch.empty(value.shape, dtype=value.dtype), seed=1) for key, value in state.items()}
