"""Metadata of real saves, of other versions of torch and of custom planners is read."""

from __future__ import annotations

import dataclasses
import enum
import multiprocessing
import pathlib
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement

from azure_torch_ckpt._internal.torch_private import MemoryFormatEncoding, StorageInfo
from azure_torch_ckpt.dcp.metadata.schema import (
    StoredItem,
    check_metadata,
    dump_metadata,
    load_metadata,
    stored_item,
)
from azure_torch_ckpt.dcp.metadata.views import data_paths
from azure_torch_ckpt.errors import (
    CorruptCheckpointError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
)
from tests.dcp.metadata.pickles import (
    WHERE,
    assert_fast_path_changes_nothing,
    call,
    named,
    program,
    saved_by_torch,
    small_metadata,
    text,
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved_by_torch(tmp_path_factory.mktemp("real"), thread_count=3)


# What real saves write.


@pytest.mark.parametrize(
    "writer", [{}, {"thread_count": 4}, {"single_file_per_rank": False}], ids=["plain", "threads", "many_files"]
)
def test_what_torch_wrote_is_read_as_torch_reads_it(tmp_path: pathlib.Path, writer: dict[str, Any]) -> None:
    data = saved_by_torch(tmp_path, **writer)
    metadata = load_metadata(data, WHERE)
    check_metadata(metadata, WHERE)
    assert metadata == pickle.loads(data)
    assert data_paths(metadata) == {path.name for path in tmp_path.iterdir()} - {".metadata"}
    directory = metadata.storage_meta.checkpoint_id if metadata.storage_meta else None
    assert directory == pathlib.PurePath(tmp_path) and not isinstance(directory, pathlib.Path)


def save_sharded(rank: int, world: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    rows = torch.arange(4.0).reshape(1, 4)
    local = Shard(torch.full((2, 2), float(rank)), ShardMetadata([2 * rank, 0], [2, 2], f"rank:{rank}/cpu"))
    linear = torch.nn.Linear(4, 5)
    fully_shard(linear, mesh=mesh)
    state = {
        "fsdp": linear.state_dict(),
        "one_row": distribute_tensor(rows, mesh, [ShardPlacement(0)]),  # every rank but the first holds nothing
        "uneven": distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [ShardPlacement(0)]),
        "replicated": distribute_tensor(torch.ones(3), mesh, [Replicate()]),
        "sharded": init_from_local_shards([local], (2 * world, 2)),
        "plain": torch.zeros(5),
        "step": 1,
    }
    save(state, storage_writer=FileSystemWriter(f"{directory}/save", thread_count=2))
    dist.destroy_process_group()


def test_several_ranks_with_empty_shards(tmp_path: pathlib.Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=save_sharded, args=(rank, 3, str(tmp_path))) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    data = (tmp_path / "save" / ".metadata").read_bytes()
    metadata = load_metadata(data, WHERE)
    check_metadata(metadata, WHERE)
    assert metadata == pickle.loads(data)
    assert_fast_path_changes_nothing(data)
    one_row = metadata.state_dict_metadata["one_row"]
    assert isinstance(one_row, TensorStorageMetadata)
    assert {tuple(chunk.sizes) for chunk in one_row.chunks} == {(1, 4), (0, 4)}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_that_torch_could_write(real: bytes, protocol: int) -> None:
    for metadata in (pickle.loads(real), small_metadata()):
        data = pickle.dumps(metadata, protocol)
        assert load_metadata(data, WHERE) == pickle.loads(data)


@pytest.mark.parametrize("protocol", [0, 1])
def test_protocols_of_python_2_are_no_metadata(real: bytes, protocol: int) -> None:
    with pytest.raises(CorruptCheckpointError, match="protocol 2 or later"):
        load_metadata(pickle.dumps(pickle.loads(real), protocol), WHERE)


def test_a_future_protocol_is_unsupported(real: bytes) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="protocol 6"):
        load_metadata(b"\x80\x06" + real[2:], WHERE)


def test_our_attributes_survive_and_torch_ignores_them() -> None:
    data = dump_metadata(small_metadata())
    index = MetadataIndex("w", (0, 0))
    for metadata in (load_metadata(data, WHERE), pickle.loads(data)):
        check_metadata(metadata, WHERE)
        assert metadata == small_metadata()
        assert type(metadata.storage_data[index]) is StorageInfo
        assert stored_item(metadata.storage_data[index]) == StoredItem("id/__0_0.distcp", 0, 100, 64, 2**64 - 1, ())


def test_stored_item_of_torch_old_and_new() -> None:
    assert stored_item(StorageInfo("p", 1, 2)) == StoredItem("p", 1, 2, None, None, ())
    assert stored_item(StorageInfo("p", 1, 2, ["zstd"])) == StoredItem("p", 1, 2, None, None, ("zstd",))
    old = StorageInfo("p", 1, 2)
    del old.__dict__["transform_descriptors"]
    assert stored_item(old) == StoredItem("p", 1, 2, None, None, ())
    with pytest.raises(UnsupportedCheckpointError, match="another storage plugin"):
        stored_item({"relative_path": "p"})


# Other versions of torch and Python.


def test_six_fields_of_tensor_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    five: Any = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*five(self), "new"))
    data = pickle.dumps(small_metadata())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="too many values"):
        pickle.loads(data)
    metadata = load_metadata(data, WHERE)
    assert metadata == small_metadata()
    assert type(metadata.state_dict_metadata["w"].properties) is TensorProperties  # type: ignore[union-attr]


def test_attributes_of_a_newer_torch_are_kept() -> None:
    metadata: Any = small_metadata()
    metadata.from_the_future = {"a": [1]}
    metadata.state_dict_metadata["w"].chunks[0].stride = torch.Size([3, 1])
    loaded: Any = load_metadata(pickle.dumps(metadata), WHERE)
    check_metadata(loaded, WHERE)
    assert loaded.from_the_future == {"a": [1]}
    assert loaded.state_dict_metadata["w"].chunks[0].stride == torch.Size([3, 1])


def test_fields_that_an_older_torch_did_not_write() -> None:
    metadata = small_metadata()
    assert metadata.storage_meta is not None
    del metadata.storage_meta.__dict__["modules"]
    metadata.__dict__.pop("version")
    loaded = load_metadata(pickle.dumps(metadata), WHERE)
    check_metadata(loaded, WHERE)
    assert loaded.version is None and loaded.storage_meta is not None and loaded.storage_meta.modules == []
    metadata.__dict__.pop("storage_meta")
    loaded = load_metadata(pickle.dumps(metadata), WHERE)
    check_metadata(loaded, WHERE)
    assert loaded.storage_meta is None


@pytest.mark.parametrize(
    ("now", "then"),
    [
        ("torch.distributed.checkpoint.", "torch.distributed._shard.checkpoint."),
        (
            "torch.distributed.checkpoint.metadata\nTensorProperties",
            "torch.distributed._shard.sharded_tensor.metadata\nTensorProperties",
        ),
        (
            "torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING",
            "torch.distributed._shard.sharded_tensor.metadata\nMEM_FORMAT_ENCODING",
        ),
    ],
)
def test_module_names_of_older_torch(now: str, then: str) -> None:
    data = pickle.dumps(small_metadata(), 2)
    assert now.encode() in data
    assert load_metadata(data.replace(f"c{now}".encode(), f"c{then}".encode()), WHERE) == small_metadata()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("flavour", [pathlib.PurePosixPath, pathlib.PureWindowsPath])
@pytest.mark.parametrize("prefix", ["", "Pure"])
def test_paths_of_every_system(module: str, flavour: type[pathlib.PurePath], prefix: str) -> None:
    metadata = small_metadata()
    assert metadata.storage_meta is not None
    metadata.storage_meta.checkpoint_id = pathlib.PurePosixPath("/data", "run")
    name = prefix + flavour.__name__.removeprefix("Pure")
    data = pickle.dumps(metadata, 2).replace(b"cpathlib\nPurePosixPath\n", f"c{module}\n{name}\n".encode())
    data = data.replace(b"cpathlib._local\nPurePosixPath\n", f"c{module}\n{name}\n".encode())
    loaded = load_metadata(data, WHERE)
    assert loaded.storage_meta is not None and loaded.storage_meta.checkpoint_id == flavour("/data", "run")


def test_enum_members_as_python_3_11_0_pickled_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        MemoryFormatEncoding, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)), raising=False
    )
    for protocol in (2, 4):
        data = pickle.dumps(small_metadata(), protocol)
        assert b"getattr" in data
        assert load_metadata(data, WHERE) == small_metadata()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "ShinyStorageMetadata"),
        ("torch.distributed.checkpoint.not_yet", "Anything"),
        ("torch", "float3_e1m1"),
    ],
)
def test_names_of_a_newer_torch(module: str, name: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=f"{name}.*newer torch"):
        load_metadata(program(named(module, name)), WHERE)


def test_a_layout_of_a_newer_torch() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="sparse_banana"):
        load_metadata(program(call("torch.serialization", "_get_layout", text("torch.sparse_banana"))), WHERE)


# Custom planners.


class Kind(enum.Enum):
    A = "a"


class Point(NamedTuple):
    x: int
    y: int


class Slotted:
    __slots__ = ("value",)
    value: set[int]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


@dataclasses.dataclass
class PlannerData:
    kinds: dict[Point, Kind]
    ordered: OrderedDict[str, int]
    slotted: Slotted


class Names(list[str]):
    pass


class Table(dict[str, int]):
    pass


OPT_IN: list[Any] = [Kind, Point, PlannerData, Slotted, Names, Table]


def custom_planner_data() -> list[Any]:
    slotted = Slotted()
    slotted.value = {1, 2}
    data = PlannerData({Point(1, 2): Kind.A}, OrderedDict(a=1), slotted)
    return [
        data,
        Names(["a", "b"]),
        Table(a=1, b=2),
        {True: None, (1, "a"): b"x" * 300, 1.5: -(2**70)},
        frozenset("ab"),
    ]


def test_classes_that_the_user_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = small_metadata()
    metadata.planner_data = custom_planner_data()
    data = pickle.dumps(metadata)
    for missing in OPT_IN:
        others = [cls for cls in OPT_IN if cls is not missing]
        with torch.serialization.safe_globals(others), pytest.raises(UnsafeMetadataError, match=missing.__qualname__):
            load_metadata(data, WHERE)
    with torch.serialization.safe_globals(OPT_IN):
        loaded = load_metadata(dump_metadata(metadata), WHERE)
    assert loaded == metadata
    assert [type(entry) for entry in loaded.planner_data] == [PlannerData, Names, Table, dict, frozenset]


def test_a_save_that_could_not_be_loaded_fails_before_it_is_committed() -> None:
    metadata = small_metadata()
    metadata.planner_data = Kind.A
    with pytest.raises(UnsafeMetadataError, match="add_safe_globals"):
        dump_metadata(metadata)


def test_what_torch_registered_for_itself_is_not_accepted() -> None:
    # torch.distributed.tensor does so when it is imported; constructing a DeviceMesh starts process groups.
    assert any("DeviceMesh" in str(entry) for entry in torch.serialization.get_safe_globals())
    with pytest.raises(UnsafeMetadataError, match="DeviceMesh"):
        load_metadata(program(call("torch.distributed.device_mesh", "DeviceMesh", text("cpu"))), WHERE)
