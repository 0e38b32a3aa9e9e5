"""`AzureBlobHuggingFaceReader`: files of any writer, in ranges, and nothing that is damaged or made to do harm."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    CheckpointNotFoundError,
    CheckpointReplacedError,
    ContainerNotFoundError,
    CorruptCheckpointError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
)
from tests.huggingface import small_llama as hf
from tests.support.containers import upload
from tests.support.faults import Call
from tests.support.mixed_checkpoint import error_of
from tests.support.proxy import FaultProxy
from tests.support.sharded import ShardPlanner, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def failure(url: str, state: dict[str, Any] | None = None) -> Exception:
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"w": torch.zeros(2)} if state is None else state, storage_reader=hf.reader(url))
    return error_of(caught)


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_loads_what_transformers_saves(url: str, tmp_path: Path, shard_size: str):
    hf.model().save_pretrained(tmp_path / "model", max_shard_size=shard_size)
    upload(tmp_path / "model", url)
    assert ("model.safetensors" in hf.files(url)) == (shard_size == "5GB")
    hf.load(url)


def test_loads_the_shards_that_torchs_writer_saves(url: str, tmp_path: Path):
    """Without consolidation: the files of ranks, and no index."""
    dcp.save(hf.model().state_dict(), storage_writer=HuggingFaceStorageWriter(str(tmp_path), save_distributed=True))
    upload(tmp_path, url)
    assert not any(name == hf.INDEX for name in hf.files(url))
    hf.load(url)


def sharding(offsets: dict[str, list[int]]) -> dict[str, str]:
    return {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": at} for name, at in offsets.items()})}


def test_puts_the_shards_of_several_files_together(url: str):
    whole = torch.arange(24.0).reshape(6, 4)
    hf.put(url, "shard-00001-model-00001-of-00001.safetensors", save({"w": whole[:4]}, sharding({"w": [0, 0]})))
    hf.put(url, "shard-00002-model-00001-of-00001.safetensors", save({"w": whole[4:]}, sharding({"w": [4, 0]})))
    hf.assert_loads(url, {"w": whole})
    hf.put(url, "shard-00002-model-00001-of-00001.safetensors", save({"w": whole[5:]}, sharding({"w": [5, 0]})))
    assert "files are missing" in str(failure(url, {"w": torch.zeros(6, 4)}))
    # As many rows as there should be, one of them twice and one not at all.
    hf.put(url, "shard-00002-model-00001-of-00001.safetensors", save({"w": whole[3:4]}, sharding({"w": [3, 0]})))
    hf.put(url, "shard-00003-model-00001-of-00001.safetensors", save({"w": whole[5:]}, sharding({"w": [5, 0]})))
    assert "stored twice" in str(failure(url, {"w": torch.zeros(6, 4)}))


def test_fetches_no_more_than_the_shard(proxied: str, proxy: FaultProxy):
    whole = torch.randn(512, 512)
    dcp.save({"w": whole, "other": torch.randn(512, 512)}, storage_writer=hf.writer(proxied))
    before = len(proxy.requests("Get Blob"))
    state = {"w": torch.zeros(64, 512)}
    dcp.load(state, storage_reader=hf.reader(proxied), planner=ShardPlanner({"w": (128, 0)}))
    assert_same(state["w"], whole[128:192], "w")
    # All requests after those for the index and the header, which is with the first 128 KiB.
    assert sum(exchange.sent for exchange in proxy.requests("Get Blob")[before:]) < 64 * 512 * 4 + 128 * 1024 + 2048
    columns = {"w": torch.zeros(512, 10, dtype=torch.float64)}
    dcp.load(columns, storage_reader=hf.reader(proxied), planner=ShardPlanner({"w": (0, 100)}))
    assert_same(columns["w"], whole[:, 100:110].double(), "w")


def test_a_wrong_shape_and_a_missing_key_are_errors(url: str):
    hf.put(url, "model.safetensors", save({"w": torch.arange(4.0)}))
    with pytest.raises(CheckpointException, match="ize mismatch"):
        dcp.load({"w": torch.zeros(5)}, storage_reader=hf.reader(url))
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load({"v": torch.zeros(4)}, storage_reader=hf.reader(url))


def test_says_what_is_there_instead_of_a_model(url: str, container: str):
    error = failure(url)
    assert isinstance(error, CheckpointNotFoundError) and "no blobs" in str(error)
    hf.put(url, "config.json", b"{}")
    assert "None of the blobs" in str(failure(url))
    hf.put(url, f"model-{'0123456789abcdef'}-00001-of-00002.safetensors", save({"w": torch.arange(2.0)}))
    error = failure(url)
    assert isinstance(error, CheckpointNotFoundError) and "did not finish" in str(error)
    assert isinstance(failure(f"{container}missing/model"), ContainerNotFoundError)


def head(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "does not begin"),
        (b"\x10\0\0", "does not begin"),
        (b"PK\x03\x04" + b"\xff" * 100, "does not begin"),
        (struct.pack("<Q", 1000) + b"{}", "does not begin"),
        (struct.pack("<Q", 1) + b"{}", "not JSON"),
        (head([]), "not a JSON object"),
        (head(b"[" * 100_000), "not JSON"),
        (head({"w": 5}), "no dtype"),
        (head({"w": {**ENTRY, "shape": [-2]}}), "not numbers"),
        (head({"w": {**ENTRY, "shape": [1 << 63]}}), "not numbers"),
        (head({"w": {**ENTRY, "shape": [1.5]}}), "not numbers"),
        (head({"w": {**ENTRY, "data_offsets": [0, 12]}}, b"x" * 12), "needs 8 bytes"),
        (head({"w": ENTRY}, b"x" * 7), "needs 8 bytes"),
        (head({"w": ENTRY, "__metadata__": {"DCP_SHARDING_INFO": "[]"}}, b"x" * 8), "DCP_SHARDING_INFO"),
    ],
)
def test_a_damaged_header_is_an_error_that_says_so(url: str, data: bytes, reason: str):
    hf.put(url, "model.safetensors", data)
    error = failure(url)
    assert isinstance(error, CorruptCheckpointError) and reason in str(error), error


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F7", "shape": [2]},
        {"dtype": "F6_E2M3", "shape": [4]},
        {"dtype": "F4", "shape": [6, 1]},  # two numbers of two rows in a byte, which torch's packed dtype has not
        {"dtype": "F4", "shape": []},
    ],
)
def test_a_dtype_that_torch_does_not_have_is_an_error_only_if_it_is_asked_for(url: str, entry: dict[str, Any]):
    odd = {**entry, "data_offsets": [12, 15]}
    files = {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "odd": odd}
    hf.put(url, "model.safetensors", head(files, struct.pack("<3f", 1, 2, 3) + b"xyz"))
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=hf.reader(url))
    assert state["w"].tolist() == [1, 2, 3]
    error = failure(url, {"w": torch.zeros(3), "odd": torch.zeros(entry["shape"])})
    assert isinstance(error, UnsupportedCheckpointError)
    assert f"'odd' of {url} has the dtype '{entry['dtype']}'" in str(error)


def test_packed_numbers_of_four_bits_are_read_as_safetensors_reads_them(url: str, tmp_path: Path):
    packed = torch.arange(24, dtype=torch.uint8).reshape(4, 6).view(torch.float4_e2m1fn_x2)
    hf.put(url, "model.safetensors", save({"w": packed, "b": torch.ones(3)}))
    state = {"w": torch.zeros_like(packed.view(torch.uint8)).view(torch.float4_e2m1fn_x2), "b": torch.zeros(3)}
    dcp.load(state, storage_reader=hf.reader(url))
    assert torch.equal(state["w"].view(torch.uint8), packed.view(torch.uint8)) and state["b"].tolist() == [1, 1, 1]
    entry = hf.reader(url).read_metadata().state_dict_metadata["w"]
    assert (entry.size, entry.properties.dtype) == (torch.Size([4, 6]), torch.float4_e2m1fn_x2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "c:\\x.safetensors", "x.bin", "\n.safetensors"]
)
def test_an_index_names_files_beside_it_only(url: str, name: str):
    hf.put(url, hf.INDEX, json.dumps({"weight_map": {"w": name}}).encode())
    assert isinstance(failure(url), UnsafeMetadataError)


@pytest.mark.parametrize("index", [b"", b"{}", b'{"weight_map": []}', b'{"weight_map": {"w": 5}}', b"\xff"])
def test_a_damaged_index_is_an_error(url: str, index: bytes):
    hf.put(url, hf.INDEX, index)
    assert isinstance(failure(url), CorruptCheckpointError)


def test_what_an_index_promises_and_a_file_lacks_is_an_error(url: str):
    hf.put(url, hf.INDEX, json.dumps({"weight_map": {"w": "a.safetensors"}}).encode())
    error = failure(url)
    assert isinstance(error, CorruptCheckpointError) and "missing" in str(error)
    hf.put(url, "a.safetensors", save({"v": torch.zeros(2)}))
    error = failure(url)
    assert isinstance(error, CorruptCheckpointError) and "does not" in str(error)


def test_damage_in_storage_is_found(url: str):
    state = {"w": torch.arange(1000.0)}
    dcp.save(state, storage_writer=hf.writer(url))
    [name] = [name for name in hf.files(url) if name != hf.INDEX]
    data = bytearray(hf.get(url, name))
    data[-100] ^= 1
    hf.put(url, name, bytes(data))
    error = failure(url, {"w": torch.zeros(1000)})
    assert isinstance(error, CorruptCheckpointError) and "CRC64" in str(error)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_model_that_is_replaced_while_it_is_read_is_an_error(url: str, proxied: str, proxy: FaultProxy, nth: int):
    """Before the index is read, before the header, and before the data."""
    hf.save(url, 0)
    proxy.when("Get Blob", nth=nth).do(Call(lambda: hf.save(url, 1), at="request"))
    state = {name: torch.zeros_like(value) for name, value in hf.model().state_dict().items()}
    if nth == 1:
        hf.load(proxied, 1)
        return
    assert isinstance(failure(proxied, state), CheckpointReplacedError)


def test_a_foreign_file_that_is_replaced_while_it_is_read_is_an_error(url: str, proxied: str, proxy: FaultProxy):
    """It keeps its name, and the header that was read is the old one."""
    hf.put(url, "model.safetensors", save({"w": torch.arange(100.0)}))
    new = save({"w": torch.arange(100.0) + 1})
    proxy.when("Get Blob", nth=2).do(Call(lambda: hf.put(url, "model.safetensors", new), at="request"))
    assert isinstance(failure(proxied, {"w": torch.zeros(100)}), CheckpointReplacedError)


def test_large_headers_are_read_whole(url: str):
    state = {f"layer.{number:06d}.{'x' * 50}": torch.full((2,), float(number)) for number in range(2000)}
    hf.put(url, "model.safetensors", save(state))
    hf.assert_loads(url, state)
