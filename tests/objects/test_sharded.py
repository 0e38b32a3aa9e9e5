"""Sharded saves and loads of packed objects: which rank writes and reads what, and what a killed rank leaves."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from azure_torch_ckpt import AccessDeniedError, AzureBlobReader, AzureBlobWriter
from azure_torch_ckpt.dcp import AzureSavePlanner
from azure_torch_ckpt.dcp.plan_columns import LocalItems
from azure_torch_ckpt.objects import load_object
from azure_torch_ckpt.objects.sharded import DTensorEntry, load_sharded, save_sharded
from azure_torch_ckpt.objects.states import States, gathered
from tests.lightning.strategy_jobs import cloned
from tests.support import jobs
from tests.support.containers import KEY, data_blobs, live_blobs, paths_below, store_of
from tests.support.deep_equality import assert_alike
from tests.support.faults import Exchange, Kill
from tests.support.jobs import Job
from tests.support.proxy import FaultProxy
from tests.support.ranks import Ranks

CPU = torch.device("cpu")


# ---- Shares --------------------------------------------------------------------------------------------------------


def plan(**sizes: int) -> SavePlan:
    """Of plain tensors with so many bytes."""
    tensors = {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
    return create_default_local_save_plan(tensors, is_coordinator=True)


def shares(*told: tuple[SavePlan, list[int | None]]) -> list[set[str]]:
    """What each rank is left with of its plan, when it tells these checksums of its items."""
    planner = AzureSavePlanner(flatten_state_dict=False)
    plans = [SavePlan(LocalItems(plan.items, checksums)) for plan, checksums in told]
    return [{item.index.fqn for item in shared.items} for shared in planner.create_global_plan(plans)[0]]


def names_by_rank(*plans: SavePlan, checksums: dict[int, dict[str, int]] | None = None) -> list[set[str]]:
    """`shares` with checksums that are equal on all ranks, but for those that are given of a rank."""
    of_rank = [(checksums or {}).get(rank, {}) for rank in range(len(plans))]
    told: list[list[int | None]] = [
        [known.get(item.index.fqn, 7) for item in plan.items] for plan, known in zip(plans, of_rank, strict=True)
    ]
    return shares(*zip(plans, told, strict=True))


def test_the_largest_go_first_each_to_the_rank_with_least() -> None:
    plans = [plan(a=1, b=5, c=4, d=3, e=3, f=2)] * 3
    assert names_by_rank(*plans) == [{"b", "a"}, {"c", "f"}, {"d", "e"}]
    assert names_by_rank(*plans) == names_by_rank(*plans)


def test_what_rank_0_alone_has_counts_before_anything_is_shared() -> None:
    assert names_by_rank(plan(skeleton=4, a=3, b=1), plan(a=3, b=1)) == [{"skeleton"}, {"a", "b"}]


def test_rank_0_keeps_what_differs_in_its_bytes_or_its_shape() -> None:
    plans = [plan(buffer=8, a=3, b=4), plan(buffer=8, a=3, b=5, strange=2)]
    assert names_by_rank(*plans, checksums={1: {"buffer": 8}}) == [{"buffer", "b"}, {"a"}]


def test_of_three_ranks_two_may_agree() -> None:
    plans = [plan(a=4, b=3)] * 3
    assert names_by_rank(*plans, checksums={1: {"a": 8, "b": 8}}) == [{"a"}, set(), {"b"}]


def test_a_rank_that_offers_nothing_gets_nothing() -> None:
    assert names_by_rank(plan(a=3), plan()) == [{"a"}, set()]
    assert names_by_rank(plan(), plan()) == [set(), set()]
    assert shares((plan(a=3), [None]), (plan(a=3), [None])) == [{"a"}, set()]


# ---- On real ranks -------------------------------------------------------------------------------------------------


def layers(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)), nn.BatchNorm1d(width))
    return net, torch.optim.Adam(net.parameters())


def trained(width: int) -> dict[str, Any]:
    net, optimizer = layers(width)
    net(torch.ones(2, width)).sum().backward()
    optimizer.step()
    norm = net.get_submodule("4")
    assert isinstance(norm.running_mean, torch.Tensor)
    norm.running_mean.fill_(dist.get_rank() if dist.is_initialized() else 0.0)
    return {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()], "rank": (1, None)}


def save_trained(url: str, width: int) -> None:
    save_sharded(trained(width), AzureBlobWriter(url, credential=KEY))


def load_trained(url: str, width: int) -> None:
    wanted = trained(width)
    wanted["state_dict"]["4.running_mean"].fill_(0.0)
    loaded = load_sharded(AzureBlobReader(url, credential=KEY), CPU, weights_only=False)
    assert_alike(loaded, wanted)


def test_ranks_write_equal_shares_and_read_large_tensors_once(
    ranks: Ranks, proxy: FaultProxy, proxied_container: str
) -> None:
    url, width = f"{proxied_container}/run", 600
    ranks(2).run(save_trained, url, width)
    store = store_of(url)
    sizes = sorted(store.stat(path).size for path in paths_below(url, ".distcp"))
    whole = sum(sizes)
    assert len(sizes) == 2
    assert whole > 4 * 3 * width * width * 4
    assert sizes[1] < 0.51 * whole
    before = len(proxy.log)
    ranks(2).run(load_trained, url, width)
    read = sum(seen.sent for seen in proxy.log[before:] if seen.kind == "Get Blob")
    assert whole < read < 1.2 * whole
    wanted = trained(width)
    assert_alike(load_object(AzureBlobReader(url, credential=KEY), weights_only=False), wanted)


def refused_on_rank_1(url: str, width: int) -> tuple[str, str]:
    value = trained(width)
    credential = base64.b64encode(bytes(64)).decode() if dist.get_rank() == 1 else KEY
    errors = []
    for attempt in (
        lambda: save_sharded(value, AzureBlobWriter(url, credential=credential)),
        lambda: load_sharded(AzureBlobReader(url.replace("new", "old"), credential=credential), CPU),
    ):
        with pytest.raises(AccessDeniedError) as caught:
            attempt()
        errors.append(str(caught.value))
    return errors[0], errors[1]


def test_one_rank_without_access_is_the_same_error_on_all(ranks: Ranks, container: str) -> None:
    ranks(2).run(save_trained, f"{container}/old", 8)
    first, second = ranks(2).run(refused_on_rank_1, f"{container}/new", 8)
    assert first == second
    assert not live_blobs(f"{container}/new")


def save_version(url: str, version: int) -> None:
    save_sharded(versioned(version), AzureBlobWriter(url, credential=KEY))


def versioned(version: int) -> dict[str, Any]:
    tensors = [torch.full((50, 40), float(version + number)) for number in range(4)]
    return {"state_dict": dict(enumerate(tensors)), "version": version}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_between_the_data_and_the_metadata_leaves_the_old_checkpoint(
    proxy: FaultProxy, container: str, proxied_container: str, rank: int
) -> None:
    url = f"{container}/last.ckpt"
    ends = jobs.run(save_version, (url, 1), (url, 1))
    assert [end.exitcode for end in ends] == [0, 0]
    assert len(live_blobs(url)) == 3
    through = f"{proxied_container}/last.ckpt"
    with Job(save_version, [(through, 2), (through, 2)]) as job:

        def commits(seen: Exchange) -> bool:
            """Of the metadata, which rank 0 writes; or of rank 1's data."""
            name = PurePosixPath(seen.path).name
            return seen.method == "PUT" and (name == ".metadata" if rank == 0 else name.startswith("__1_"))

        last = Kill(job.pid(rank), at="request" if rank == 0 else "answer")
        proxy.when(commits).do(last)
        job.go()
        assert job.end(rank).exitcode == -signal.SIGKILL
        assert job.end(1 - rank).exitcode != 0
    assert_alike(load_object(AzureBlobReader(url, credential=KEY)), versioned(1))
    ends = jobs.run(save_version, (url, 3), (url, 3))
    assert [end.exitcode for end in ends] == [0, 0]
    assert_alike(load_object(AzureBlobReader(url, credential=KEY)), versioned(3))


# ---- What differs between ranks ------------------------------------------------------------------------------------


def of_rank(rank: int) -> dict[str, Any]:
    """What 3 ranks hold: large and small, contiguous and not; what is equal, and what differs in a single bit."""
    large = torch.arange(150_000.0)
    touched = large.clone()
    touched[-1] += rank
    return {
        "equal": large,
        "turned": torch.arange(120_000.0).reshape(300, 400).t(),
        "turned and touched": touched[:120_000].reshape(300, 400).t() + rank,
        "touched": touched,
        "sign of zero": torch.tensor([0.0, -0.0 if rank == 1 else 0.0]),
        "not a number": torch.tensor([float("nan")]),
        "other dtype": torch.zeros(6, dtype=torch.int32 if rank else torch.float32),
        "other shape": torch.zeros(6).reshape((2, 3) if rank else (3, 2)),
        "other view": large[rank : rank + 100],
        "mine": {rank: torch.full((5,), float(rank))},
        "rank": rank,
    }


def save_of_rank(url: str) -> None:
    save_sharded(of_rank(dist.get_rank()), AzureBlobWriter(url, credential=KEY))


def test_every_bit_that_differs_is_rank_0s(ranks: Ranks, container: str) -> None:
    url = f"{container}/differing"
    ranks(3).run(save_of_rank, url)
    assert_alike(load_object(AzureBlobReader(url, credential=KEY), weights_only=False), of_rank(0))
    assert len(data_blobs(url)) == 3


def replicas(url: str, shared: bool) -> None:
    """Two replicas of a tensor of two shards; they are equal, or a rank has changed its own."""
    mesh = init_device_mesh("cpu", (2, 2))
    rank = dist.get_rank()
    local = torch.full((3, 4), float(rank % 2 if shared else rank))
    tensor = DTensor.from_local(local, mesh, (Replicate(), Shard(0)), run_check=False)
    save_sharded({"w": tensor}, AzureBlobWriter(url, credential=KEY))


def test_of_replicas_that_differ_the_first_is_saved_whole(ranks: Ranks, container: str) -> None:
    wanted = torch.tensor([0.0] * 3 + [1.0] * 3)[:, None].expand(6, 4)
    for shared in (True, False):
        url = f"{container}/replicas-{shared}"
        ranks(4).run(replicas, url, shared)
        assert torch.equal(load_object(AzureBlobReader(url, credential=KEY))["w"], wanted)


# ---- Two dimensions ------------------------------------------------------------------------------------------------


def two_dimensional(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """On 4 ranks: both layers in tensor parallel over 2 of them, that sharded over the others; a norm by FSDP alone."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6), nn.LayerNorm(6))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def save_two_dimensional(url: str) -> Any:
    net, optimizer = two_dimensional(1)
    net(torch.arange(12.0).reshape(2, 6)).square().sum().backward()
    optimizer.step()
    states = States()
    value = {"net": states.of_module(net), "optimizer": states.of_optimizer(net, optimizer)}
    save_sharded(value, AzureBlobWriter(url, credential=KEY))
    return cloned(gathered(value, True))


def load_two_dimensional(url: str, full: bool) -> Any:
    """Load shards; or, without entries for DTensors, full tensors of which each rank cuts out its shards."""
    net, optimizer = two_dimensional(2)
    states = States()

    def dtensors(value: dict[str, Any]) -> Iterator[DTensorEntry]:
        if not full:
            yield from states.module_dtensors(value["net"], net)
            yield from states.optimizer_dtensors(value["optimizer"], net, optimizer)

    value = load_sharded(AzureBlobReader(url, credential=KEY), CPU, dtensors)
    placements = {} if full else {name: tensor.placements for name, tensor in net.state_dict().items()}
    loaded = {name: tensor.placements for name, tensor in value["net"].items() if isinstance(tensor, DTensor)}
    assert loaded == placements
    assert isinstance(value["optimizer"]["state"][0]["exp_avg"], DTensor) != full
    states.load_module(net, value["net"], strict=True)
    states.load_optimizer(net, optimizer, value["optimizer"])
    value = {"net": states.of_module(net), "optimizer": states.of_optimizer(net, optimizer)}
    return cloned(gathered(value, True))


def test_fsdp_within_tensor_parallelism_is_stored_as_in_one_process(ranks: Ranks, container: str) -> None:
    url = f"{container}/two"
    saved, *_ = ranks(4).run(save_two_dimensional, url)
    for full in (False, True):
        for loaded in ranks(4).run(load_two_dimensional, url, full):
            assert_alike(loaded, saved)
    assert_alike(cloned(load_object(AzureBlobReader(url, credential=KEY))), saved)


# ---- Odd contents --------------------------------------------------------------------------------------------------


def odd() -> dict[Any, Any]:
    """Views of one storage, one of them of all; an empty tensor; what is sparse; the same tensor twice."""
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "whole": base,
        "row": base[1],
        "again": base,
        "turned": base.t(),
        "repeated": torch.ones(1, 3).expand(5, 3),
        "empty": torch.empty(0, 3),
        "sparse": torch.eye(3).to_sparse(),
        3: [(), {}, None, {"set"}],
    }


def save_odd(url: str) -> None:
    save_sharded(odd(), AzureBlobWriter(url, credential=KEY))


def load_odd(url: str) -> None:
    assert_alike(load_sharded(AzureBlobReader(url, credential=KEY), CPU, weights_only=False), odd())


def test_whatever_the_codec_knows_comes_back_on_every_rank(ranks: Ranks, container: str) -> None:
    url = f"{container}/odd"
    ranks(2).run(save_odd, url)
    ranks(2).run(load_odd, url)
    assert_alike(load_object(AzureBlobReader(url, credential=KEY), weights_only=False), odd())


def save_nothing(url: str) -> None:
    save_sharded({}, AzureBlobWriter(url, credential=KEY))


def test_an_empty_object_is_saved_and_loaded(ranks: Ranks, container: str) -> None:
    ranks(2).run(save_nothing, f"{container}/empty")
    assert load_object(AzureBlobReader(f"{container}/empty", credential=KEY)) == {}
