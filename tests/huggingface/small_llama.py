"""A small Llama, whole and sharded, and other tensors; saved, loaded and compared, by one process or by ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

from azure_torch_ckpt import BlobLocation, TransferOptions
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.huggingface import AzureBlobHuggingFaceReader, AzureBlobHuggingFaceWriter
from tests.support import containers
from tests.support.sharded import assert_same, laid_out, mesh
from tests.support.states import fill

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here asks the Hub

KEY = Azurite.account_key
# Several blocks for the larger tensors.
SMALL = TransferOptions(block_size=16 * 1024, concurrency=4)
INDEX = "model.safetensors.index.json"

# What else a file may hold: every width, rows that two ranks cannot share evenly, fewer rows than ranks, none at all.
ODD = {
    "rows.7": ((7, 33), torch.float32),
    "row": ((1, 50), torch.int64),
    "nothing": ((0, 4), torch.float16),
    "scalar": ((), torch.float64),
    "flags": ((13,), torch.bool),
    "bytes": ((5, 3), torch.uint8),
    "small floats": ((6, 2), torch.float8_e4m3fn),
    "complex": ((3, 2), torch.complex64),
    "ümlaut/../\n": ((4, 4), torch.bfloat16),
}


def odd(version: int = 0) -> dict[str, torch.Tensor]:
    return {
        name: fill(torch.empty(shape, dtype=dtype), number + 100 * version)
        for number, (name, (shape, dtype)) in enumerate(ODD.items())
    }


def model(version: int = 0) -> LlamaForCausalLM:
    """The same weights for the same version, on every rank and in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import, and not every process needs it

    torch.manual_seed(version)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=333,
    )
    made: LlamaForCausalLM = LlamaForCausalLM(config)
    return made.bfloat16()


def writer(url: str, **options: Any) -> AzureBlobHuggingFaceWriter:
    return AzureBlobHuggingFaceWriter(url, **{"credential": KEY, "options": SMALL, "overwrite": True, **options})


def reader(url: str, **options: Any) -> AzureBlobHuggingFaceReader:
    return AzureBlobHuggingFaceReader(url, **{"credential": KEY, "options": SMALL, **options})


def save(url: str, version: int = 0, **options: Any) -> None:
    dcp.save(model(version).state_dict(), storage_writer=writer(url, **options))


def assert_loads(url: str, wanted: dict[str, torch.Tensor], state: dict[str, torch.Tensor] | None = None) -> None:
    """Assert that the tensors at `url` are these, bit for bit; they are loaded into zeros of the layout of `state`."""
    loaded = {name: torch.zeros_like(value) for name, value in (state or wanted).items()}
    dcp.load(loaded, storage_reader=reader(url))
    for name, value in wanted.items():
        assert_same(loaded[name], value, name)


def load(url: str, version: int = 0) -> None:
    """Assert that the model at `url` is the one of this version."""
    assert_loads(url, model(version).state_dict())


def save_alone(url: str, version: int = 0) -> None:
    """Without transformers, for processes that are to start quickly."""
    dcp.save(odd(version), storage_writer=writer(url, max_file_size=200))


def load_alone(url: str, version: int = 0) -> None:
    assert_loads(url, odd(version))


def download(url: str, folder: Path) -> Path:
    """Download all files, and write the model's configuration beside them."""
    model().config.save_pretrained(containers.download(url, folder))
    return folder


def files(url: str) -> list[str]:
    location = BlobLocation.parse(url)
    return [blob.path.rpartition("/")[2] for blob in BlobStore(location, Access(KEY)).list(location.path + "/")]


def put(url: str, name: str, data: bytes) -> None:
    location = BlobLocation.parse(url).join(name)
    BlobStore(location, Access(KEY)).put(location.path, data)


def get(url: str, name: str) -> bytes:
    location = BlobLocation.parse(url).join(name)
    return BlobStore(location, Access(KEY)).read(location.path, limit=1 << 30)[0]


# What ranks run


def sharded(version: int = 0) -> LlamaForCausalLM:
    """Under FSDP2: every parameter is a DTensor that is sharded by rows."""
    whole = model(version)
    over = mesh(dist.get_world_size())
    for layer in whole.model.layers:
        fully_shard(layer, mesh=over)
    fully_shard(whole, mesh=over)
    return whole


def save_sharded(url: str, version: int = 0, **options: Any) -> None:
    state = sharded(version).state_dict()
    assert all(value.placements == (Shard(0),) for value in state.values())
    dcp.save(state, storage_writer=writer(url, **options))


def load_sharded(url: str, version: int = 0) -> None:
    assert_loads(url, model(version).state_dict(), sharded(version + 1).state_dict())


def save_odd(url: str, dim: int = 0) -> None:
    """Over all ranks, sharded in one dimension; tensors that do not have it are on each."""
    over = mesh(dist.get_world_size())
    placements = {name: Shard(dim) if value.dim() > dim else Replicate() for name, value in odd().items()}
    state = {name: laid_out(value, over, (placements[name],)) for name, value in odd().items()}
    dcp.save(state, storage_writer=writer(url))


def failures_of(function: Any, *args: Any) -> list[str]:
    """The errors of all ranks, as text."""
    try:
        function(*args)
    except dcp.api.CheckpointException as caught:
        return [f"{type(error).__name__}: {error}" for error, _ in caught.failures.values()]
    return []


def columns(version: int = 0, over: DeviceMesh | None = None) -> dict[str, torch.Tensor]:
    """The model's weights, the matrices sharded by columns as tensor parallelism does it; or in both ways on a grid."""
    grid = over or mesh(dist.get_world_size())
    matrix = (Shard(1),) if grid.ndim == 1 else (Shard(0), Shard(1))
    return {
        name: laid_out(value, grid, matrix if value.dim() == 2 else (Replicate(),) * grid.ndim)
        for name, value in model(version).state_dict().items()
    }


def save_columns(url: str, version: int = 0, **options: Any) -> None:
    dcp.save(columns(version), storage_writer=writer(url, **options))


def save_grid(url: str, version: int = 0) -> None:
    dcp.save(columns(version, mesh(2, 2)), storage_writer=writer(url))


def load_columns(url: str, version: int = 0) -> None:
    assert_loads(url, model(version).state_dict(), columns(version + 1))


def experts(version: int = 0) -> dict[str, torch.Tensor]:
    """Long runs in the second dimension, and something else for the same file."""
    return {
        "experts": fill(torch.empty(3, 200, 64), version),
        "gate": fill(torch.empty(64, 3), version + 1),
        "bias": fill(torch.empty(3), version + 2),
    }


def save_experts(url: str) -> None:
    over = mesh(dist.get_world_size())
    dims = {"experts": Shard(1), "gate": Shard(0), "bias": Replicate()}
    state = {name: laid_out(value, over, (dims[name],)) for name, value in experts().items()}
    dcp.save(state, storage_writer=writer(url))


def failures_of_columns(url: str, bad_url: str) -> list[str]:
    """Rank 0, which joins the columns, has another way to the service."""
    return failures_of(save_columns, bad_url if dist.get_rank() == 0 else url, 1)


def save_with_a_rank_that_fails(url: str, bad_url: str) -> list[str]:
    """Rank 1 has another way to the service, which breaks."""
    own = bad_url if dist.get_rank() == 1 else url
    return failures_of(save_sharded, own, 1)
