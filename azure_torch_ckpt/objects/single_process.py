"""Saves and loads packed objects in one process, with `AzureBlobWriter` and `AzureBlobReader`."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.tensors.chunks import is_whole
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from azure_torch_ckpt.objects.codec import SKELETON, MapLocation, Unpacked, pack, unpack

__all__ = ["check_items", "load_object", "read_items", "read_skeleton", "save_object", "save_state_dict"]


def save_object(value: Any, writer: AzureBlobWriter) -> None:
    """Save any object that ``torch.save`` can save, as a checkpoint at the writer's URL.

    Raises:
        Those of `AzureBlobWriter` and `pack`.
    """
    save_state_dict(pack(value).state_dict(), writer)


def save_state_dict(state_dict: dict[str, torch.Tensor], writer: AzureBlobWriter) -> None:
    """Save `Packed.state_dict`, or a copy of it. Uses no process group, even if there is one.

    The steps are those of ``dcp.save``, which warns about every save without a process group.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer.set_up_storage_writer(is_coordinator=True)
    with CollectorPause():
        planner.set_up_planner(state_dict, writer.storage_meta(), is_coordinator=True)
        local = writer.prepare_local_plan(planner.create_local_plan())
        # Not by the planner, which would first look for duplicates among plans; there is only one plan.
        plans, metadata = create_default_global_save_plan([local])
        _check_complete(metadata, writer.checkpoint_id)
        (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [results])


def _check_complete(metadata: Metadata, url: str) -> None:
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not is_whole(entry):
            raise CheckpointError(
                f"This process has only a part of {name!r}, a DTensor that is sharded over several ranks. Nothing was "
                f"saved at {url}. Use the strategy of azure_torch_ckpt.lightning for sharded models, which saves on "
                "all ranks"
            )


def load_object(reader: AzureBlobReader, map_location: MapLocation = None, weights_only: bool | None = None) -> Any:
    """Load an object that `save_object` saved; the arguments are those of ``torch.load``.

    Raises:
        Those of `AzureBlobReader` and `unpack`.
    """
    metadata = reader.read_metadata()
    skeleton = read_skeleton(reader, metadata)

    def fetch(unpacked: Unpacked) -> None:
        with CollectorPause():
            check_items(unpacked, metadata, reader.checkpoint_id)
            items = unpacked.allocate()
        read_items(reader, metadata, items)

    unpacked = unpack(skeleton, map_location, weights_only, reader.checkpoint_id, fetch)
    fetch(unpacked)
    return unpacked.value


def read_skeleton(reader: AzureBlobReader, metadata: Metadata) -> torch.Tensor:
    """Read the skeleton of the checkpoint whose metadata the reader has read, for `unpack`.

    Raises:
        UnsupportedCheckpointError: the checkpoint has no skeleton.
    """
    entry = metadata.state_dict_metadata.get(SKELETON)
    if not isinstance(entry, TensorStorageMetadata) or entry.properties.dtype is not torch.uint8:
        raise UnsupportedCheckpointError(
            f"The checkpoint at {reader.checkpoint_id} was not saved by the Lightning plugin: it has tensors, but "
            "not the object that held them. Load it with torch.distributed.checkpoint.load"
        )
    skeleton = torch.empty(entry.size, dtype=torch.uint8, device="cpu")
    read_items(reader, metadata, {SKELETON: skeleton})
    return skeleton


def read_items(reader: AzureBlobReader, metadata: Metadata, items: dict[str, torch.Tensor]) -> None:
    """Load items by name into tensors, from the very checkpoint that `metadata` describes.

    ``dcp.load`` would read the metadata again, and might then find another checkpoint at the URL than the one with the
    skeleton.

    Raises:
        CheckpointReplacedError: the checkpoint at the URL has been replaced.
        Those of `AzureBlobReader.read_data`.
    """
    if not items:
        return
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    with CollectorPause():
        planner.set_up_planner(items, metadata, is_coordinator=True)
        local = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([local]))
    reader.read_data(planner.finish_plan(plan), planner).wait()


def check_items(unpacked: Unpacked, metadata: Metadata, url: str) -> None:
    """Raise `CorruptCheckpointError` unless the metadata has the skeleton's items, before they get memory."""
    for placeholder in unpacked.placeholders.values():
        if placeholder.item is None:
            continue
        entry = metadata.state_dict_metadata.get(placeholder.item)
        stored = placeholder.geometry.stored()
        if not isinstance(entry, TensorStorageMetadata) or (entry.properties.dtype, entry.size) != (
            stored.dtype,
            stored.size,
        ):
            raise CorruptCheckpointError(
                f"The skeleton of {url} and its metadata differ about {placeholder.item!r}. Use another checkpoint"
            )
