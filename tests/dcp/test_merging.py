"""Metadata of several ranks in one: no element twice, and of what several ranks have, that of the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from azure_torch_ckpt import UnsupportedCheckpointError
from azure_torch_ckpt.dcp.merging import merge_metadata
from azure_torch_ckpt.dcp.metadata.schema import check_metadata, storage_info
from azure_torch_ckpt.dcp.tensors.chunks import is_whole

Box = tuple[tuple[int, ...], tuple[int, ...]]


def part(name: str, size: tuple[int, ...] | None, *boxes: Box) -> Metadata:
    """Metadata of a rank whose blob is called `name`: chunks of a tensor under "x", or an object if `size` is None."""
    entry: Any = BytesStorageMetadata()
    indices = [MetadataIndex("x")]
    if size is not None:
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        entry = TensorStorageMetadata(TensorProperties(dtype=torch.uint8), torch.Size(size), chunks)
        indices = [MetadataIndex("x", torch.Size(offsets)) for offsets, _ in boxes]
    return Metadata({"x": entry}, {"x": ("x", name)}, {index: storage_info(name, 0, 100) for index in indices})


def merged(*parts: Metadata, **options: Any) -> dict[Box, str]:
    """The blobs of the chunks of "x", by offsets and sizes."""
    before = [repr(one) for one in parts]
    metadata = merge_metadata(parts, "here", **options)
    assert [repr(one) for one in parts] == before
    check_metadata(metadata, "here")
    entry = metadata.state_dict_metadata["x"]
    assert isinstance(entry, TensorStorageMetadata)
    found = {}
    for chunk in entry.chunks:
        info = metadata.storage_data[MetadataIndex("x", chunk.offsets)]
        found[tuple(chunk.offsets), tuple(chunk.sizes)] = info.relative_path
    assert len(found) == len(entry.chunks)
    return found


WHOLE: Box = ((0, 0), (4, 6))
TOP: Box = ((0, 0), (2, 6))
BOTTOM: Box = ((2, 0), (2, 6))
LEFT: Box = ((0, 0), (4, 3))
MIDDLE: Box = ((1, 0), (2, 6))
NOTHING: Box = ((0, 0), (0, 6))
BEHIND: Box = ((4, 0), (0, 6))


def test_shards_make_up_a_tensor() -> None:
    assert merged(part("a", (4, 6), TOP), part("b", (4, 6), BOTTOM)) == {TOP: "a", BOTTOM: "b"}


def test_what_is_replicated_is_taken_from_the_first() -> None:
    assert merged(part("a", (4, 6), WHOLE), part("b", (4, 6), WHOLE)) == {WHOLE: "a"}
    shards = [part(name, (4, 6), box) for name, box in (("a", BOTTOM), ("b", TOP), ("c", BOTTOM), ("d", TOP))]
    assert merged(*shards) == {BOTTOM: "a", TOP: "b"}


def test_a_whole_tensor_among_shards() -> None:
    whole, top = part("a", (4, 6), WHOLE), part("b", (4, 6), TOP)
    assert merged(whole, top) == merged(top, whole) == {WHOLE: "a"}


def test_shards_of_several_sizes() -> None:
    quarters: list[Box] = [((row, 0), (1, 6)) for row in range(4)]
    of_rows = part("a", (4, 6), *quarters)
    assert merged(of_rows, part("b", (4, 6), BOTTOM), part("c", (4, 6), TOP)) == {BOTTOM: "b", TOP: "c"}
    assert merged(of_rows, part("c", (4, 6), TOP)) == {TOP: "c", quarters[2]: "a", quarters[3]: "a"}


def test_overlapping_chunks_of_which_none_fit() -> None:
    for boxes in ([TOP, MIDDLE], [TOP, LEFT], [MIDDLE, LEFT, ((3, 0), (1, 6))]):
        with pytest.raises(UnsupportedCheckpointError, match=r"overlapping chunks of 'x' of here"):
            merged(*(part(name, (4, 6), box) for name, box in zip("abc", boxes, strict=False)))


def test_empty_chunks_do_not_hide_others() -> None:
    assert merged(part("a", (4, 6), NOTHING), part("b", (4, 6), WHOLE), part("c", (4, 6), BEHIND)) == {WHOLE: "b"}
    assert merged(part("a", (0, 6), NOTHING), part("b", (0, 6), NOTHING)) == {NOTHING: "a"}
    assert merged(part("a", (), ((), ())), part("b", (), ((), ()))) == {((), ()): "a"}


def test_a_part_that_is_missing_stays_missing() -> None:
    metadata = merge_metadata([part("a", (4, 6), TOP), part("b", (4, 6), TOP)], "here")
    entry = metadata.state_dict_metadata["x"]
    assert isinstance(entry, TensorStorageMetadata) and not is_whole(entry)


@pytest.mark.parametrize("other", [part("b", (4, 5), ((0, 0), (4, 5))), part("b", None)])
def test_values_of_each_ranks_own(other: Metadata) -> None:
    first = part("a", (4, 6), WHOLE)
    assert merged(first, other, own_values=True) == {WHOLE: "a"}
    for parts in ([first, other], [other, first]):
        with pytest.raises(UnsupportedCheckpointError, match="different tensors under the name 'x'"):
            merge_metadata(parts, "here")


def test_objects_and_their_paths_are_those_of_the_first() -> None:
    metadata = merge_metadata([part("a", None), part("b", None)], "here")
    assert metadata.storage_data[MetadataIndex("x")].relative_path == "a"
    assert metadata.planner_data == {"x": ("x", "a")}
