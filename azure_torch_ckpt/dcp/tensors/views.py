"""The bytes of any plain tensor, in order, as views of bounded size: of its own memory where that is possible."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from azure_torch_ckpt.dcp.tensors.copies import copyable
from azure_torch_ckpt.dcp.tensors.memory import readable

__all__ = ["tensor_views"]


def tensor_views(tensor: torch.Tensor, limit: int, *, copies: bool = False) -> Iterator[memoryview]:
    """Yield the row-major bytes of `tensor` (see `is_plain`) as one-dimensional views.

    A contiguous CPU tensor is one view of its own memory. Of any other, contiguous copies in CPU memory are made when
    they are asked for, so the caller decides how many exist.

    Args:
        limit: bytes of a copy at most, or one element.
        copies: whether every view must be a copy, because the tensor's memory will change.
    """
    tensor = copyable(tensor)
    if tensor.device.type != "cpu":
        for host in _to_host(_rows(tensor, limit)):
            yield readable(host)
    elif copies:
        for rows in _rows(tensor, limit):
            yield readable(rows.clone(memory_format=torch.contiguous_format))
    elif tensor.is_contiguous():
        yield readable(tensor)
    else:
        for rows in _rows(tensor, limit):
            yield readable(rows.contiguous())


def _rows(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Yield views of `tensor` of at most `limit` bytes that follow one another in row-major order."""
    if tensor.nbytes <= limit or tensor.dim() == 0:
        yield tensor
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    rows = limit * tensor.shape[0] // tensor.nbytes
    if rows == 0 and tensor.dim() > 1:
        for row in tensor:
            yield from _rows(row, limit)
    else:
        rows = max(rows, 1)
        for start in range(0, tensor.shape[0], rows):
            yield tensor[start : start + rows]


def _to_host(tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield contiguous CPU copies of device tensors, in order; the next copy runs while the caller uses the last one.

    The copies run on a stream of their own. They wait for what the current stream has been given so far, and for
    nothing later. The current stream waits for none of them. Their memory is pinned and comes from torch's cache of
    such memory, which takes it back when the caller drops the copy; one copy more than the caller holds is alive at a
    time.
    """
    side: torch.Stream | None = None
    ahead: tuple[torch.Tensor, torch.Event] | None = None
    for tensor in tensors:
        if tensor.device.type not in ("cuda", "xpu"):
            # MPS and privateuse backends without streams: a plain copy is right, and what the backend is good at.
            yield tensor.to("cpu").contiguous()
            continue
        if side is None:
            side = torch.Stream(device=tensor.device)
            side.wait_stream(torch.accelerator.current_stream(tensor.device))
        with side:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            copied = side.record_event()
        if ahead is not None:
            ahead[1].synchronize()
            yield ahead[0]
        ahead = host, copied
    if ahead is not None:
        ahead[1].synchronize()
        yield ahead[0]
