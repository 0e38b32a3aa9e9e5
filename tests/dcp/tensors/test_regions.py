from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from azure_torch_ckpt.blobs.download import GAP, Check, Read
from azure_torch_ckpt.dcp.tensors.regions import RegionRange, region_ranges, region_reads, row_major

MIB = 1 << 20


@st.composite
def regions(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """A chunk's sizes, and where in it a region lies: offsets and sizes."""
    chunk = draw(st.lists(st.integers(0, 6), max_size=4))
    offsets = [draw(st.integers(0, size)) for size in chunk]
    sizes = [draw(st.integers(0, size - offset)) for size, offset in zip(chunk, offsets, strict=True)]
    return chunk, offsets, sizes


def inside(offsets: list[int], sizes: list[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


@given(
    regions(),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 200),
    st.integers(0, 60),
    st.booleans(),
)
@example(([4, 6], [0, 1], [4, 2]), 1, 100, 60, False)  # columns close together
@example(([4, 6], [0, 1], [4, 2]), 1, 100, 0, False)  # columns far apart
@example(([4, 6], [1, 0], [2, 6]), 8, 20, 0, True)  # rows above the limit
def test_ranges_are_the_region_and_obey_the_limits(
    where: tuple[list[int], list[int], list[int]], itemsize: int, limit: int, gap: int, split_dense: bool
) -> None:
    chunk, offsets, sizes = where
    first_byte = torch.arange(math.prod(chunk)).reshape(chunk) * itemsize
    wanted = first_byte[inside(offsets, sizes)]
    covered = torch.zeros(sizes, dtype=torch.int64)
    for one in region_ranges(chunk, offsets, sizes, itemsize, limit=limit, gap=gap, split_dense=split_dense):
        part = inside(list(one.start), list(one.sizes))
        covered[part] += 1
        starts = sorted(wanted[part].flatten().tolist())
        # The smallest range that encloses the part.
        assert (one.offset, one.offset + one.length) == (starts[0], starts[-1] + itemsize)
        assert one.dense is (one.length == len(starts) * itemsize)
        unwanted = [after - before - itemsize for before, after in pairwise(starts)]
        assert max(unwanted, default=0) <= gap
        assert one.length <= max(limit, itemsize) or (one.dense and not split_dense)
        # What a reader does with the bytes: a view of them with these strides is the part.
        strides = row_major(one.sizes if one.dense else chunk)
        received = torch.arange(one.offset, one.offset + one.length, itemsize)
        assert torch.equal(received.as_strided(one.sizes, strides), wanted[part])
    assert bool((covered == 1).all())


def cut(chunk: list[int], offsets: list[int], sizes: list[int], **limits: int | bool) -> list[RegionRange]:
    options = {"limit": 32 * MIB, "gap": GAP, "split_dense": False} | limits
    return list(region_ranges(chunk, offsets, sizes, 4, **options))  # type: ignore[arg-type]


def test_whole_rows_are_one_range_of_any_length() -> None:
    (one,) = cut([1 << 20, 64], [1 << 17, 0], [1 << 19, 64])
    assert one == RegionRange((0, 0), (1 << 19, 64), 32 * MIB, 128 * MIB, True)


def test_whole_rows_are_cut_at_the_limit_where_they_go_through_a_buffer() -> None:
    parts = cut([1 << 20, 64], [0, 0], [1 << 20, 64], split_dense=True)
    assert [part.length for part in parts] == [32 * MIB] * 8
    assert all(part.dense for part in parts)


def test_far_columns_are_one_range_per_row_without_a_byte_too_much() -> None:
    parts = cut([16, 1 << 20], [0, 1 << 17], [16, 1 << 17])
    assert len(parts) == 16
    assert {part.length for part in parts} == {MIB // 2}


def test_close_columns_share_ranges_up_to_the_limit() -> None:
    parts = cut([4096, 4096], [0, 512], [4096, 512])
    assert sum(part.sizes[0] for part in parts) == 4096
    assert len(parts) <= 3 and all(part.length <= 32 * MIB for part in parts)


def test_planes_of_one_element_are_no_dimension() -> None:
    (one,) = cut([5, 1, 7, 1], [2, 0, 3, 0], [1, 1, 4, 1])
    assert one == RegionRange((0, 0, 0, 0), (1, 1, 4, 1), (2 * 7 + 3) * 4, 16, True)


@given(st.lists(st.integers(1, 9), max_size=5))
def test_row_major_strides_are_those_of_torch(sizes: list[int]) -> None:
    assert row_major(sizes) == torch.empty(sizes, device="meta").stride()


# The reads that bring a region into a tensor


def carry_out(reads: Iterator[Read], blob: torch.Tensor) -> list[Read]:
    """Do what a download does, with the bytes of a one-dimensional tensor in memory."""
    done = []
    raw = ctypes.string_at(blob.data_ptr(), blob.nbytes)
    for read in reads:
        received = bytearray(raw[read.offset : read.offset + read.length])
        assert len(received) == read.length
        if read.dest is not None:
            assert read.dest.nbytes == read.length
            read.dest[:] = received
        if read.use is not None:
            read.use(memoryview(received))
        done.append(read)
    return done


def chunk_in_blob(chunk: list[int], dtype: torch.dtype, payload: int) -> tuple[torch.Tensor, torch.Tensor]:
    stored = torch.arange(math.prod(chunk)).to(dtype)
    blob = torch.full((payload + stored.nbytes,), 255, dtype=torch.uint8)
    blob[payload:] = stored.view(torch.uint8)
    return blob, stored.reshape(chunk)


@given(
    regions(),
    st.sampled_from([torch.uint8, torch.int32, torch.float64]),
    st.sampled_from([torch.int32, torch.float32]),
    st.booleans(),
    st.integers(8, 300),
)
def test_reads_fill_any_target(
    where: tuple[list[int], list[int], list[int]], stored: torch.dtype, wanted: torch.dtype, strided: bool, limit: int
) -> None:
    chunk, offsets, sizes = where
    blob, whole = chunk_in_blob(chunk, stored, payload=13)
    around = torch.full([2 * size + 1 for size in sizes] if strided else sizes, -1, dtype=wanted)
    target = around[tuple(slice(1, None, 2) for _ in sizes)] if strided else around
    reads = carry_out(region_reads("p", 13, stored, chunk, offsets, target, limit=limit, check=None), blob)
    assert torch.equal(target, whole[inside(offsets, sizes)].to(wanted))
    assert int((around != -1).sum()) == target.numel()  # nothing beside it
    assert all(read.length <= limit for read in reads if read.dest is None)


@pytest.mark.parametrize(
    ("offsets", "sizes", "count"),
    [([0, 0], [8, 6], 1), ([2, 0], [3, 6], 1), ([3, 1], [1, 4], 1)],
    ids=["whole", "rows", "part of a row"],
)
def test_a_run_of_bytes_goes_straight_into_contiguous_memory(offsets: list[int], sizes: list[int], count: int) -> None:
    blob, whole = chunk_in_blob([8, 6], torch.float32, payload=4)
    target = torch.zeros(sizes)
    reads = carry_out(region_reads("p", 4, torch.float32, [8, 6], offsets, target, limit=8, check=None), blob)
    assert len(reads) == count
    assert all(read.dest is not None and read.use is None for read in reads)
    assert torch.equal(target, whole[inside(offsets, sizes)])


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64], ids=["in place", "through buffers"])
def test_the_checksum_sees_every_byte_of_a_whole_chunk(wanted: torch.dtype) -> None:
    def never(found: int) -> None:
        raise AssertionError("complete")

    check = Check(0, 1 << 40, never)
    blob, _ = chunk_in_blob([64, 6], torch.float32, payload=4)
    reads = carry_out(
        region_reads("p", 4, torch.float32, [64, 6], [0, 0], torch.zeros(64, 6, dtype=wanted), limit=100, check=check),
        blob,
    )
    assert all(read.check is check for read in reads)
    spans = sorted((read.offset, read.offset + read.length) for read in reads)
    assert spans[0][0] == 4 and spans[-1][1] == 4 + 64 * 6 * 4
    assert all(before[1] == after[0] for before, after in pairwise(spans))
