from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from azure_torch_ckpt.dcp.tensors.chunks import TensorChunk, cut, fill_exactly


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 40))
def test_a_tensor_is_cut_in_row_major_order(sizes: list[int], limit: int) -> None:
    numbers = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    chunks = list(cut(sizes, limit))
    parts = [
        numbers[
            tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        ].flatten()
        for chunk in chunks
    ]
    assert all(0 < len(part) <= limit for part in parts)
    joined = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    assert joined.tolist() == numbers.flatten().tolist()


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[TensorChunk]]:
    """A tensor, and chunks inside it: a partition, or one with a chunk moved, dropped or repeated."""
    sizes = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    parts = [TensorChunk((0,) * len(sizes), sizes)]
    for _ in range(draw(st.integers(0, 5))):
        number = draw(st.integers(0, len(parts) - 1))
        chunk = parts.pop(number)
        if not sizes:
            parts.append(chunk)
            continue
        dim = draw(st.integers(0, len(sizes) - 1))
        at = draw(st.integers(0, chunk.sizes[dim]))
        low, high = list(chunk.sizes), list(chunk.sizes)
        low[dim], high[dim] = at, chunk.sizes[dim] - at
        moved = list(chunk.offsets)
        moved[dim] += at
        parts += [TensorChunk(chunk.offsets, tuple(low)), TensorChunk(tuple(moved), tuple(high))]
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, max(len(parts) - 1, 0)))
        kind = draw(st.sampled_from(["drop", "repeat", "move"]))
        if kind == "drop" and parts:
            parts.pop(number)
        elif parts:
            chunk = parts[number] if kind == "repeat" else parts.pop(number)
            moved = [draw(st.integers(0, whole - size)) for whole, size in zip(sizes, chunk.sizes, strict=True)]
            parts.append(chunk if kind == "repeat" else TensorChunk(tuple(moved), chunk.sizes))
    return sizes, parts


@given(cut_tensors())
def test_whether_chunks_fill_a_tensor_exactly(made: tuple[tuple[int, ...], list[TensorChunk]]) -> None:
    sizes, parts = made
    times = torch.zeros(sizes, dtype=torch.int64)
    for part in parts:
        region = times
        for dim, (start, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
            region = region.narrow(dim, start, size)
        region += 1
    assert fill_exactly(sizes, parts) == bool((times == 1).all())
