"""Saves with ``use_collectives=False``: loaded on any number of ranks, and told from those that are not complete."""

from __future__ import annotations

import datetime
import os
import pickle
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor, Replicate, Shard

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    BlobLocation,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    remove_checkpoint,
)
from azure_torch_ckpt.catalog import consolidate, copy, inspect, latest, list_checkpoints, prune, verify
from azure_torch_ckpt.dcp import writer as dcp_writer
from azure_torch_ckpt.dcp.save_group import SaveGroup
from tests.support import sharded
from tests.support.containers import KEY, blob_names, container_sas, data_blobs, paths_below, store_of, upload
from tests.support.mixed_checkpoint import save_without_collectives
from tests.support.proxy import FaultProxy
from tests.support.ranks import RankError, Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def is_complete(url: str) -> bool:
    [entry] = list_checkpoints(url, credential=KEY)
    return entry.complete


def told(url: str, **load: Any) -> str:
    """What a load of all rows on this rank is told; it must fail, and change nothing."""
    target = sharded.empty(sharded.plain() if load else sharded.rows())
    errors = sharded.failures(lambda: dcp.load(target, storage_reader=sharded.reader(url), **load))
    assert all(isinstance(error, CheckpointNotFoundError) for error in errors.values())
    locals_ = [value.to_local() if isinstance(value, DTensor) else value for value in target.values()]
    assert not any(value.any() for value in locals_ if value is not None)
    return str(errors[max(errors)])


# ---- Other ranks, another sharding ---------------------------------------------------------------------------------


def state(version: int, kind: int) -> dict[str, Any]:
    """Shards, what is replicated in two ways, what only one rank has, and what differs from rank to rank."""
    over, rank = sharded.mesh(dist.get_world_size()), dist.get_rank()
    full = sharded.expected("even", version)
    return {
        "shards": sharded.laid_out(full, over, (Shard(kind),)),
        "replicated": sharded.laid_out(full, over, (Replicate(),)),
        "plain": full.clone(),
        "object": {"version": version},
        "own": {"object": f"rank {rank}", "tensor": torch.full((rank + 1,), float(rank))},
        f"only on {rank}": {"tensor": torch.full((3,), float(rank)), "object": rank},
    }


def save_state(url: str, version: int) -> None:
    dcp.save(state(version, 0), storage_writer=sharded.writer(url), use_collectives=False)


def load_state(url: str, version: int, kind: int, saved_on: int) -> None:
    rank = dist.get_rank()
    source = rank if rank < saved_on else 0  # whose values of its own this rank gets
    wanted = state(version, kind)
    target = sharded.empty({key: wanted[key] for key in ("shards", "replicated", "plain")})
    target |= {"object": {"version": None}, "own": {"object": None, "tensor": torch.zeros(source + 1)}}
    for other in range(saved_on):
        target[f"only on {other}"] = {"tensor": torch.zeros(3), "object": None}
    dcp.load(target, storage_reader=sharded.reader(url))
    for key in ("shards", "replicated", "plain"):
        sharded.assert_same(target[key], sharded.expected("even", version), key)
    assert target["object"] == {"version": version}
    assert target["own"]["object"] == f"rank {source}"
    assert target["own"]["tensor"].tolist() == [source] * (source + 1)
    for other in range(saved_on):
        assert target[f"only on {other}"]["object"] == other
        assert target[f"only on {other}"]["tensor"].tolist() == [other] * 3


@pytest.mark.parametrize(
    ("saved_on", "loaded_on", "kind"), [(2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 4, 0), (3, 2, 1), (3, 3, 1)]
)
def test_resharded(ranks: Ranks, container: str, saved_on: int, loaded_on: int, kind: int) -> None:
    url = f"{container}/run"
    for version in (1, 2):
        ranks(saved_on).run(save_state, url, version)
        assert len(blob_names(url)) == 2 * saved_on
        assert is_complete(url)
        ranks(loaded_on).run(load_state, url, version, kind, saved_on)


def save_with_an_index(url: str, version: int) -> None:
    with mock.patch.object(dcp_writer, "_INDEX_FROM", 1):
        save_state(url, version)


@pytest.mark.parametrize(("saved_on", "loaded_on", "kind"), [(2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 3, 1)])
def test_resharded_from_metadata_with_an_index(
    ranks: Ranks, container: str, saved_on: int, loaded_on: int, kind: int
) -> None:
    url = f"{container}/run"
    ranks(saved_on).run(save_with_an_index, url, 3)
    ranks(loaded_on).run(load_state, url, 3, kind, saved_on)


def mixed(value: float) -> dict[str, Any]:
    """A tensor that is whole on rank 0 and, on rank 1, a shard; and what only rank 0 has."""
    full = torch.arange(12.0).reshape(6, 2) + value
    if dist.get_rank() == 0:
        return {"x": full, "z": torch.full((2,), value)}
    local = full[3:].clone()
    shard = DTensor.from_local(
        local, sharded.mesh(2), (Shard(0),), run_check=False, shape=full.shape, stride=full.stride()
    )
    return {"x": shard}


def save_mixed(url: str) -> None:
    dcp.save(mixed(5.0), storage_writer=sharded.writer(url), use_collectives=False)


def load_mixed(url: str) -> None:
    target = {**mixed(0.0), "z": torch.zeros(2)}
    dcp.load(target, storage_reader=sharded.reader(url))
    assert target["z"].tolist() == [5.0, 5.0]
    got, wanted = (one.to_local() if isinstance(one, DTensor) else one for one in (target["x"], mixed(5.0)["x"]))
    assert torch.equal(got, wanted)


def test_a_key_of_another_rank_changes_the_chunks_of_others(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_mixed, url)
    ranks(2).run(load_mixed, url)


def save_rows(url: str, version: int) -> None:
    dcp.save(sharded.rows(version), storage_writer=sharded.writer(url), use_collectives=False)


def load_rows(url: str, version: int) -> None:
    sharded.assert_version(url, version)


def test_in_one_process(ranks: Ranks, container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    ranks(3).run(save_rows, url, 4)
    sharded.assert_version(url, 4, sharded.plain)
    sharded.assert_version(url, 4, sharded.plain, no_dist=True)
    everything = dcp.state_dict_loader._load_state_dict_from_keys(storage_reader=sharded.reader(url))
    assert {name for name, value in everything.items() if isinstance(value, torch.Tensor)} == set(sharded.GLOBAL)
    for name in sharded.GLOBAL:
        sharded.assert_same(everything[name], sharded.expected(name, 4), name)
    assert verify(url, credential=KEY).ok
    consolidate(url, tmp_path / "whole.pt", credential=KEY)
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name in sharded.GLOBAL:
        sharded.assert_same(whole[name], sharded.expected(name, 4), name)


def load_alone(url: str, version: int) -> None:
    sharded.assert_version(url, version, sharded.plain, no_dist=True)


def test_each_of_many_ranks_by_itself(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_rows, url, 5)
    for world_size in (2, 3):
        ranks(world_size).run(load_alone, url, 5)


def save_later(url: str) -> None:
    pending: Any = dcp.async_save(sharded.rows(6), storage_writer=sharded.writer(url), use_collectives=False)
    pending.result()


def test_async(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_later, url)
    ranks(3).run(load_rows, url, 6)


def test_the_same_ranks_read_their_own_metadata_only(
    ranks: Ranks, proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    ranks(3).run(save_rows, f"{container}/run", 7)
    ranks(3).run(load_rows, f"{proxied_container}/run", 7)
    requests = [(seen.kind, seen.path.rpartition("/")[2]) for seen in proxy.log]
    for rank in (0, 1, 2):
        assert requests.count(("Get Blob", f"__{rank}.metadata")) == 1
    # The others see that rank 0's is of the same save.
    assert len([name for kind, name in requests if name == "__0.metadata" and kind != "Get Blob"]) == 2
    assert len([kind for kind, _ in requests if kind == "List"]) == 3  # of the search for .metadata


# ---- What is not complete ------------------------------------------------------------------------------------------


class Dying(AzureBlobWriter):
    """On the last rank, dies once its data is there and before its metadata is. The others have committed theirs."""

    def finish(self, *args: Any, **kwargs: Any) -> None:
        is_last = dist.get_rank() == dist.get_world_size() - 1
        if not is_last:
            super().finish(*args, **kwargs)
        dist.barrier()
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(url: str, version: int) -> None:
    dcp.save(sharded.rows(version), storage_writer=Dying(url, credential=KEY), use_collectives=False)


def killed_save(ranks: Ranks, url: str, version: int, world_size: int) -> None:
    with pytest.raises(RankError, match="the process ended"):
        ranks(world_size).run(save_and_die, url, version)


def assert_not_complete(url: str, says: str) -> None:
    assert not is_complete(url)
    with pytest.raises(CheckpointNotFoundError, match="incomplete save"):
        latest(url, credential=KEY)
    for read in (verify, inspect):
        with pytest.raises(CheckpointNotFoundError, match=says):
            read(url, credential=KEY)
    with pytest.raises(CheckpointNotFoundError, match="incomplete save"):
        copy(url, f"{url}-copy", credential=KEY)
    assert says in told(url, no_dist=True)


def test_a_rank_that_was_killed_before_its_metadata(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    killed_save(ranks, url, 1, 2)
    assert {name for name in blob_names(url) if "/" not in name} == {"__0.metadata"}
    says = "2 ranks saved it with use_collectives=False, and __1.metadata is missing"
    assert_not_complete(url, says)
    report = prune(url, keep_last=1, grace=datetime.timedelta(0), dry_run=False, credential=KEY)
    assert [len(left.blobs) for left in report.remains] == [1] and len(report.kept) == 1
    assert len(data_blobs(url)) == 1  # that of the rank with metadata
    for world_size in (1, 2, 3):
        for said in ranks(world_size).run(told, url):
            assert says in said


def test_a_mixture_of_two_saves(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_rows, url, 1)
    killed_save(ranks, url, 2, 2)
    says = "__1.metadata and __0.metadata are of two different saves"
    assert_not_complete(url, says)
    for world_size in (1, 2, 3):
        for said in ranks(world_size).run(told, url):
            assert says in said
    ranks(2).run(save_rows, url, 3)
    assert is_complete(url)
    for world_size in (1, 2):
        ranks(world_size).run(load_rows, url, 3)
    # The data of the rank that was killed is a leftover.
    assert len(data_blobs(url)) == 3
    report = prune(url, grace=datetime.timedelta(0), dry_run=False, credential=KEY)
    assert [len(left.blobs) for left in report.remains] == [1]
    assert len(data_blobs(url)) == 2
    ranks(2).run(load_rows, url, 3)


def test_a_save_by_fewer_ranks_replaces_one_by_more(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(3).run(save_rows, url, 1)
    ranks(2).run(save_rows, url, 2)
    assert {name for name in blob_names(url) if "/" not in name} == {f"__{rank}.metadata" for rank in range(3)}
    assert is_complete(url)
    for world_size in (1, 2, 3):
        ranks(world_size).run(load_rows, url, 2)
    for other in (f"{container}/copy", f"{container}/again"):
        copy(url, other, credential=KEY)
        assert {name for name in blob_names(other) if "/" not in name} == {"__0.metadata", "__1.metadata"}
        sharded.assert_version(other, 2, sharded.plain)
    remove_checkpoint(url, credential=KEY)
    assert not blob_names(url)


class SavesMeanwhile(AzureBlobReader):
    """All ranks save again after rank 0 has read its metadata, and before rank 1 reads its own."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        first = dist.get_rank() == 0
        if kwargs.get("rank") is None:
            return super().read_metadata(*args, **kwargs)
        before = super().read_metadata(*args, **kwargs) if first else None
        save_rows(self.checkpoint_id, 2)
        return before or super().read_metadata(*args, **kwargs)


def load_what_is_replaced(url: str) -> None:
    target = sharded.empty(sharded.rows())
    errors = sharded.failures(lambda: dcp.load(target, storage_reader=SavesMeanwhile(url, credential=KEY)))
    assert [type(error) for error in errors.values()] == [CheckpointReplacedError]


def test_replaced_between_the_reads_of_two_ranks(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_rows, url, 1)
    ranks(2).run(load_what_is_replaced, url)
    ranks(2).run(load_rows, url, 2)


# ---- Part of the ranks ---------------------------------------------------------------------------------------------


def group_state(value: float) -> dict[str, Any]:
    rank = dist.get_rank()
    return {"same": torch.full((3,), value), "own": torch.full((rank + 1,), value + rank), "object": f"{value}"}


def save_on_a_group(url: str, members: list[int]) -> None:
    group = dist.new_group(members)
    if dist.get_rank() in members:
        dcp.save(group_state(5.0), storage_writer=sharded.writer(url), process_group=group, use_collectives=False)
        target = {**group_state(0.0), "object": None}
        dcp.load(target, storage_reader=sharded.reader(url), process_group=group)
        for key, value in group_state(5.0).items():
            assert torch.equal(target[key], value) if isinstance(value, torch.Tensor) else target[key] == value
        wanted = {"same": torch.zeros(3), "of no rank": torch.zeros(2)}
        reader = sharded.reader(url)
        errors = sharded.failures(lambda: dcp.load(wanted, storage_reader=reader, process_group=group))
        assert [type(error) for error in errors.values()] == [CheckpointNotFoundError] * 2
        assert all("process_group=" in str(error) for error in errors.values())
    dist.barrier()


@pytest.mark.parametrize("members", [[0, 1], [1, 2], [0, 2]])
def test_a_save_of_some_ranks_is_loaded_by_these_ranks_only(ranks: Ranks, container: str, members: list[int]) -> None:
    url = f"{container}/run"
    ranks(3).run(save_on_a_group, url, members)
    assert not is_complete(url)
    for read in (verify, inspect):
        with pytest.raises(CheckpointNotFoundError, match=r"process_group=.* only .* can load it"):
            read(url, credential=KEY)


# ---- Of earlier versions, and of torch's writer --------------------------------------------------------------------


def save_with_torch(folder: str) -> None:
    dcp.save(sharded.rows(2), storage_writer=dcp.FileSystemWriter(folder), use_collectives=False)


def test_of_torchs_writer(ranks: Ranks, container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    ranks(2).run(save_with_torch, os.fspath(tmp_path))
    upload(tmp_path, url)
    assert is_complete(url)
    for world_size in (1, 2, 3):
        ranks(world_size).run(load_rows, url, 2)
    sharded.assert_version(url, 2, sharded.plain)
    store_of(url).delete("run/__0.metadata")
    assert not is_complete(url)
    with pytest.raises(CheckpointNotFoundError):
        inspect(url, credential=KEY)


def test_of_earlier_versions(container: str) -> None:
    url = f"{container}/run"
    save_without_collectives(url, 0, 1, 2)
    target = {f"rank{rank}": torch.zeros(50, dtype=torch.int64) for rank in range(3)}
    dcp.load(target, storage_reader=sharded.reader(url))
    assert all(torch.equal(value, torch.arange(50)) for value in target.values())
    store_of(url).delete("run/__1.metadata")
    assert "the metadata of some of them is missing" in told(url, no_dist=True)
    with pytest.raises(CheckpointNotFoundError, match="the metadata of some of them is missing"):
        verify(url, credential=KEY)


def test_metadata_of_an_earlier_version_among_that_of_a_save(container: str) -> None:
    """One rank of an older save was replaced."""
    for replaced in (0, 1):
        url = f"{container}/run-{replaced}"
        save_without_collectives(url, 0, 1)
        save_without_collectives(url, replaced, group=SaveGroup("newer", 2))
        assert not is_complete(url)
        with pytest.raises(CheckpointNotFoundError, match=r"two different saves|some of them is missing"):
            inspect(url, credential=KEY)
        assert told(url, no_dist=True)


# ---- What says that metadata belongs together ----------------------------------------------------------------------


def test_a_copy_by_way_of_a_disk_says_so_again(container: str, tmp_path: Path) -> None:
    url = f"{container}/run"
    save_without_collectives(url, 0, 1, group=SaveGroup("first", 2))
    copy(url, tmp_path / "whole", credential=KEY)
    copy(tmp_path / "whole", f"{container}/back", credential=KEY)
    for path in paths_below(f"{container}/back", ".metadata"):
        assert store_of(url).stat(path).metadata == {"save_group": "first", "ranks": "2"}
    # A mixture on the disk, where only its content tells, gets to no container.
    (tmp_path / "whole" / "__1.metadata").unlink()
    for path in paths_below(url):
        store_of(url).delete(path)
    save_without_collectives(url, 0, 1, group=SaveGroup("second", 2))
    copy(url, tmp_path / "other", credential=KEY)
    (tmp_path / "other" / "__1.metadata").rename(tmp_path / "whole" / "__1.metadata")
    for name in (tmp_path / "other").rglob("*.distcp"):
        target = tmp_path / "whole" / name.relative_to(tmp_path / "other")
        target.parent.mkdir()
        name.rename(target)
    with pytest.raises(CheckpointNotFoundError, match="1 incomplete save"):
        copy(tmp_path / "whole", f"{container}/mixture", credential=KEY)
    # Where another tool copies it, the content tells the reader.
    upload(tmp_path / "whole", f"{container}/mixture")
    with pytest.raises(CheckpointNotFoundError, match="two different saves"):
        inspect(f"{container}/mixture", credential=KEY)


def test_blobs_without_marks_are_loaded_on_the_ranks_that_saved(ranks: Ranks, container: str) -> None:
    ranks(2).run(save_rows, f"{container}/run", 3)
    for path in paths_below(container):
        data, _ = store_of(container).read(path, limit=1 << 30)
        store_of(container).put(path.replace("run/", "copy/"), data)
    assert is_complete(f"{container}/copy")
    for world_size in (1, 2, 3):
        ranks(world_size).run(load_rows, f"{container}/copy", 3)


@pytest.mark.parametrize("ranks_saved", [10**9, 10**30, 0, -2, "2", None])
def test_a_number_of_ranks_that_cannot_be(container: str, ranks_saved: Any) -> None:
    url = f"{container}/run"
    save_without_collectives(url, 0, 1, group=SaveGroup("first", 2))
    location = BlobLocation.parse(url)
    for rank in (0, 1):
        path = location.join(f"__{rank}.metadata").path
        metadata: Metadata = pickle.loads(store_of(url).read(path, limit=1 << 30)[0])
        meta: Any = metadata.storage_meta
        meta.ranks = ranks_saved
        store_of(url).put(path, pickle.dumps(metadata))
    with pytest.raises(CheckpointNotFoundError, match="use_collectives=False"):
        inspect(url, credential=KEY)
    assert store_of(url).counts.requests < 100


def test_a_reader_without_the_right_to_list(ranks: Ranks, container: str) -> None:
    url = f"{container}/run"
    ranks(2).run(save_rows, url, 8)
    target = sharded.empty(sharded.plain())
    dcp.load(target, storage_reader=AzureBlobReader(url, credential=container_sas(url, "r")))
    for name in sharded.GLOBAL:
        sharded.assert_same(target[name], sharded.expected(name, 8), name)
