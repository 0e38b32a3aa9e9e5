"""A small checkpoint with items of every way to be written and read, for the tests of faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, AzureCheckpointError, BlobLocation, TransferOptions
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, stored_item
from azure_torch_ckpt.dcp.save_group import SaveGroup
from tests.support.containers import KEY as KEY
from tests.support.containers import content, put
from tests.support.states import assert_same, fill

_E = TypeVar("_E", bound=AzureCheckpointError)

# Several requests for `large`, and few enough of them in all that each can be broken in turn.
SMALL = TransferOptions(block_size=64 * 1024, concurrency=4)


def state(version: int = 0) -> dict[str, Any]:
    """Tensors of several blocks and of less than one, a strided one, and an object."""
    return {
        "large": fill(torch.empty(300, 200), 3 * version + 1).nan_to_num_(),
        "small": fill(torch.empty(10, 7, dtype=torch.int32), 3 * version + 2),
        "strided": fill(torch.empty(60, 80, dtype=torch.bfloat16), 3 * version + 3).t(),
        "object": f"version {version} " * 100,
    }


def zeros() -> dict[str, Any]:
    return {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else None
        for name, value in state().items()
    }


def save(url: str, version: int = 0, options: TransferOptions | None = SMALL, **place: Any) -> None:
    """`place` is for the writer: ``credential`` (the emulator's key by default), ``ca_file``, ``overwrite``."""
    dcp.save(state(version), storage_writer=AzureBlobWriter(url, options=options, **{"credential": KEY, **place}))


def load(
    url: str, into: dict[str, Any] | None = None, options: TransferOptions | None = SMALL, **place: Any
) -> dict[str, Any]:
    loaded = zeros() if into is None else into
    dcp.load(loaded, storage_reader=AzureBlobReader(url, options=options, **{"credential": KEY, **place}))
    return loaded


def assert_right(loaded: dict[str, Any], version: int = 0) -> None:
    """All of it, bit for bit."""
    for name, value in state(version).items():
        if isinstance(value, torch.Tensor):
            assert_same(loaded[name], value, name)
        else:
            assert loaded[name] == value


def error_of(caught: pytest.ExceptionInfo[CheckpointException]) -> AzureCheckpointError:
    """Our error in what ``dcp.save`` and ``dcp.load`` raise in one process."""
    error = caught.value.failures[0][0]
    assert isinstance(error, AzureCheckpointError), repr(error)
    return error


def failure(kind: type[_E], attempt: Callable[..., object], *args: Any, **options: Any) -> _E:
    """The error with which ``attempt(*args, **options)``, a save or a load in one process, must fail."""
    with pytest.raises(CheckpointException) as caught:
        attempt(*args, **options)
    error = error_of(caught)
    assert isinstance(error, kind), repr(error)
    return error


def item_of(url: str, name: str) -> StoredItem:
    storage = AzureBlobReader(url, credential=KEY).read_metadata().storage_data
    [info] = [info for index, info in storage.items() if index.fqn == name]
    return stored_item(info)


def data_path(url: str) -> str:
    """Path in the container of the checkpoint's data blob."""
    return BlobLocation.parse(url).join(item_of(url, "large").relative_path).path


def flip_in_storage(url: str, item: StoredItem, position: int) -> None:
    """Write the blob again with one byte of an item changed; a second time changes it back."""
    location = BlobLocation.parse(url)
    path = location.join(item.relative_path).path
    data = bytearray(content(url, path))
    data[item.offset + position] ^= 0x01
    put(url, path, bytes(data))


def save_without_collectives(url: str, *ranks: int, group: SaveGroup | None = None) -> None:
    """Save as some ranks would, one after the other: 50 numbers under ``rank0`` and so on.

    Without a `group` it is a save as by earlier versions of this package, which did not say what belongs together.
    """
    for rank in ranks:
        writer, planner = AzureBlobWriter(url, credential=KEY), dcp.DefaultSavePlanner()
        writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
        writer._current()._group = group
        planner.set_up_planner({f"rank{rank}": torch.arange(50)}, writer.storage_meta(), True)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        [plan], metadata = planner.create_global_plan([plan])
        [plan] = writer.prepare_global_plan([plan])
        results = writer.write_data(planner.finish_plan(plan), planner)
        writer.finish(metadata, [results.wait()])
