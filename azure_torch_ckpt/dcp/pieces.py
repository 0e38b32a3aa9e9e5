"""The bytes of any plain tensor, in order, as views of bounded size: its own memory where that is possible."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from azure_torch_ckpt.dcp.payload import readable

__all__ = ["pieces"]


def pieces(tensor: torch.Tensor, limit: int) -> Iterator[memoryview]:
    """Yield the row-major bytes of `tensor` (see `is_plain`) as one-dimensional views.

    A contiguous CPU tensor is one view of its own memory. Of any other, contiguous copies in CPU memory of at most
    `limit` bytes each (or one row of the last dimension) are made when they are asked for, so their number is up to
    the caller.
    """
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        yield readable(tensor)
    elif tensor.nbytes <= limit or tensor.dim() == 0:
        yield readable(tensor.to("cpu").contiguous())
    elif tensor.is_contiguous() and tensor.dim() > 1:
        yield from pieces(tensor.view(-1), limit)
    else:
        rows = max(1, limit * tensor.shape[0] // tensor.nbytes)
        if rows == 1 and tensor.dim() > 1:
            for row in tensor:
                yield from pieces(row, limit)
        else:
            for start in range(0, tensor.shape[0], rows):
                yield readable(tensor[start : start + rows].to("cpu").contiguous())
