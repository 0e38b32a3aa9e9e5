"""The reads that bring a region of a stored tensor into a tensor in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from azure_torch_ckpt.dcp.payload import own_bytes, writable
from azure_torch_ckpt.dcp.regions import Band, bands, row_major
from azure_torch_ckpt.transfer import GAP, Check, Read

__all__ = ["region_reads"]


def region_reads(
    path: str,
    payload: int,
    dtype: torch.dtype,
    chunk: Sequence[int],
    offsets: Sequence[int],
    target: torch.Tensor,
    *,
    limit: int,
    check: Check | None,
) -> Iterator[Read]:
    """Reads that fill `target` with the region of the same shape that starts at `offsets` of a stored chunk.

    The bytes go straight into `target` where it is contiguous CPU memory of the stored dtype. Otherwise they go through
    buffers of at most `limit` bytes each, and are copied, cast and moved to the device from there.

    Args:
        path: the blob's name in the container.
        payload: where in the blob the chunk's raw bytes start.
        dtype: of the stored chunk.
        chunk: the stored chunk's sizes.
        check: for a region that is the whole chunk.
    """
    in_place = target.dtype == dtype and own_bytes(target) is not None
    itemsize = dtype.itemsize
    for band in bands(chunk, offsets, target.shape, itemsize, limit=limit, gap=GAP, split_dense=not in_place):
        part = target
        for dim, (start, size) in enumerate(zip(band.start, band.sizes, strict=True)):
            if size != part.shape[dim]:
                part = part.narrow(dim, start, size)
        if in_place and band.dense:
            yield Read(path, payload + band.offset, band.length, writable(part), None, check)
        else:
            yield Read(path, payload + band.offset, band.length, None, _copy(part, dtype, chunk, band), check)


def _copy(part: torch.Tensor, dtype: torch.dtype, chunk: Sequence[int], band: Band) -> Callable[[memoryview], None]:
    strides = row_major(band.sizes if band.dense else chunk)
    return functools.partial(_copy_into, part, dtype, band.sizes, strides)


def _copy_into(
    part: torch.Tensor, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], received: memoryview
) -> None:
    # A tensor that was made in inference mode may only be written to in that mode, which is a thread's own affair.
    with torch.inference_mode(part.is_inference()), torch.no_grad():
        part.copy_(torch.frombuffer(received, dtype=dtype).as_strided(sizes, strides))
