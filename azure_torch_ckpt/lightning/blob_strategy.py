"""`BlobStrategy`: what the strategies of the Trainer and of Fabric share, a sharded save or load through a plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from azure_torch_ckpt.dcp.reader import AzureBlobReader
from azure_torch_ckpt.dcp.writer import AzureBlobWriter
from azure_torch_ckpt.errors import CheckpointNotFoundError, ConfigurationError
from azure_torch_ckpt.objects.sharded import DTensorEntry, load_sharded, run_on_all_ranks, save_sharded
from azure_torch_ckpt.objects.states import States

from .checkpoint_io import AzureBlobCheckpointIO, blob_location, required_checkpoint_io
from .stock import (
    CheckpointIO,
    WrappingCheckpointIO,
    default_weights_only,
    fsdp_arguments,
    given_checkpoint_io,
    set_checkpoint_io,
)

__all__ = ["BlobStrategy", "give_mesh", "is_sharded_path"]


def is_sharded_path(path: str | Path) -> bool:
    """Whether all ranks save or load `path` together: it is in Blob Storage, and there is a process group."""
    return blob_location(path) is not None and dist.is_available() and dist.is_initialized()


class BlobStrategy:
    """First base of our strategies, before Lightning's own class. Every rank calls its methods, with the same path."""

    _states: States = States()
    _blob_writer: AzureBlobWriter | None = None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin, which has the credential; by default an `AzureBlobCheckpointIO` without arguments."""
        plugin = given_checkpoint_io(self)
        if plugin is None:
            self.checkpoint_io = plugin = AzureBlobCheckpointIO()
        elif isinstance(plugin, WrappingCheckpointIO) and plugin.checkpoint_io is None:
            plugin.checkpoint_io = AzureBlobCheckpointIO()
        return plugin

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        set_checkpoint_io(self, io)

    def _save_sharded(self, checkpoint: Any, path: str | Path, storage_options: Any) -> None:
        """Save a part on each rank; return when the checkpoint is complete, with ``async_save`` as well.

        Raises:
            TypeError: there are `storage_options`.
            ConfigurationError: the plugin is not an `AzureBlobCheckpointIO`.
            AzureCheckpointError: the save failed on some rank.
        """
        plugin = required_checkpoint_io(self.checkpoint_io, path)
        if storage_options is not None:
            raise TypeError("Saves to Blob Storage take no storage_options. Give them to AzureBlobCheckpointIO")

        def prepare() -> AzureBlobWriter:
            plugin.wait_for(path)
            writer = self._blob_writer or plugin.writer(path)
            writer.reset(path)
            return writer

        self._blob_writer = run_on_all_ranks(prepare)
        save_sharded(checkpoint, self._blob_writer)

    def _save_on_rank_0(self, checkpoint: Any, path: str | Path, storage_options: Any) -> None:
        """Save rank 0's object through the plugin. All ranks raise what the plugin raises."""

        def save() -> None:
            if dist.get_rank() == 0:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

        run_on_all_ranks(save)

    def _load_sharded(
        self,
        path: str | Path,
        device: torch.device,
        dtensors: Callable[[Any], Iterable[DTensorEntry]],
        *,
        without: tuple[str, ...] = (),
        weights_only: bool | None = None,
    ) -> Any:
        """Load what each rank needs; each rank loads all of a blob of ``torch.save``.

        Raises:
            ConfigurationError: the plugin is not an `AzureBlobCheckpointIO`.
            Those of `load_sharded`.
        """
        plugin = required_checkpoint_io(self.checkpoint_io, path)

        def prepare() -> AzureBlobReader:
            plugin.wait_for(path)
            return plugin.reader(path)

        reader = run_on_all_ranks(prepare)
        weights_only = default_weights_only(weights_only)
        try:
            return load_sharded(reader, device, dtensors, without=without, weights_only=weights_only)
        except CheckpointNotFoundError:
            return run_on_all_ranks(lambda: plugin.load_checkpoint(path, weights_only=weights_only))


def give_mesh(strategy: Any) -> None:
    """Give the FSDP of a strategy a device mesh, without which its sharded states are not DTensors.

    Raises:
        ConfigurationError: the mesh depends on the arguments, so that the user has to choose it.
    """
    arguments, sharding = fsdp_arguments(strategy), strategy.sharding_strategy.name
    if "device_mesh" in arguments:
        return
    if "process_group" in arguments or "HYBRID" in sharding:
        raise ConfigurationError(
            f"To shard by {sharding} and save the shards, FSDP needs a device mesh. Give the strategy "
            "device_mesh=(replicas, shards) instead of a process_group"
        )
    arguments["device_mesh"] = init_device_mesh(strategy.root_device.type, (dist.get_world_size(),))
