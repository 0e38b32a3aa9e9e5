"""The bytes of any plain tensor, in order, as views of bounded size: its own memory where that is possible."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from azure_torch_ckpt.dcp.tensors.device import to_host
from azure_torch_ckpt.dcp.tensors.memory import copyable, readable

__all__ = ["pieces"]


def pieces(tensor: torch.Tensor, limit: int, *, copies: bool = False) -> Iterator[memoryview]:
    """Yield the row-major bytes of `tensor` (see `is_plain`) as one-dimensional views.

    A contiguous CPU tensor is one view of its own memory. Of any other, contiguous copies in CPU memory of at most
    `limit` bytes each (or one element) are made when they are asked for, so their number is up to the caller.

    Args:
        copies: whether the tensor's own memory must not be among them: it will change.
    """
    tensor = copyable(tensor)
    if tensor.device.type != "cpu":
        for host in to_host(_parts(tensor, limit)):
            yield readable(host)
    elif copies:
        for part in _parts(tensor, limit):
            yield readable(part.clone(memory_format=torch.contiguous_format))
    elif tensor.is_contiguous():
        yield readable(tensor)
    else:
        for part in _parts(tensor, limit):
            yield readable(part.contiguous())


def _parts(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Views of `tensor` of at most `limit` bytes that follow one another in row-major order."""
    if tensor.nbytes <= limit or tensor.dim() == 0:
        yield tensor
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    rows = limit * tensor.shape[0] // tensor.nbytes
    if rows == 0 and tensor.dim() > 1:
        for row in tensor:
            yield from _parts(row, limit)
    else:
        rows = max(rows, 1)
        for start in range(0, tensor.shape[0], rows):
            yield tensor[start : start + rows]
