"""State dicts of every kind of sharding, whose values any rank can compute.

The functions that take part in a save or a load run on the ranks of `tests/support/ranks.py`.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from tests.support.containers import KEY as KEY

# name: (sizes, dtype). On 4 ranks, 5 rows make shards of 2, 2, 1 and 0 rows, and 3 rows leave a rank without any.
GLOBAL = {
    "even": ((12, 8), torch.float32),
    "uneven": ((5, 6), torch.bfloat16),
    "few": ((3, 4), torch.float64),
    "long": ((7,), torch.int64),
    "wide": ((2, 9), torch.float16),
    "deep": ((4, 3, 5), torch.uint8),
    "none": ((0, 4), torch.float32),
}


def values(name: str, sizes: tuple[int, ...], dtype: torch.dtype, version: int = 0) -> torch.Tensor:
    """The bits that a tensor of this name has in this version: arbitrary, and different for each name and version."""
    seed = zlib.crc32(f"{name}:{version}".encode())
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, 120, sizes, generator=generator).to(dtype)


def expected(name: str, version: int = 0) -> torch.Tensor:
    sizes, dtype = GLOBAL[name]
    return values(name, sizes, dtype, version)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.numel() == 0 or torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


def assert_same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    if isinstance(got, DTensor):
        got = got.full_tensor()
    assert same_bits(got.detach(), wanted), f"{what}: {got} where {wanted} was saved"


@functools.cache
def mesh(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])


def meshes() -> list[DeviceMesh]:
    """All ranks in a row, and where they fill one, in a square."""
    world = dist.get_world_size()
    return [mesh(world), mesh(2, 2)] if world == 4 else [mesh(world)]


def layouts(dims: int) -> list[tuple[DeviceMesh, tuple[Placement, ...]]]:
    """Every way to lay a tensor of so many dimensions over the ranks of this world."""
    one: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(dims))]
    found: list[tuple[DeviceMesh, tuple[Placement, ...]]] = []
    for over in meshes():
        if over.ndim == 1:
            found += [(over, (placement,)) for placement in one]
        else:
            found += [(over, (outer, inner)) for outer in one for inner in one]
    return found


def laid_out(full: torch.Tensor, over: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    assert not any(isinstance(placement, Partial) for placement in placements)
    return distribute_tensor(full, over, placements, src_data_rank=None)


def sharded_tensor(full: torch.Tensor) -> ShardedTensor:
    """Rows in runs of equal length; the last ranks may have fewer, or none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = math.ceil(full.shape[0] / world)
    mine = full[rank * rows : (rank + 1) * rows].clone()
    offsets = [rank * rows, *[0] * (full.dim() - 1)]
    shards = [LocalShard.from_tensor_and_offsets(mine, offsets, rank)] if mine.numel() else []
    made: ShardedTensor = init_from_local_shards(shards, *full.shape)
    return made


def assert_same_shards(got: ShardedTensor, wanted: torch.Tensor, what: str) -> None:
    for shard in got.local_shards():
        offsets, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        region = wanted[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
        assert same_bits(shard.tensor, region), f"{what} at {offsets}: {shard.tensor} where {region} was saved"


def plain(version: int = 0) -> dict[str, Any]:
    """A state dict of whole tensors, the same on all ranks, and an object."""
    state: dict[str, Any] = {name: expected(name, version) for name in GLOBAL}
    return {**state, "step": version}


def rows(version: int = 0) -> dict[str, Any]:
    """A state dict of tensors that are sharded by rows over all ranks, and an object."""
    over = mesh(dist.get_world_size())
    state: dict[str, Any] = {name: laid_out(expected(name, version), over, (Shard(0),)) for name in GLOBAL}
    return {**state, "step": version}


def empty(state: dict[str, Any]) -> dict[str, Any]:
    """The same with zeros in the place of all values: what a load is to fill."""
    return {name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None for name, value in state.items()}


def writer(url: str, **options: Any) -> AzureBlobWriter:
    return AzureBlobWriter(url, credential=KEY, **options)


def reader(url: str) -> AzureBlobReader:
    return AzureBlobReader(url, credential=KEY)


def assert_version(url: str, version: int, make: Callable[[int], dict[str, Any]] = rows, **load: Any) -> None:
    """The checkpoint at `url` is the one of this version, bit for bit."""
    state = empty(make(version))
    dcp.load(state, storage_reader=reader(url), **load)
    assert state["step"] == version
    for name in GLOBAL:
        assert_same(state[name], expected(name, version), name)


def failures(save: Callable[[], Any]) -> dict[int, BaseException]:
    """The errors of all ranks in the exception that torch raises on every rank."""
    try:
        save()
    except CheckpointException as caught:
        return {rank: error for rank, (error, _) in caught.failures.items()}
    raise AssertionError("the save did not fail")


class ShardPlanner(DefaultLoadPlanner):
    """A load planner without a process group: takes the state dict's tensors for shards of the saved ones.

    Args:
        offsets: where in the saved tensor a shard starts, by the tensor's name.
    """

    def __init__(self, offsets: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._offsets = offsets

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, offset in self._offsets.items():
            assert self.metadata is not None
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            shard = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=self.state_dict[name].size())
            items += create_read_items_for_chunk_list(name, stored, [shard])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]
