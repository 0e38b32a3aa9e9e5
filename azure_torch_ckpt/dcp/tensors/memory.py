"""The bytes of a tensor as views: of its own memory where that is possible, else of copies of bounded size."""

from __future__ import annotations

import ctypes
import functools
import io
import pickle
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from azure_torch_ckpt.dcp.tensors.copies import copyable
from azure_torch_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["address_of", "is_plain", "memory", "own_bytes", "readable", "tensor_views", "writable"]

# One array type for every length: a ctypes type per length would cost more than the view and leave a cycle to collect.
# The views below cut the length that is really there.
_AnyLength = ctypes.c_ubyte * sys.maxsize

_PYBUF_SIMPLE = 0


class _PyBuffer(ctypes.Structure):
    """CPython's ``Py_buffer``, part of its stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def memory(address: int, nbytes: int, owner: object) -> memoryview:
    """Make a view of ``nbytes`` writable bytes (format ``"B"``) at ``address``.

    Args:
        owner: the object that keeps the memory allocated. It lives as long as any view of this memory.
    """
    if nbytes == 0:
        return memoryview(bytearray())
    array = _AnyLength.from_address(address)
    array.owner = owner  # type: ignore[attr-defined]
    return memoryview(array).cast("B")[:nbytes]


def address_of(data: Buffer) -> int:
    """Return the address of a contiguous buffer. `ctypes` itself refuses a read-only one."""
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(view), _PYBUF_SIMPLE)
    address = view.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return address or 0


def writable(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a contiguous CPU tensor of any dtype, to receive into: ``tensor.nbytes`` of them.

    The view holds the tensor's storage, not the tensor: it stays valid after ``del tensor`` or ``tensor.data = other``.
    Only ``untyped_storage().resize_()`` invalidates it.

    torch does not see what is written here. The tensor's version counter stays as it is, so autograd will not notice
    that a value which it saved for backward has changed.

    Raises:
        CheckpointError: the tensor's memory is not its value: another device, strides with gaps, a conj or neg bit, a
            wrapper around another tensor.
    """
    try:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            # The address of the tensor itself, not of its storage: it may be a slice.
            address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            if address or not nbytes:
                return memory(address, nbytes, tensor.untyped_storage())
    except RuntimeError as error:  # from a tensor without a storage
        raise _unusable(tensor) from error
    raise _unusable(tensor)


def readable(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a contiguous CPU tensor, read-only; all else as in `writable`."""
    return writable(tensor).toreadonly()


def own_bytes(tensor: torch.Tensor) -> memoryview | None:
    """View the bytes of a plain, contiguous CPU tensor (see `is_plain`) as `writable` does; None for any other."""
    if not is_plain(tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return memory(tensor.data_ptr(), tensor.nbytes, tensor.untyped_storage())


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether raw bytes, dtype and shape describe the tensor completely.

    If so it may be stored as an `Envelope` around its bytes, and bytes may be received into it. It may have any strides
    and be on any device but meta: the caller makes it a contiguous CPU tensor first. If not, `serialize` stores it.

    Not plain are subclasses (other than ``nn.Parameter``), other layouts, quantized and nested tensors, conj and neg
    views, functorch's and other wrappers without memory of their own, and the dtypes for which ``torch.save`` and
    ``torch.load`` know no raw form (``torch.int4`` and its like).

    Python attributes do not count, nor does ``requires_grad``. ``torch.save`` would keep an attribute, but DCP detaches
    every tensor before it saves it and copies into an existing one when it loads, and both drop it.
    """
    kind = type(tensor)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return False
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return False
    # Only complex tensors can be conj views; to ask one releases the GIL, which costs more than all the rest.
    if tensor.is_neg() or (tensor.is_complex() and tensor.is_conj()):
        return False
    try:
        has_memory = tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # vmap, grad and other transforms wrap a tensor in one that has no storage
        return False
    return has_memory and _has_raw_form(tensor.dtype)


@functools.cache
def _has_raw_form(dtype: torch.dtype) -> bool:
    """Whether torch saves and loads the dtype. Not a list: every version adds dtypes, and only some can be saved."""
    stream = io.BytesIO()
    try:
        torch.save(torch.empty(0, dtype=dtype, device="cpu"), stream)
        stream.seek(0)
        return bool(torch.load(stream, weights_only=True).dtype == dtype)
    except (KeyError, RuntimeError, pickle.UnpicklingError):
        return False


def _unusable(tensor: torch.Tensor) -> CheckpointError:
    return CheckpointError(
        f"Cannot use the memory of a {type(tensor).__name__} of {tensor.dtype} and shape {tuple(tensor.shape)} on "
        f"{tensor.device} as bytes: it is not a contiguous CPU tensor with memory of its own and no conj or neg bit. "
        "Copy it to one first, or store it with torch.save."
    )


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
