"""How a region of a stored tensor comes into a tensor in memory: the reads, and the copy where one is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from azure_torch_ckpt.blobs.download import GAP, Check, Read
from azure_torch_ckpt.dcp.tensors.memory import copy_elements, own_bytes, writable
from azure_torch_ckpt.dcp.tensors.regions import Band, bands, row_major
from azure_torch_ckpt.errors import CheckpointError

__all__ = ["copy_region", "region_reads"]


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
            yield Read(path, payload + band.offset, band.length, None, _copying(part, dtype, chunk, band), check)


def _copying(part: torch.Tensor, dtype: torch.dtype, chunk: Sequence[int], band: Band) -> Callable[[memoryview], None]:
    strides = row_major(band.sizes if band.dense else chunk)
    return functools.partial(_copy_into, part, dtype, band.sizes, strides)


def _copy_into(
    part: torch.Tensor, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], received: memoryview
) -> None:
    _copy(torch.frombuffer(received, dtype=dtype).as_strided(sizes, strides), part, "A tensor")


def copy_region(region: torch.Tensor, target: torch.Tensor, what: str) -> None:
    """``target.copy_(region)`` in any thread and mode.

    Raises:
        CheckpointError: `region` is quantized, and `target` is not, or differently; or torch does not convert between
            their dtypes. `what` names the item.
    """
    if region.is_quantized and not target.is_quantized:
        raise CheckpointError(
            f"{what} was saved quantized ({region.dtype}), and the tensor to load it into is not. Load into a tensor "
            "with the saved quantizer, and dequantize() that"
        )
    if region.is_quantized and not _same_quantizer(region, target):
        raise CheckpointError(
            f"{what} was saved with another scale or zero point than the tensor to load into has, and only the "
            "integers can be copied. Make that tensor with the saved quantizer"
        )
    _copy(region, target, what)


def _same_quantizer(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.qscheme() != other.qscheme():
        return False
    if one.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return one.q_scale() == other.q_scale() and one.q_zero_point() == other.q_zero_point()
    return (
        one.q_per_channel_axis() == other.q_per_channel_axis()
        and torch.equal(one.q_per_channel_scales(), other.q_per_channel_scales())
        and torch.equal(one.q_per_channel_zero_points(), other.q_per_channel_zero_points())
    )


def _copy(values: torch.Tensor, target: torch.Tensor, what: str) -> None:
    # A tensor that was made in inference mode may only be written to in that mode, which is a thread's own affair.
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        copy_elements(values, target, what)
