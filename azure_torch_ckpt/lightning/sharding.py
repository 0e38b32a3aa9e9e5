"""What the strategies of the Trainer and of Fabric share: from a plugin and a URL to a sharded save or load."""

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
from azure_torch_ckpt.objects.collective import together
from azure_torch_ckpt.objects.sharded import Place, load_sharded, save_sharded

from .checkpoint_io import AzureBlobCheckpointIO, blob_checkpoint_io, blob_location
from .stock import LOAD_TAKES_WEIGHTS_ONLY, CheckpointIO, WrappingCheckpointIO

__all__ = ["KeepsInBlobs", "ShardedCheckpoints", "give_mesh", "is_sharded_path"]


def is_sharded_path(path: str | Path) -> bool:
    """Whether all ranks are to save or load what `path` names: it is in Blob Storage, and there is a process group."""
    return blob_location(path) is not None and dist.is_available() and dist.is_initialized()


class ShardedCheckpoints:
    """The saves and loads of one strategy. Every rank calls the same methods, with the same path."""

    def __init__(self) -> None:
        self._writer: AzureBlobWriter | None = None

    def save(self, plugin: CheckpointIO, checkpoint: Any, path: str | Path, options: Any) -> None:
        """Save a share on each rank; return when the checkpoint is complete, with ``async_save`` as well.

        Raises:
            TypeError: there are storage options.
            ConfigurationError: the plugin is not ours.
            AzureCheckpointError: the save failed, on this rank or on another.
        """
        ours = _ours(plugin)
        if options is not None:
            raise TypeError("Saves to Blob Storage take no storage_options. Give them to AzureBlobCheckpointIO")

        def prepare() -> AzureBlobWriter:
            ours.wait_for(path)
            writer = self._writer or ours.writer(path)
            writer.reset(path)
            return writer

        self._writer = together(prepare)
        save_sharded(checkpoint, self._writer)

    def save_on_rank_0(self, plugin: CheckpointIO, checkpoint: Any, path: str | Path, options: Any) -> None:
        """Save what rank 0 holds, by the plugin; what it raises all ranks raise."""
        if dist.get_rank() == 0:
            together(lambda: plugin.save_checkpoint(checkpoint, path, storage_options=options))
        else:
            together(lambda: None)

    def load(
        self,
        plugin: CheckpointIO,
        path: str | Path,
        device: torch.device,
        places: Callable[[Any], Iterable[Place]] = lambda value: (),
        *,
        without: tuple[str, ...] = (),
        weights_only: bool | None = None,
    ) -> Any:
        """Load what every rank needs; a blob of ``torch.save`` is loaded whole by each of them.

        Raises:
            ConfigurationError: the plugin is not ours.
            Those of `load_sharded`.
        """
        ours = _ours(plugin)

        def prepare() -> AzureBlobReader:
            ours.wait_for(path)
            return ours.reader(path)

        reader = together(prepare)
        if not LOAD_TAKES_WEIGHTS_ONLY and weights_only is None:
            weights_only = False
        try:
            return load_sharded(reader, device, places, without=without, weights_only=weights_only)
        except CheckpointNotFoundError:
            return together(lambda: ours.load_checkpoint(path, weights_only=weights_only))


class KeepsInBlobs:
    """Base of the strategies of both, in front of Lightning's own class."""

    _checkpoint_io: CheckpointIO | None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin that knows the credential; an `AzureBlobCheckpointIO` without arguments if none was given."""
        self._checkpoint_io = plugin = _or_default(self._checkpoint_io)
        return plugin

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    def _checkpoints(self) -> ShardedCheckpoints:
        found: ShardedCheckpoints = self.__dict__.setdefault("_sharded_checkpoints", ShardedCheckpoints())
        return found


def _or_default(plugin: CheckpointIO | None) -> CheckpointIO:
    """The plugin; one of ours without arguments where there is none, or none in a wrapper."""
    if plugin is None:
        return AzureBlobCheckpointIO()
    if isinstance(plugin, WrappingCheckpointIO) and plugin.checkpoint_io is None:
        plugin.checkpoint_io = AzureBlobCheckpointIO()
    return plugin


def give_mesh(arguments: dict[str, Any], sharding: str, device: torch.device) -> None:
    """See that FSDP's arguments have a device mesh: only with one are its sharded states DTensors.

    Raises:
        ConfigurationError: only the user knows which one.
    """
    if "device_mesh" in arguments:
        return
    if "process_group" in arguments or "HYBRID" in sharding:
        raise ConfigurationError(
            f"To shard by {sharding} and save the shards, FSDP needs a device mesh. Give the strategy "
            "device_mesh=(replicas, shards) in place of a process_group"
        )
    arguments["device_mesh"] = init_device_mesh(device.type, (dist.get_world_size(),))


def _ours(plugin: CheckpointIO) -> AzureBlobCheckpointIO:
    ours = blob_checkpoint_io(plugin)
    if ours is None:
        raise ConfigurationError(
            f"The strategy saves and loads in Blob Storage by AzureBlobCheckpointIO, and was given a "
            f"{type(plugin).__name__}. Give the Trainer or Fabric plugins=[AzureBlobCheckpointIO(...)]"
        )
    return ours
