"""The layout of a model: which shards are joined and how, and which plans are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from azure_torch_ckpt import BlobLocation, CheckpointError, IncompleteSaveError, TransferOptions
from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.blob_info import BlobSettings
from azure_torch_ckpt.blobs.block_writer import BlockWriter
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.huggingface.joining import join, joined_block_size
from tests.dcp.memory_growth import child_result
from tests.huggingface import joining_child
from tests.huggingface import small_llama as hf
from tests.huggingface.plans import columns, laid_out, plan
from tests.huggingface.test_writer import assert_pretrained
from tests.support.faults import Answer
from tests.support.proxy import FaultProxy
from tests.support.sharded import assert_same

if TYPE_CHECKING:
    from tests.support.ranks import RankGroup

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def test_short_runs_are_joined_and_long_ones_are_not() -> None:
    assert laid_out(columns(of=100, rows=1, ranks=3)).joined == []  # one row
    assert laid_out(columns(of=100, rows=50, ranks=1)).joined == []
    assert laid_out(columns(of=1 << 20, rows=2, ranks=2)).joined == []  # runs of 2 MiB
    [joined] = laid_out(columns(of=100, rows=50, ranks=3)).joined
    assert joined.length == 100 * 50 * 4 and [chunk.length for chunk in joined.chunks] == [6_600, 6_600, 6_800]
    # Not so many runs that the blob would have too many blocks.
    assert len(laid_out(columns(of=1 << 20, rows=12_000, ranks=4), joined_block_size=8 << 20).joined) == 1


def test_many_shards_are_checked_quickly_and_not_twice() -> None:
    plans = columns(of=4_096, rows=8, ranks=2_048)
    assert len(laid_out(plans).joined[0].chunks) == 2_048
    with pytest.raises(CheckpointError, match="the same elements of 'w'"):
        laid_out([*plans, plans[7]])


@pytest.mark.parametrize(
    ("plans", "reason"),
    [
        ([((0, 4), 8)], "16 of the 32 bytes of 'w'"),
        ([((0, 4), 8), ((5, 8), 8)], "28 of the 32 bytes of 'w'"),
        ([((0, 4), 8), ((3, 8), 8)], "Ranks 0 and 1 save the same elements of 'w'"),
        ([((0, 4), 8), ((4, 9), 8)], "Rank 1 saves"),
        ([((0, 4), 8), ((4, 9), 9)], "on rank 1"),
    ],
)
def test_a_tensor_that_the_ranks_do_not_save_whole_is_refused(plans: list[tuple[tuple[int, int], int]], reason: str):
    """torch's own planner would notice; others need not."""
    with pytest.raises(CheckpointError, match=reason):
        laid_out([plan([cut], [of]) for cut, of in plans])


def test_no_file_gets_more_blocks_than_a_blob_may_have():
    mib = 1 << 20
    plans = [plan([(0, 30_000 * mib)], [30_000 * mib], name) for name in ("a", "b")]  # of four bytes each
    assert len(laid_out(plans, block_size=8 * mib).files) == 1
    assert len(laid_out(plans, block_size=4 * mib).files) == 2
    with pytest.raises(CheckpointError, match="'a' would consist of"):
        laid_out(plans, block_size=2 * mib)
    with pytest.raises(CheckpointError, match="file 1 of fqn_to_index_mapping"):
        laid_out(plans, block_size=4 * mib, mapping={"a": 1, "b": 1})


def assert_only_the_model_is_there(url: str) -> None:
    assert sorted({*json.loads(hf.get(url, hf.INDEX))["weight_map"].values(), hf.INDEX}) == sorted(hf.files(url))


def test_columns_of_two_ranks_are_a_model_for_transformers(
    url: str, tmp_path: Path, ranks: Callable[[int], RankGroup]
) -> None:
    ranks(2).run(hf.save_columns, url)
    assert_only_the_model_is_there(url)
    assert_pretrained(url, tmp_path / "model")
    ranks(2).run(hf.load_columns, url)  # by columns, and compared with their checksums where they are whole
    hf.load(url)
    ranks(2).run(hf.save_sharded, url, 1)  # by rows, over that one
    hf.load(url, 1)
    assert_only_the_model_is_there(url)


def test_odd_tensors_sharded_by_columns_are_right(url: str, tmp_path: Path, ranks: Callable[[int], RankGroup]) -> None:
    """Columns that two ranks cannot share evenly, of every width of dtype, and no rows at all."""
    ranks(2).run(hf.save_odd, url, 1)
    assert_only_the_model_is_there(url)
    [name] = [name for name in hf.files(url) if name != hf.INDEX]
    (tmp_path / name).write_bytes(hf.get(url, name))
    wanted = hf.odd()
    found = load_file(tmp_path / name)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert_same(value, wanted[key], key)
    hf.load_alone(url)


def test_long_runs_are_staged_where_they_belong(
    url: str, proxied: str, proxy: FaultProxy, ranks: Callable[[int], RankGroup]
) -> None:
    """Experts that are sharded in their second dimension: nothing is stored twice."""
    ranks(2).run(hf.save_experts, proxied)
    wanted = hf.experts()
    sent = sum(exchange.body_length for exchange in proxy.requests("Put Block"))
    assert sent < sum(value.nbytes for value in wanted.values()) + 1_000
    hf.assert_loads(url, wanted)
    assert json.loads(hf.get(url, hf.INDEX))["metadata"]["azure_torch_ckpt"]["crc64"].keys() == wanted.keys()


# What goes wrong


@pytest.mark.parametrize(("kind", "nth"), [("Put Block", 3), ("Put Block List", 2), ("Get Blob", 2)])
def test_a_save_whose_joining_fails_is_invisible(
    url: str, proxied: str, proxy: FaultProxy, ranks: Callable[[int], RankGroup], kind: Any, nth: int
) -> None:
    hf.save(url, 0)
    before = hf.files(url)
    proxy.when(kind, nth=nth, times=None).do(Answer(403, "AuthorizationFailure"))
    for errors in ranks(2).run(hf.failures_of_columns, url, proxied):
        assert len(errors) == 1 and "AccessDeniedError" in errors[0]
    hf.load(url, 0)
    assert set(before) <= set(hf.files(url))
    assert not [name for name in set(hf.files(url)) - set(before) if name.endswith(".safetensors")]


@pytest.mark.parametrize("window", [1 << 20, 16 << 20])
def test_a_grid_is_joined_in_windows_of_any_size(container: str, window: int) -> None:
    """As FSDP over tensor parallelism lays a matrix out, uneven in both dimensions."""
    of = [301, 1_003]
    grid = [plan([rows, cut], of) for rows in ((0, 151), (151, 301)) for cut in ((0, 502), (502, 1_003))]
    location = BlobLocation.parse(f"{container}/m")
    store = BlobStore(location, Access(hf.KEY, options=TransferOptions(memory_budget=window)))
    [tensor] = laid_out(grid).joined
    whole = torch.arange(of[0] * of[1], dtype=torch.float32).reshape(of)
    sums = {}
    for chunk in tensor.chunks:
        part = whole
        for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(dim, start, size)
        data = part.contiguous().numpy().tobytes()
        store.put(location.join(chunk.file).path, data)
        sums[chunk.file, chunk.offset] = crc64(data)
    moved: list[int] = []
    joined = join(store, location, [tensor], sums, "0" * 16, 100_000, moved.append)
    path = location.join(tensor.file).path
    blocks = sorted(joined.blocks, key=lambda block: block.offset)
    store.commit_blocks(path, [block.id for block in blocks])
    assert store.read(path, limit=1 << 30)[0] == whole.numpy().tobytes()
    assert sum(moved) == whole.nbytes and max(block.length for block in blocks) <= 100_000


def test_columns_of_320_mib_are_joined_with_a_budget_of_32(container: str) -> None:
    mib = 1 << 20
    location = BlobLocation.parse(f"{container}/m")
    store = BlobStore(location, Access(hf.KEY))
    rows = 320 * mib // (joining_child.COLUMNS * 4)
    for name, length in laid_out(columns(of=joining_child.COLUMNS, rows=rows, ranks=2)).shards.items():
        writer = BlockWriter(store, location.join(name).path, BlobSettings())
        for _ in range(0, length, 8 * mib):
            writer.write(memoryview(bytes(8 * mib)))
        writer.commit()
    grown, staged = child_result("tests.huggingface.joining_child", location, hf.KEY, 32 * mib, rows)
    assert staged == 320 * mib
    assert grown < (32 + 16) * mib  # threads' stacks, and what torch keeps


def test_shards_that_were_damaged_meanwhile_are_noticed(container: str) -> None:
    """Between the ranks' writing and the joining."""
    location = BlobLocation.parse(f"{container}/m")
    store = BlobStore(location, Access(hf.KEY))
    plan = laid_out(columns(of=100, rows=50, ranks=2))
    for name, length in plan.shards.items():
        store.put(location.join(name).path, bytes(length))
    sums = {(chunk.file, chunk.offset): 12345 for chunk in plan.joined[0].chunks}
    with pytest.raises(IncompleteSaveError, match="cannot be joined, so nothing was committed"):
        join(store, location, plan.joined, sums, "0" * 16, 1 << 20, lambda _: None)
    with pytest.raises(IncompleteSaveError, match="cannot be joined"):
        join(store, location.join("elsewhere"), plan.joined, sums, "0" * 16, 1 << 20, lambda _: None)


def test_the_blocks_of_what_is_joined_take_a_quarter_of_the_memory() -> None:
    options = TransferOptions(memory_budget=512 << 20)
    assert joined_block_size(options, 1 << 34) * (options.concurrency + 4) <= options.memory_budget // 4
