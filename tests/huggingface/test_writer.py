"""`AzureBlobHuggingFaceWriter`: its models load in transformers, and are replaced whole or not at all."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM

from azure_torch_ckpt import (
    AzureBlobHuggingFaceWriter,
    BlobLocation,
    CheckpointError,
    CheckpointExistsError,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from tests.huggingface import small_llama as hf
from tests.support import jobs
from tests.support.faults import Answer, Cut, Kill
from tests.support.mixed_checkpoint import error_of
from tests.support.proxy import FaultProxy
from tests.support.sharded import assert_same

if TYPE_CHECKING:
    from tests.support.ranks import RankGroup

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

FLOAT4 = torch.float4_e2m1fn_x2


def assert_pretrained(url: str, folder: Path, version: int = 0) -> None:
    """transformers loads the downloaded folder, and finds every weight there."""
    pretrained: Any = AutoModelForCausalLM
    loaded, info = pretrained.from_pretrained(hf.download(url, folder), dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in hf.model(version).state_dict().items():
        assert_same(loaded.state_dict()[name], value, name)


@pytest.mark.parametrize("max_file_size", [5_000_000_000, 50_000, 1])
def test_transformers_loads_what_was_saved(url: str, tmp_path: Path, max_file_size: int):
    hf.save(url, max_file_size=max_file_size)
    assert_pretrained(url, tmp_path / "model")
    index = json.loads(hf.get(url, hf.INDEX))
    state = hf.model().state_dict()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert index["weight_map"].keys() == state.keys()
    assert sorted({*index["weight_map"].values(), hf.INDEX}) == sorted(hf.files(url))
    if max_file_size == 1:
        assert len(set(index["weight_map"].values())) == len(state)
    hf.load(url)


def test_two_ranks_under_fsdp_save_whole_tensors_and_load_their_shards(
    url: str, tmp_path: Path, ranks: Callable[[int], RankGroup]
):
    ranks(2).run(hf.save_sharded, url)
    assert_pretrained(url, tmp_path / "model")
    ranks(2).run(hf.load_sharded, url)
    hf.load(url)
    ranks(2).run(hf.save_sharded, url, 1)
    assert_pretrained(url, tmp_path / "replaced", 1)
    assert len(hf.files(url)) == 2


def test_odd_tensors_of_two_ranks_are_right_and_aligned(url: str, tmp_path: Path, ranks: Callable[[int], RankGroup]):
    ranks(2).run(hf.save_odd, url)
    [name] = [name for name in hf.files(url) if name != hf.INDEX]
    data = hf.get(url, name)
    (tmp_path / name).write_bytes(data)
    wanted = hf.odd()
    for key, value in load_file(tmp_path / name).items():  # safetensors refuses gaps and overlaps
        assert_same(value, wanted[key], key)
    with safe_open(tmp_path / name, "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(wanted)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for key, value in wanted.items():
        assert (8 + length + header[key]["data_offsets"][0]) % value.dtype.itemsize == 0, key
    hf.assert_loads(url, wanted)


def test_packed_numbers_of_four_bits_are_written_as_safetensors_writes_them(url: str, tmp_path: Path):
    packed = torch.arange(48, dtype=torch.uint8).reshape(6, 8).view(FLOAT4)
    state = {"rows": packed, "columns": packed.t(), "part": packed[:, 2:5], "none": packed[:0], "norm": torch.ones(3)}
    dcp.save(state, storage_writer=hf.writer(url))
    [name] = [name for name in hf.files(url) if name != hf.INDEX]
    data = hf.get(url, name)
    (tmp_path / name).write_bytes(data)
    loaded = {key: torch.zeros(state[key].shape, dtype=torch.uint8).view(FLOAT4) for key in state.keys() - {"norm"}}
    dcp.load(loaded, storage_reader=hf.reader(url))
    found = load_file(tmp_path / name)
    for key, value in loaded.items():
        wanted = state[key].view(torch.uint8).contiguous()
        assert torch.equal(value.view(torch.uint8), wanted), key
        assert found[key].dtype == FLOAT4 and torch.equal(found[key].view(torch.uint8), wanted), key
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["rows"]["dtype"] == "F4" and header["rows"]["shape"] == [6, 16]


def test_files_are_those_of_the_mapping(url: str):
    state = hf.model().state_dict()
    mapping = {name: 2 if "layers.1" in name else 1 for name in state}
    hf.save(url, fqn_to_index_mapping=mapping)
    for name, file in json.loads(hf.get(url, hf.INDEX))["weight_map"].items():
        assert file.endswith(f"-{mapping[name]:05d}-of-00002.safetensors")
    hf.load(url)
    with pytest.raises(CheckpointException) as caught:
        hf.save(url, fqn_to_index_mapping={"other": 1})
    assert "fqn_to_index_mapping has no file" in str(error_of(caught))


def test_nothing_is_copied_and_blocks_are_filled(proxied: str, proxy: FaultProxy):
    """One process writes one run of bytes, whatever the tensors: no block for each of them."""
    state = {f"t{number:03d}": torch.full((100,), number, dtype=torch.float32) for number in range(500)}
    dcp.save(state, storage_writer=hf.writer(proxied))
    blocks = [exchange.body_length for exchange in proxy.requests("Put Block")]
    assert hf.SMALL.block_size is not None
    assert len(blocks) == 1 + -(-500 * 400 // hf.SMALL.block_size)  # and the header
    assert sum(blocks) < 500 * 400 + 60_000


def test_every_block_goes_with_its_checksum(url: str, proxied: str, proxy: FaultProxy) -> None:
    hf.save_alone(proxied)
    blocks = proxy.requests("Put Block")
    files = {block.path for block in blocks}
    assert len(blocks) > len(files) > 1  # each file's header is a block of its own
    assert all("x-ms-content-crc64" in block.headers for block in blocks)


def test_an_asynchronous_save_is_the_same(url: str):
    saved: Any = dcp.async_save(hf.odd(), storage_writer=hf.writer(url), no_dist=True)
    saved.result(60)
    hf.load_alone(url)


# What is refused


def refusal(url: str, state: dict[str, Any]) -> str:
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=hf.writer(url))
    error = error_of(caught)
    assert isinstance(error, CheckpointError)
    assert hf.files(url) == []
    return str(error)


def test_what_no_file_can_hold_is_refused_before_anything_is_written(url: str):
    assert "'step'" in refusal(url, {"w": torch.ones(2), "step": 5})
    assert "complex128" in refusal(url, {"w": torch.ones(2, dtype=torch.complex128)})
    assert "'__metadata__'" in refusal(url, {"w": torch.ones(2), "__metadata__": torch.ones(2)})
    assert "half a surrogate pair" in refusal(url, {"a\ud800": torch.ones(2)})
    assert "scalar of torch.float4" in refusal(url, {"w": torch.tensor(1, dtype=torch.uint8).view(FLOAT4)})
    assert "plain tensors only" in refusal(url, {"w": torch.eye(3).to_sparse()})
    with pytest.raises(CheckpointError, match="use_collectives"):
        dcp.save({"w": torch.ones(2)}, storage_writer=hf.writer(url), use_collectives=False)
    assert hf.files(url) == []
    with pytest.raises(ValueError, match="max_file_size"):
        hf.writer(url, max_file_size=0)


def test_a_plan_of_an_earlier_save_is_refused_and_touches_nothing(url: str):
    """Its files are those of the model at the URL."""
    planners = [dcp.DefaultSavePlanner(enable_plan_caching=True) for _ in range(2)]
    dcp.save({"w": torch.ones(3)}, storage_writer=hf.writer(url), planner=planners[0])
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"w": torch.zeros(3)}, storage_writer=hf.writer(url), planner=planners[1])
    assert "enable_plan_caching" in str(error_of(caught))
    hf.assert_loads(url, {"w": torch.ones(3)})


# The model that was at the URL before


def test_a_model_is_replaced_only_if_that_is_allowed(url: str):
    """It is not by default."""
    hf.save(url)
    before = hf.files(url)
    with pytest.raises(CheckpointException) as caught:
        dcp.save(hf.odd(1), storage_writer=AzureBlobHuggingFaceWriter(url, credential=hf.KEY))
    error = error_of(caught)
    assert isinstance(error, CheckpointExistsError) and "lists files" in str(error)
    assert hf.files(url) == before
    hf.load(url)
    hf.save(url, 1)
    assert not set(hf.files(url)) & set(before) - {hf.INDEX}
    hf.load(url, 1)


def test_a_model_in_one_file_gives_way(url: str, tmp_path: Path):
    """transformers would load model.safetensors, and not look at the index."""
    hf.put(url, "model.safetensors", save(hf.model(0).state_dict(), {"format": "pt"}))
    hf.load(url, 0)
    with pytest.raises(CheckpointException):
        hf.save(url, 1, overwrite=False)
    hf.load(url, 0)
    hf.save(url, 1)
    assert "model.safetensors" not in hf.files(url)
    assert_pretrained(url, tmp_path / "model", 1)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "consolidated.safetensors"])
def test_files_that_listing_readers_would_mix_with_the_model_are_not_joined(url: str, name: str):
    hf.put(url, name, save({"other": torch.ones(3)}))
    hf.put(url, "sub/model.safetensors", save({"other": torch.ones(3)}))
    before = hf.files(url)
    with pytest.raises(CheckpointException) as caught:
        hf.save(url, 1, overwrite=False)
    assert isinstance(error_of(caught), CheckpointExistsError)
    assert f"{name!r} is at {url} (1 such in all)" in str(error_of(caught))
    assert hf.files(url) == before
    hf.save(url, 1, overwrite=True)
    hf.load(url, 1)
    assert set(before) < set(hf.files(url))


@pytest.mark.parametrize("kind", ["Put Block", "Put Block List", "Put Blob"])
def test_a_save_that_fails_is_invisible_and_the_next_one_clears_up(
    url: str, proxied: str, proxy: FaultProxy, kind: Any
):
    hf.save(url, 0)
    writer = hf.writer(proxied, max_file_size=50_000)
    proxy.when(kind, nth=2 if kind != "Put Blob" else 1).do(Answer(403, "AuthorizationFailure"))
    with pytest.raises(CheckpointException):
        dcp.save(hf.model(1).state_dict(), storage_writer=writer)
    hf.load(url, 0)
    dcp.save(hf.model(2).state_dict(), storage_writer=writer)
    hf.load(url, 2)
    named = {*json.loads(hf.get(url, hf.INDEX))["weight_map"].values(), hf.INDEX}
    assert named == set(hf.files(url))


def test_a_rank_that_fails_fails_the_save_on_all(
    url: str, proxied: str, proxy: FaultProxy, ranks: Callable[[int], RankGroup]
):
    ranks(2).run(hf.save_sharded, url, 0)
    before = hf.files(url)
    proxy.when("Put Block", times=None).do(Answer(403, "AuthorizationFailure"))
    for errors in ranks(2).run(hf.save_with_a_rank_that_fails, url, proxied):
        assert len(errors) == 1 and "AccessDeniedError" in errors[0]
    assert hf.files(url) == before
    hf.load(url, 0)


@pytest.mark.parametrize(
    ("kind", "at"), [("Put Block", "request"), ("Put Block List", "answer"), ("Put Blob", "request")]
)
def test_a_process_that_is_killed_leaves_the_old_model(url: str, proxied: str, proxy: FaultProxy, kind: Any, at: Any):
    hf.save_alone(url, 0)
    with jobs.Job(hf.save_alone, [(proxied, 1)]) as job:
        proxy.when(kind).do(Kill(job.pid(), at=at))
        job.go()
        assert job.end().exitcode == -signal.SIGKILL
    hf.load_alone(url, 0)
    hf.save_alone(url, 2)
    hf.load_alone(url, 2)


def test_a_commit_whose_answer_is_lost_is_recognised(url: str, proxied: str, proxy: FaultProxy):
    hf.save(url, 0)
    proxy.when("Put Blob").do(Cut(at="answer"))
    hf.save(proxied, 1)
    hf.load(url, 1)
    assert proxy.count("Put Blob") == 2 and len(hf.files(url)) == 2


def test_the_writer_can_be_used_again_and_at_another_url(url: str):
    writer = hf.writer(url)
    for version, place in enumerate([url, url, f"{url}-2"]):
        dcp.save(hf.model(version).state_dict(), storage_writer=writer, checkpoint_id=place)
        hf.load(place, version)
    hf.load(url, 1)
    store = BlobStore(BlobLocation.parse(url), Access(hf.KEY))
    assert all(blob.size for blob in store.list("models/"))
