"""Tests of dcp/metadata.py: real metadata passes, whatever else lies at ``.metadata`` is refused and never run."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import enum
import functools
import multiprocessing
import os
import pathlib
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement

from azure_torch_ckpt._torch_private import MemoryFormatEncoding, StorageInfo
from azure_torch_ckpt.dcp.metadata import (
    StoredItem,
    check_metadata,
    data_paths,
    dump_metadata,
    load_metadata,
    storage_info,
    stored_item,
)
from azure_torch_ckpt.errors import (
    AzureCheckpointError,
    CorruptCheckpointError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
)

WHERE = "container/run/.metadata"


def one_process_state() -> dict[str, Any]:
    return {
        "model": {
            "weight": torch.arange(12.0).reshape(3, 4),
            "scalar": torch.tensor(7),
            "empty": torch.empty(0, 5, dtype=torch.bfloat16),
            "channels_last": torch.zeros(1, 2, 3, 4).to(memory_format=torch.channels_last),
            "complex": torch.zeros(2, dtype=torch.complex64),
        },
        "step": 3,
        "history": [1, {"deep": torch.ones(2)}, None],
        "dtype": torch.float16,
        "ünïcode": "x" * 300,
    }


def saved_by_torch(directory: pathlib.Path, **writer: Any) -> bytes:
    save(one_process_state(), storage_writer=FileSystemWriter(directory, **writer), no_dist=True)
    return (directory / ".metadata").read_bytes()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved_by_torch(tmp_path_factory.mktemp("real"), thread_count=3)


def small_metadata() -> Metadata:
    """One tensor in two chunks and one object, stored as our writer stores them."""
    chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3])),
        ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([1, 3])),
    ]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([3, 3]), chunks)
    return Metadata(
        {"w": tensor, "o": BytesStorageMetadata()},
        planner_data={"w": ("w",), "o": ("o",)},
        storage_data={
            MetadataIndex("w", (0, 0), 0): storage_info("id/__0_0.distcp", 0, 100, payload_offset=64, crc64=2**64 - 1),
            MetadataIndex("w", (2, 0), 1): storage_info("id/__1_0.distcp", 0, 90, payload_offset=64, crc64=0),
            MetadataIndex("o"): storage_info("id/__0_0.distcp", 100, 20, crc64=5),
        },
        storage_meta=StorageMeta(checkpoint_id="https://a.example/c/run", save_id="s"),
        version="1.0.0",
    )


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
    state = {
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


# Attacks. A program is opcodes between PROTO and STOP.


def program(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def call(module: str, name: str, *args: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(args) + b"t" + b"R"


CHECKPOINT = "torch.distributed.checkpoint"
METADATA = named(f"{CHECKPOINT}.metadata", "Metadata")


class Reduce:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_data"])
def test_nothing_is_run(tmp_path: pathlib.Path, protocol: int, place: str) -> None:
    marker = tmp_path / "was_here"
    attacks = [
        Reduce(os.system, f"touch {marker}"),
        Reduce(os.mkdir, str(marker)),
        Reduce(builtins.eval, f"open({str(marker)!r}, 'w')"),
        Reduce(builtins.exec, f"open({str(marker)!r}, 'w')"),
        Reduce(builtins.open, str(marker), "w"),
        Reduce(functools.partial, os.mkdir, str(marker)),
        Reduce(torch.load, str(marker)),
        Reduce(torch.hub.load, "owner/repo", "model"),
        Reduce(getattr, pathlib.Path, "touch"),
        Reduce(getattr, MemoryFormatEncoding, "__class__", None),
        Reduce(OrderedDict, [("a", 1)]),
        Reduce(bytearray, 1 << 40),
        Reduce(FileSystemReader, str(marker)),
    ]
    for attack in attacks:
        metadata = small_metadata()
        if place == "planner_data":
            metadata.planner_data = {"a": attack}
        elif place == "storage_data":
            metadata.storage_data[MetadataIndex("x")] = attack
        data = pickle.dumps(attack if place == "whole" else metadata, protocol)
        with pytest.raises(UnsafeMetadataError):
            load_metadata(data, WHERE)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "os.system"),
        ("torch", "load"),
        ("torch", "serialization"),
        (f"{CHECKPOINT}.metadata", "os"),
        (f"{CHECKPOINT}.metadata", "os.system"),
        (f"{CHECKPOINT}.metadata", "Metadata.__init__"),
        (f"{CHECKPOINT}.filesystem", "FileSystem"),
        (f"{CHECKPOINT}.metadata.os", "system"),
        ("pathlib", "Path"),
        ("pathlib", "os"),
        ("collections", "OrderedDict.fromkeys"),
        ("builtins", "getattr.__self__"),
        ("copyreg", "_reconstructor"),
        ("", ""),
        ("a" * 500, "b\nc"),
    ],
)
def test_names_that_are_refused(module: str, name: str) -> None:
    with pytest.raises(UnsafeMetadataError) as raised:
        load_metadata(program(named(module, name)), WHERE)
    assert WHERE in str(raised.value) and "add_safe_globals" in str(raised.value)
    assert len(str(raised.value)) < 1000 and "\n" not in str(raised.value)


def test_modules_that_cannot_be_registered() -> None:
    with torch.serialization.safe_globals([os.system, torch.load]):
        for module, name in ((os.system.__module__, "system"), ("torch.serialization", "load")):
            with pytest.raises(UnsafeMetadataError, match="is no part"):
                load_metadata(program(call(module, name, text("true"))), WHERE)


LAYOUT = named("torch.serialization", "_get_layout")


@pytest.mark.parametrize(
    "opcodes",
    [
        text("id") + pickle.BINPERSID,
        pickle.PERSID + b"id\n",
        pickle.EXT1 + b"\x01",
        pickle.EXT2 + b"\x01\x00",
        pickle.EXT4 + b"\x01\x00\x00\x00",
        b"(" + pickle.INST + b"os\nsystem\n",
        b"(" + METADATA + pickle.OBJ,
        pickle.NEXT_BUFFER,
        METADATA + b")}" + pickle.NEWOBJ_EX,
        METADATA + b")R",
        METADATA + b"N\x85\x81",
        LAYOUT + b")\x81",
        b"K\x01)R",
        b"K\x01)\x81",
        METADATA + b"}" + text("x") + b"K\x01sb",  # an attribute of the class, for the whole process
        METADATA + b"N}" + text("__init__") + b"K\x01s\x86b",
        LAYOUT + b"}" + text("cache") + b"}sb",
        named("torch", "float32") + b"}" + text("x") + b"K\x01sb",
        METADATA + b")\x81" + b"K\x01a",
        METADATA + b")\x81" + b"K\x01K\x02s",
        b")K\x01a",
        named("torch", "float32") + b"K\x01K\x02s",
    ],
)
def test_instructions_that_are_refused(opcodes: bytes) -> None:
    with pytest.raises(UnsafeMetadataError):
        load_metadata(program(opcodes), WHERE)


@pytest.mark.parametrize(
    "opcodes",
    [
        METADATA + b")\x81" + b"}" + text("__class__") + b"K\x01sb",
        METADATA + b")\x81" + b"}K\x01K\x02sb",
        METADATA + b")\x81" + b"K\x01b",
        named(f"{CHECKPOINT}.metadata", "TensorProperties") + b")\x81K\x01\x85b",
        named(f"{CHECKPOINT}.metadata", "MetadataIndex") + b")\x81}" + text("fqn") + b"K\x01sb",
        b"}" + named(f"{CHECKPOINT}.metadata", "MetadataIndex") + b")\x81K\x01s",
        b"}" + METADATA + b"K\x01s",
        b"}]K\x01s",
        b"}(K\x01u",
        call("torch", "Size", text("ab")),
        call("torch", "Size", b")K\x01\x86"),
        call("torch", "Size", b"(" + b"K\x01" * 65 + b"t"),
        call("torch", "Size", b"\x8a\x0a" + b"\x01" * 10 + b"\x85"),
        call(f"{CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING", b"K\x09"),
        call("torch.serialization", "_get_layout", b"K\x01"),
        call("pathlib", "PosixPath", b"K\x01"),
        named("torch", "Size") + b"K\x01R",
        b"K\x01K\x02\x93",
        b"q\x07",
        b"h\x00",
        b"\x94",
        b"t",
        b"(K\x01",
        b"K\x01K\x02",
        b"",
        b"\xff",
        b"N",
        b"\x8c\x01\xff",
        b"cos",
    ],
)
def test_instructions_that_make_no_sense(opcodes: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        load_metadata(program(opcodes), WHERE)


def test_nothing_may_follow_the_end(real: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="1 bytes follow"):
        load_metadata(real + b"\x00", WHERE)


def test_every_truncation_is_noticed(real: bytes) -> None:
    for end in range(0, len(real)):
        with pytest.raises(CorruptCheckpointError, match="cut short"):
            load_metadata(real[:end], WHERE)


def peak_memory(data: bytes) -> int:
    """What a load of ``data``, which must fail, takes at its worst, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(AzureCheckpointError):
            load_metadata(data, WHERE)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = struct.pack("<Q", 1 << 40)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"Nr\xff\xff\xff\xff",
        b"Np4294967295\n",
        b"j\xff\xff\xff\xff",
        pickle.BYTEARRAY8 + HUGE,
        pickle.BINBYTES8 + HUGE,
        pickle.BINUNICODE8 + HUGE,
        pickle.FRAME + HUGE,
        pickle.LONG4 + struct.pack("<i", 1 << 30),
        # One large tuple, copied again and again.
        named("torch", "Size") + b"\x94(" + b"K\x01" * 9000 + b"t\x85\x94" + b"h\x00h\x01R" * 2000,
        # One large dict as the state of many objects.
        b"}(" + b"".join(text(f"{i}") + b"N" for i in range(900)) + b"u\x94" + (METADATA + b")\x81h\x00b") * 900,
        # One long name as the part of many paths.
        text("x/" * 20000) + b"\x94" + named("pathlib", "PosixPath") + b"\x94" + b"h\x01(h\x00tR" * 3000,
    ],
)
def test_small_data_takes_little_memory(opcodes: bytes) -> None:
    data = program(opcodes)
    assert peak_memory(data) < 100_000 + 300 * len(data)


def test_keys_that_would_take_for_ever_or_overflow_the_stack() -> None:
    shared = b"})" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60)) + b"Ns"
    nested = b"})" + b"\x85" * 300_000 + b"Ns"
    for opcodes in (shared, nested, shared.replace(b"}", b"\x8f(", 1)[:-2] + pickle.ADDITEMS):
        with pytest.raises(CorruptCheckpointError, match="used as a key"):
            load_metadata(program(opcodes), WHERE)


def test_deep_nesting_is_no_recursion() -> None:
    with pytest.raises(CorruptCheckpointError, match="not checkpoint metadata"):
        load_metadata(program(b")" + b"\x85" * 300_000), WHERE)


small = dump_metadata(small_metadata())
spots = st.integers(0, len(small) - 1)
edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), spots, st.integers(0, 255)),
        st.tuples(st.just("delete"), spots, st.integers(1, 20)),
        st.tuples(st.just("insert"), spots, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("repeat"), spots, st.integers(1, 60)),
        st.tuples(st.just("cut"), spots, st.none()),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=600, deadline=5000)
@given(edits)
def test_damaged_metadata_is_read_or_refused_and_nothing_else(changes: list[tuple[str, int, Any]]) -> None:
    data = bytearray(small)
    for kind, spot, how in changes:
        if kind == "flip":
            data[spot % len(data)] = how
        elif kind == "delete":
            del data[spot : spot + how]
        elif kind == "insert":
            data[spot:spot] = how
        elif kind == "repeat":
            data[spot:spot] = data[spot : spot + how]
        else:
            del data[spot:]
        data = data or bytearray(b".")
    tracemalloc.start()
    try:
        metadata = load_metadata(bytes(data), WHERE)
        assert isinstance(metadata, Metadata)
        check_metadata(metadata, WHERE)
        assert all(type(stored_item(info)) is StoredItem for info in metadata.storage_data.values())
    except AzureCheckpointError as error:
        assert WHERE in str(error) and len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=300, deadline=5000)
@given(st.binary(max_size=200))
def test_garbage_is_refused(body: bytes) -> None:
    for data in (body, program(body)):
        with pytest.raises(AzureCheckpointError):
            load_metadata(data, WHERE)


# check_metadata.

Change = Callable[[Any], object]


def tensor(m: Any) -> Any:
    return m.state_dict_metadata["w"]


def info(m: Any) -> Any:
    return m.storage_data[MetadataIndex("w", (0, 0))]


def put(target: Callable[[Any], Any], **values: Any) -> Change:
    return lambda m: target(m).__dict__.update(values)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../other/x",
        "a/../../x",
        "a/./x",
        ".",
        "a//x",
        "a/",
        "a\\..\\x",
        "C:x",
        "https://evil.example/x",
        "file:/x",
        "a/b://c",
        "a\nb",
        "a\x00",
        "a\x85",
        "\ud800",
        "x" * 1025,
    ],
)
def test_paths_that_leave_the_checkpoint(path: str) -> None:
    metadata = small_metadata()
    info(metadata).relative_path = path
    with pytest.raises(UnsafeMetadataError, match="no plain path") as raised:
        check_metadata(load_metadata(pickle.dumps(metadata), WHERE), WHERE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["__0_0.distcp", "a/b/c", "...", ".a", "a..b", "ünï code%2e", "x" * 1024])
def test_paths_that_stay_inside(path: str) -> None:
    metadata = small_metadata()
    info(metadata).relative_path = path
    check_metadata(metadata, WHERE)
    assert path in data_paths(metadata)


@pytest.mark.parametrize(
    "change",
    [
        put(info, offset=-1),
        put(info, length=-1),
        put(info, offset=2**63 - 100),
        put(info, length=2**2000),
        put(info, payload_offset=-1),
        put(info, payload_offset=101),
        put(info, crc64=-1),
        put(info, crc64=2**64),
        put(tensor, size=torch.Size([-3, 3])),
        put(lambda m: tensor(m).chunks[0], offsets=torch.Size([-1, 0])),
        put(lambda m: tensor(m).chunks[0], sizes=torch.Size([2, -3])),
    ],
)
def test_hostile_numbers(change: Change) -> None:
    metadata = small_metadata()
    change(metadata)
    with pytest.raises(UnsafeMetadataError, match="refused"):
        check_metadata(metadata, WHERE)


@pytest.mark.parametrize(
    "change",
    [
        put(lambda m: m, state_dict_metadata=None),
        put(lambda m: m, storage_data=None),
        put(lambda m: m, storage_meta="x"),
        put(lambda m: m, version=1),
        lambda m: m.__dict__.pop("state_dict_metadata"),
        lambda m: m.state_dict_metadata.update({1: BytesStorageMetadata()}),
        lambda m: m.state_dict_metadata.update({"x": BytesStorageMetadata()}),
        lambda m: m.state_dict_metadata.update({"x": None}),
        lambda m: m.storage_data.update({"x": info(m)}),
        put(info, relative_path=b"x"),
        put(info, offset=True),
        put(info, offset=0.0),
        put(info, length=None),
        put(info, payload_offset=True),
        put(info, crc64="0"),
        put(info, transform_descriptors="zstd"),
        put(info, transform_descriptors=[1]),
        put(info, transform_descriptors=["zstd"]),
        put(info, payload_offset=77),
        put(info, length=87),
        lambda m: info(m).__dict__.pop("relative_path"),
        put(tensor, properties=None),
        put(lambda m: tensor(m).properties, dtype="float32"),
        put(lambda m: tensor(m).properties, dtype=torch.float64),
        put(tensor, size=(3, 3)),
        put(tensor, size=torch.Size([3])),
        put(tensor, size=torch.Size([2, 3])),
        put(tensor, chunks=()),
        lambda m: tensor(m).chunks.append(None),
        put(lambda m: tensor(m).chunks[0], offsets=torch.Size([1, 0]), sizes=torch.Size([1, 3])),
        put(lambda m: tensor(m).chunks[0], sizes=torch.Size([2, 4])),
        put(lambda m: tensor(m).chunks[0], sizes=torch.Size([2])),
        put(lambda m: tensor(m).chunks[0], sizes=None),
        lambda m: m.storage_data.pop(MetadataIndex("w", (2, 0))),
        lambda m: m.storage_data.pop(MetadataIndex("o")),
    ],
)
def test_contradictions(change: Change) -> None:
    metadata = small_metadata()
    check_metadata(metadata, WHERE)
    change(metadata)
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        check_metadata(metadata, WHERE)


def test_sizes_that_overflow_64_bits_are_computed_exactly() -> None:
    metadata = small_metadata()
    huge = torch.Size([2**40, 2**40])
    tensor(metadata).size = huge
    tensor(metadata).chunks = [ChunkStorageMetadata(torch.Size([0, 0]), huge)]
    with pytest.raises(CorruptCheckpointError, match=str(2**82)):
        check_metadata(metadata, WHERE)


def test_storage_of_another_plugin_is_named() -> None:
    metadata = small_metadata()
    metadata.storage_data[MetadataIndex("o")] = object()
    with pytest.raises(UnsupportedCheckpointError, match="Another storage plugin"):
        check_metadata(metadata, WHERE)


def test_the_payload_may_fill_the_item_to_its_last_byte() -> None:
    metadata = small_metadata()
    info(metadata).length = 64 + 2 * 3 * 4
    check_metadata(metadata, WHERE)
    assert copy.deepcopy(metadata) == metadata
