"""Copies from tensor to tensor, of any dtypes, in any thread and mode, with errors that name the item."""

from __future__ import annotations

import functools
import warnings

import torch

from azure_torch_ckpt.errors import CheckpointError

__all__ = ["converts", "copy_elements", "copy_region", "copyable", "no_conversion", "write_elements"]

_FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor; or its elements as bytes where they are packed in bytes: torch 2.9 cannot copy such dtypes."""
    return tensor.view(torch.uint8) if tensor.dtype is _FLOAT4 else tensor


def copy_elements(values: torch.Tensor, target: torch.Tensor, what: str, *, non_blocking: bool = False) -> None:
    """``target.copy_(values)``; `CheckpointError` about `what` if torch has no conversion between the two dtypes."""
    if values.dtype == target.dtype:
        values, target = copyable(values), copyable(target)
    try:
        target.copy_(values, non_blocking=non_blocking)
    except NotImplementedError as error:
        if values.dtype == target.dtype:  # a tensor without values
            raise
        raise no_conversion(what, values.dtype, target.dtype) from error


def write_elements(values: torch.Tensor, target: torch.Tensor, what: str) -> None:
    """`copy_elements` into a tensor of the user, from any thread."""
    # A tensor that was made in inference mode may only be written to in that mode, and modes are per thread.
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        copy_elements(values, target, what)


def copy_region(region: torch.Tensor, target: torch.Tensor, what: str) -> None:
    """`write_elements` of a tensor that may be quantized; then the target must be quantized as it is."""
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
    write_elements(region, target, what)


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


@functools.cache
def converts(saved: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether torch converts from one dtype to the other. It does not convert packed ones, of two numbers a byte."""
    if saved == wanted:
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns the user of what the user's own tensors are
        target = torch.empty(1, dtype=wanted, device="cpu")
        if target.is_quantized:  # what such a tensor takes depends on the tensor
            return True
        try:
            target.copy_(torch.empty(1, dtype=saved, device="cpu"))
        except NotImplementedError:
            return False
    return True


def no_conversion(what: str, saved: torch.dtype, wanted: torch.dtype) -> CheckpointError:
    """Make the error of a load into a dtype that torch does not convert to; `what` names the values."""
    return CheckpointError(
        f"{what} was saved as {saved}, the tensor to load it into has {wanted}, and torch {torch.__version__} does not "
        "convert between the two. Load into a tensor of the saved dtype, and convert that"
    )
