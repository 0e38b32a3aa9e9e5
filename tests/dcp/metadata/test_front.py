"""`.metadata` with an index tells torch's readers what it tells ours, and damage to it is noticed or does nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from azure_torch_ckpt.dcp.metadata.front import open_metadata
from azure_torch_ckpt.dcp.metadata.schema import check_metadata, load_metadata
from azure_torch_ckpt.dcp.metadata.views import ColumnMetadata
from azure_torch_ckpt.errors import AzureCheckpointError
from tests.dcp.metadata.index_parts import IndexParts
from tests.dcp.metadata.pickles import WHERE
from tests.dcp.metadata.virtual_saves import (
    VirtualSave,
    assert_same_metadata,
    plain,
    rows,
    save_of,
    saves,
    tensor_entry,
)


def small() -> VirtualSave:
    entries: dict[str, Any] = {
        "layers.0.w": rows((5, 3), 2),
        "scalar": tensor_entry((), [((), ())], torch.bfloat16),
        "o": BytesStorageMetadata(),
    }
    return save_of(entries, 2)


@settings(max_examples=150)
@given(saves())
def test_all_readers_find_what_was_planned_and_written(save: VirtualSave) -> None:
    data = save.dump()
    assert_same_metadata(plain(data), save.made)
    machine = load_metadata(data, WHERE)
    check_metadata(machine, WHERE)
    assert_same_metadata(machine, save.made)
    views = open_metadata(data, WHERE)
    assert type(views) is ColumnMetadata
    assert_same_metadata(views, save.made)


def test_the_format_is_the_one_that_is_described() -> None:
    data = small().dump()
    assert IndexParts.of(IndexParts.of(data).data()).document == IndexParts.of(data).document
    assert_same_metadata(open_metadata(IndexParts.of(data).data(), WHERE), small().made)


# Damage


def is_noticed(data: bytes, wanted: Metadata) -> bool:
    """Whether damage is an error of ours. If it is not, it must have changed nothing."""
    try:
        metadata = open_metadata(data, WHERE)
        dict(metadata.storage_data)
    except AzureCheckpointError as error:
        assert WHERE in str(error) and len(str(error)) < 2000
        return True
    assert_same_metadata(metadata, wanted)
    return False


@pytest.mark.parametrize("flip", [0x01, 0xFE])
def test_every_changed_byte(flip: int) -> None:
    save = small()
    data = save.dump()
    parts = IndexParts.of(data)
    items = len(data) - len(parts.rest)
    between = items - 9 - sum(map(len, sum(parts.sections, ())))
    unnoticed = set()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= flip
        if not is_noticed(bytes(damaged), save.made):
            unnoticed.add(at)
    # What only torch's readers look at, and what makes the index out to be none, so that the items are read.
    assert unnoticed <= {1, *range(11, 19), *range(between, between + 9), *range(items, len(data))}


def test_every_truncation() -> None:
    save = small()
    data = save.dump()
    kept = len(data) - len(IndexParts.of(data).rest)
    for end in range(len(data)):
        assert is_noticed(data[:end], save.made) == (end < kept)
