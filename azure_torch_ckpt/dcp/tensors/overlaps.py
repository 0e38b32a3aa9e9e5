"""Which tensors share memory with others, found from their addresses in some microseconds a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk, are_disjoint

__all__ = ["Overlaps", "find_overlaps", "is_expanded", "repeats_elements"]


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Which of a list of tensors, by number, may not be filled in any order.

    Attributes:
        hidden: tensors of which nothing stays, because a later one has the same memory.
        shared: of the others, those that share memory with another or with themselves, and those whose memory is not
            known.
    """

    hidden: set[int] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)


def find_overlaps(targets: Sequence[torch.Tensor | None]) -> Overlaps:
    """Find the tensors that share memory. None in the list is skipped."""
    overlaps = Overlaps()
    spans: dict[torch.device, list[tuple[int, int, int]]] = {}
    for number, target in enumerate(targets):
        if target is None or target.numel() == 0:
            continue
        span = _span(target)
        if span is None:
            overlaps.shared.add(number)
            continue
        if not target.is_contiguous() and repeats_elements(target):
            overlaps.shared.add(number)
        spans.setdefault(target.device, []).append((*span, number))
    for on_device in spans.values():
        on_device.sort()
        first = last = 0
        for position, (start, end, _) in enumerate(on_device):
            if start >= last:
                _sort_out(targets, [number for *_, number in on_device[first:position]], overlaps)
                first = position
            last = max(last, end)
        _sort_out(targets, [number for *_, number in on_device[first:]], overlaps)
    return overlaps


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether one element in memory has several indices by a stride of 0: torch refuses to write to such tensors."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def repeats_elements(tensor: torch.Tensor) -> bool:
    """Whether several indices may name one element, as in an unfolded tensor."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the addresses of the first byte and behind the last; None for a tensor without an address."""
    try:
        start = tensor.data_ptr()
        if not start:
            return None
        if tensor.is_contiguous():
            return start, start + tensor.nbytes
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    except RuntimeError:  # a wrapper around other tensors, or a sparse layout
        return None
    return start, start + (steps + 1) * tensor.element_size()


def _sort_out(targets: Sequence[torch.Tensor | None], numbers: list[int], overlaps: Overlaps) -> None:
    """Sort out tensors whose spans overlap, one with the next."""
    if len(numbers) < 2:
        return
    latest: dict[tuple[object, ...], int] = {}
    for number in sorted(numbers):
        tensor = targets[number]
        assert tensor is not None
        memory = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.element_size()
        if memory in latest:
            overlaps.hidden.add(latest[memory])
        latest[memory] = number
    left = [tensor for number in latest.values() if (tensor := targets[number]) is not None]
    if len(left) > 1 and not _are_disjoint(left):
        overlaps.shared.update(latest.values())


def _are_disjoint(tensors: list[torch.Tensor]) -> bool:
    """Whether it is certain that no two share an element: they are chunks of one tensor, say its columns."""
    strides, itemsize = tensors[0].stride(), tensors[0].element_size()
    if any(tensor.stride() != strides or tensor.element_size() != itemsize for tensor in tensors):
        return False
    base = min(tensor.data_ptr() for tensor in tensors)
    extents = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    dims = sorted(range(len(strides)), key=lambda dim: (strides[dim], extents[dim]), reverse=True)
    chunks = []
    for tensor in tensors:
        rest, odd = divmod(tensor.data_ptr() - base, itemsize)
        if odd:
            return False
        offsets = []
        for dim in dims:
            offset, rest = divmod(rest, max(strides[dim], 1))
            offsets.append(offset)
        sizes = [tensor.shape[dim] for dim in dims]
        reach = rest
        for dim, offset, size in reversed(list(zip(dims, offsets, sizes, strict=True))):
            if reach >= max(strides[dim], 1):
                return False  # it continues in the next row of what would be the one tensor
            reach += (offset + size - 1) * strides[dim]
        # The rest of the address separates, say, the even columns from the odd ones.
        chunks.append(TensorChunk((*offsets, rest), (*sizes, 1)))
    return are_disjoint(chunks)
