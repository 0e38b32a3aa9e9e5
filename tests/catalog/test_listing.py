"""`list_checkpoints` and `latest` read one listing; `inspect` reads the metadata."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    CheckpointNotFoundError,
    ContainerNotFoundError,
    CorruptCheckpointError,
    LocationError,
    __version__,
)
from azure_torch_ckpt.catalog import inspect, latest, list_checkpoints
from azure_torch_ckpt.catalog.listing import step_of
from azure_torch_ckpt.dcp.blob_names import new_save_id
from azure_torch_ckpt.dcp.metadata.schema import stored_item
from tests.support.containers import content, plant, put, store_of
from tests.support.mixed_checkpoint import KEY, save, save_without_collectives, state
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


# ---- list_checkpoints ------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_listed_and_nothing_else(container: str) -> None:
    save(f"{container}/run/step-2", 1)
    save(f"{container}/run/step-10", 2)
    save(f"{container}/run/step-10/inner", 3)
    put(container, "run/step-10/notes.txt", b"12345")
    put(container, "run/step-10/inner/deep/er/notes.txt", b"123")
    put(container, f"run/step-30/{new_save_id()}/__0_0.distcp", b"1234")
    put(container, "run/other/model.safetensors")
    put(container, "running/.metadata")  # not below "run/"
    found = list_checkpoints(f"{container}/run", credential=KEY)
    assert [(entry.name, entry.step, entry.complete, entry.blobs) for entry in found] == [
        ("step-2", 2, True, 2),
        ("step-10", 10, True, 3),
        ("step-30", 30, False, 1),
        ("step-10/inner", None, True, 3),
    ]
    assert [entry.url for entry in found] == [f"{container}/run/{entry.name}" for entry in found]
    store = store_of(container)
    sizes = {blob.path: blob.size for blob in store.list("run/step-10/")}
    assert found[1].size == sum(size for path, size in sizes.items() if "/inner/" not in path)
    assert found[3].size == sum(size for path, size in sizes.items() if "/inner/" in path)
    assert found[1].modified == store.stat("run/step-10/.metadata").last_modified
    assert found[2].modified == store.stat(next(store.list("run/step-30/")).path).last_modified
    assert found[2].size == 4


def test_the_url_itself_may_be_a_checkpoint_also_the_containers_root(container: str) -> None:
    save(container)
    save(f"{container}/global_step7")
    [root, below] = list_checkpoints(container, credential=KEY)
    assert (root.name, root.url, root.step, root.blobs) == ("", container, None, 2)
    assert (below.name, below.step) == ("global_step7", 7)
    [only] = list_checkpoints(f"{container}/global_step7", credential=KEY)
    assert (only.name, only.step, only.url) == ("", 7, f"{container}/global_step7")


def test_torchs_own_layout_is_recognised(container: str, tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path))
    for file in tmp_path.iterdir():
        put(container, f"foreign/step=5/{file.name}", file.read_bytes())
        if file.name != ".metadata":
            put(container, f"foreign/step=6/{file.name}", file.read_bytes())
    [complete, incomplete] = list_checkpoints(container, credential=KEY)
    assert (complete.step, complete.complete) == (5, True)
    assert (incomplete.step, incomplete.complete) == (6, False)
    assert complete.size == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_a_save_over_a_checkpoint_leaves_it_complete_and_counts(container: str) -> None:
    save(f"{container}/a")
    [before] = list_checkpoints(container, credential=KEY)
    put(container, f"a/{new_save_id()}/__0_0.distcp", b"1" * 1000)
    [during] = list_checkpoints(container, credential=KEY)
    assert during.complete and during.modified == before.modified
    assert (during.size, during.blobs) == (before.size + 1000, before.blobs + 1)


def test_ranks_without_collectives_are_complete_when_all_of_them_are(container: str) -> None:
    url = f"{container}/alone"
    save_without_collectives(url, 0, 1)
    assert [entry.complete for entry in list_checkpoints(url, credential=KEY)] == [True]
    put(container, f"alone/{new_save_id()}/__2_0.distcp")  # rank 2 has begun
    assert [entry.complete for entry in list_checkpoints(url, credential=KEY)] == [False]
    save_without_collectives(url, 2)
    [entry] = list_checkpoints(url, credential=KEY)
    assert entry.complete
    store = store_of(url)
    assert entry.modified == store.stat("alone/__2.metadata").last_modified
    store.delete("alone/__1.metadata")
    assert [entry.complete for entry in list_checkpoints(url, credential=KEY)] == [False]


def test_a_thousand_checkpoints_cost_one_request_for_every_5000_blobs(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    store = store_of(container)
    with ThreadPoolExecutor(16) as pool:
        paths = [f"run-{number % 10}/step-{number}/.metadata" for number in range(1000)]
        list(pool.map(lambda path: store.put(path, b""), paths))
    found = list_checkpoints(proxied_container, credential=KEY)
    assert len(found) == 1000 and all(entry.complete for entry in found)
    assert [entry.step for entry in found[:100]] == list(range(0, 1000, 10))
    assert proxy.log and {seen.kind for seen in proxy.log} == {"List"} and proxy.count() == 1
    assert latest(f"{proxied_container}/run-3", credential=KEY).step == 993
    assert proxy.count() == 2


def test_nothing_to_list(container: str) -> None:
    assert list_checkpoints(container, credential=KEY) == []
    assert list_checkpoints(f"{container}/nothing", credential=KEY) == []
    with pytest.raises(ContainerNotFoundError):
        list_checkpoints(f"{container}-absent/run", credential=KEY)
    with pytest.raises(LocationError):
        list_checkpoints("/a/local/path")


def test_the_folders_of_a_hierarchical_namespace_are_not_blobs(container: str) -> None:
    """There, a listing has an empty blob for each folder. Azurite has no such blobs."""
    plant(container, ["run/step-1"])
    [before] = list_checkpoints(container, credential=KEY)
    for path in ("run", "run/step-1"):
        put(container, path, b"")
    assert list_checkpoints(container, credential=KEY) == [before]
    put(container, "run/step-1/empty", b"")  # as empty, and no folder
    assert [entry.blobs for entry in list_checkpoints(container, credential=KEY)] == [before.blobs + 1]


def test_a_name_that_no_url_can_have_does_not_break_the_listing(container: str) -> None:
    save(f"{container}/a")
    put(container, "a//b/.metadata")
    assert [entry.name for entry in list_checkpoints(container, credential=KEY)] == ["a"]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-1000", 1000),
        ("step=1000", 1000),
        ("run-7/epoch=3-step=1000", 1000),
        ("epoch=3-step=1000-v2", 1000),
        ("global_step1000", 1000),
        ("checkpoint-500", 500),
        ("iter_0001000", 1000),
        ("1000", 1000),
        ("epoch=3", 3),
        ("step-7/last", None),
        ("last", None),
        ("2026-01-31", None),
        ("llama2-7b", None),
        ("", None),
    ],
)
def test_the_step_is_in_the_name(name: str, step: int | None) -> None:
    assert step_of(name) == step


@given(st.integers(0, 10**18))
def test_any_step_is_read_back(step: int) -> None:
    assert step_of(f"a-1/step-{step}") == step_of(f"epoch=1-step={step}") == step_of(str(step)) == step


# ---- latest ----------------------------------------------------------------------------------------------------------


def test_steps_compare_as_numbers(container: str) -> None:
    plant(container, [f"run/step-{step}" for step in (1000, 999, 20, 3)])
    put(container, f"run/step-5000/{new_save_id()}/__0_0.distcp")
    assert latest(f"{container}/run", credential=KEY).name == "step-1000"


def test_the_time_decides_where_a_name_has_no_step(container: str) -> None:
    plant(container, ["run/step-9"])
    # The service's times have a resolution of one second.
    store = store_of(container)
    first = store.stat("run/step-9/.metadata").last_modified
    while store.now() <= first + datetime.timedelta(seconds=1):
        pass
    plant(container, ["run/best"])
    assert latest(f"{container}/run", credential=KEY).name == "best"


def test_without_a_complete_checkpoint_the_error_names_incomplete_saves(container: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="No save"):
        latest(f"{container}/run", credential=KEY)
    for step in (1, 2):
        put(container, f"run/step-{step}/{new_save_id()}/__0_0.distcp")
    with pytest.raises(CheckpointNotFoundError, match=r"2 incomplete saves \(step-1, step-2\)"):
        latest(f"{container}/run", credential=KEY)


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_describes_a_checkpoint_with_one_request(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    url = f"{proxied_container}/a"
    save(f"{container}/a")
    found = inspect(url, credential=KEY)
    assert proxy.count() == 1 and found.url == url
    assert {tensor.key: (tensor.shape, tensor.dtype, tensor.size) for tensor in found.tensors} == {
        "large": ((300, 200), "float32", 240_000),
        "small": ((10, 7), "int32", 280),
        "strided": ((80, 60), "bfloat16", 9600),
    }
    storage = AzureBlobReader(f"{container}/a", credential=KEY).read_metadata().storage_data
    items = {index.fqn: stored_item(info) for index, info in storage.items()}
    for tensor in found.tensors:
        [shard] = tensor.shards
        item = items[tensor.key]
        assert (shard.offsets, shard.sizes, shard.rank) == ((0, 0), tensor.shape, 0)
        assert (shard.blob, shard.offset, shard.length) == (item.relative_path, item.offset, item.length)
        assert shard.crc64 == item.crc64 is not None
    [thing] = found.objects
    assert (thing.key, thing.length, thing.rank) == ("object", items["object"].length, 0)
    assert found.size == sum(item.length for item in items.values())
    assert found.torch_version == torch.__version__ and type(found.torch_version) is str
    assert found.writer_version == __version__
    assert found.save_id is not None and found.tensors[0].shards[0].blob.startswith(found.save_id)
    store = store_of(container)
    assert found.modified == store.stat("a/.metadata").last_modified


def test_a_copy_on_a_disk_still_loads_with_torch_though_the_versions_are_recorded(
    container: str, tmp_path: Path
) -> None:
    save(f"{container}/a")
    store = store_of(container)
    for blob in store.list("a/"):
        file = tmp_path / blob.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(container, blob.path))
    loaded = {"small": torch.zeros(10, 7, dtype=torch.int32)}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / "a"))
    assert torch.equal(loaded["small"], state()["small"])


def test_inspect_of_torchs_own_checkpoint_says_what_it_can(container: str, tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path))
    for file in tmp_path.iterdir():
        put(container, f"foreign/{file.name}", file.read_bytes())
    found = inspect(f"{container}/foreign", credential=KEY)
    assert found.torch_version is None and found.writer_version is None and found.dcp_version is not None
    assert len(found.tensors) == 3 and all(shard.crc64 is None for tensor in found.tensors for shard in tensor.shards)


def test_inspect_of_ranks_without_collectives_shows_all_of_them(container: str) -> None:
    save_without_collectives(f"{container}/alone", 0, 1, 2)
    found = inspect(f"{container}/alone", credential=KEY)
    assert [(tensor.key, tensor.shards[0].rank) for tensor in found.tensors] == [
        ("rank0", 0),
        ("rank1", 1),
        ("rank2", 2),
    ]


def test_inspect_without_a_checkpoint(container: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="Nothing lies there at all"):
        inspect(f"{container}/nothing", credential=KEY)
    plant(container, ["run/step-1"])
    with pytest.raises(CheckpointNotFoundError, match="Complete checkpoints lie below it: step-1"):
        inspect(f"{container}/run", credential=KEY)
    put(container, f"run/step-2/{new_save_id()}/__0_0.distcp")
    with pytest.raises(CheckpointNotFoundError, match="a save that did not finish"):
        inspect(f"{container}/run/step-2", credential=KEY)
    put(container, "other/notes.txt")
    with pytest.raises(CheckpointNotFoundError, match=r"What lies there: notes\.txt"):
        inspect(f"{container}/other", credential=KEY)
    put(container, "bad/.metadata", b"garbage")
    with pytest.raises(CorruptCheckpointError):
        inspect(f"{container}/bad", credential=KEY)
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/empty", credential=KEY))
    empty = inspect(f"{container}/empty", credential=KEY)
    assert (empty.tensors, empty.objects, empty.size) == ([], [], 0)
