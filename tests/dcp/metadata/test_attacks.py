"""A ``.metadata`` that was made to do harm, is damaged or something else is refused, and nothing of it is run."""

from __future__ import annotations

import builtins
import functools
import os
import pathlib
import pickle
import struct
import subprocess
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from azure_torch_ckpt._internal.torch_private import MemoryFormatEncoding
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, check_metadata, dump_metadata, load_metadata, stored_item
from azure_torch_ckpt.errors import AzureCheckpointError, CorruptCheckpointError, UnsafeMetadataError
from tests.dcp.metadata.pickles import (
    CHECKPOINT,
    WHERE,
    call,
    damaged,
    named,
    program,
    saved_by_torch,
    small_metadata,
    text,
)

METADATA = named(f"{CHECKPOINT}.metadata", "Metadata")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved_by_torch(tmp_path_factory.mktemp("real"), thread_count=3)


class Reduces:
    def __init__(self, *how: Any) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


def calls(function: Callable[..., Any], *args: Any) -> Reduces:
    return Reduces(function, args)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_data", "attribute"])
def test_nothing_is_run(tmp_path: pathlib.Path, protocol: int, place: str) -> None:
    marker = tmp_path / "was_here"
    attacks = [
        calls(os.system, f"touch {marker}"),
        calls(os.mkdir, str(marker)),
        calls(subprocess.Popen, ["touch", str(marker)]),
        calls(__import__, "os"),
        calls(getattr, Metadata, "__init__"),
        calls(builtins.eval, f"open({str(marker)!r}, 'w')"),
        calls(builtins.exec, f"open({str(marker)!r}, 'w')"),
        calls(builtins.open, str(marker), "w"),
        calls(functools.partial, os.mkdir, str(marker)),
        calls(torch.load, str(marker)),
        calls(torch.hub.load, "owner/repo", "model"),
        calls(getattr, pathlib.Path, "touch"),
        calls(getattr, MemoryFormatEncoding, "__class__", None),
        calls(OrderedDict, [("a", 1)]),
        calls(bytearray, 1 << 40),
        calls(FileSystemReader, str(marker)),
    ]
    # Classes that no load needs there. Protocol 2 gives Popen's module the name that it had in Python 2, "commands".
    inert = (bytearray, FileSystemReader, *((subprocess.Popen,) if protocol == 2 else ()))
    for attack in attacks:
        metadata: Any = small_metadata()
        if place == "planner_data":
            metadata.planner_data = {"a": attack}
        elif place == "attribute":
            metadata.hung = {"deep": [attack]}
        elif place == "storage_data":
            metadata.storage_data[MetadataIndex("x")] = attack
        data = pickle.dumps(attack if place == "whole" else metadata, protocol)
        if place == "attribute" and attack.how[0] in inert:
            assert "hung" not in vars(load_metadata(data, WHERE))
            continue
        with pytest.raises(UnsafeMetadataError):
            load_metadata(data, WHERE)
    assert not marker.exists()


class Runs:
    """Makes a file whatever is done to it while it is unpickled."""

    def __new__(cls, *args: Any) -> Runs:
        for path in args:
            pathlib.Path(path).write_text("was here")
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        self.marker = args

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.marker

    def __setstate__(self, state: dict[str, Any]) -> None:
        pathlib.Path(state["marker"]).write_text("was here")

    def append(self, item: Any) -> None:
        pathlib.Path(item).write_text("was here")

    def __setitem__(self, key: Any, value: Any) -> None:
        pathlib.Path(value).write_text("was here")


@pytest.mark.parametrize("place", ["attribute", "planner_data", "entry", "storage", "chunk", "whole", "version"])
def test_hostile_classes_do_nothing(tmp_path: pathlib.Path, place: str) -> None:
    marker = tmp_path / "was_here"
    for how in (
        (Runs, (str(marker),)),
        (Runs, (), {"marker": str(marker)}),
        (Runs, (), None, iter([str(marker)])),
        (Runs, (), None, None, iter([("key", str(marker))])),
        (),
    ):
        attack: Any = Reduces(*how)
        if not how:
            attack = object.__new__(Runs)
            attack.marker = (str(marker), str(marker))
        metadata: Any = small_metadata()
        if place == "attribute":
            metadata.hung = [attack, {"a": attack}]
        elif place == "planner_data":
            metadata.planner_data = {"w": ("w",), "x": [({"deep": attack},)]}
        elif place == "entry":
            metadata.state_dict_metadata["x"] = attack
        elif place == "storage":
            metadata.storage_data[MetadataIndex("o")] = attack
        elif place == "chunk":
            metadata.state_dict_metadata["w"].chunks.append(attack)
        elif place == "version":
            metadata.version = attack
        data = pickle.dumps(attack if place == "whole" else metadata)
        if place in ("attribute", "version"):
            loaded = load_metadata(data, WHERE)
            check_metadata(loaded, WHERE)
            assert "hung" not in vars(loaded) and loaded.version in ("1.0.0", None)
        else:
            with pytest.raises((UnsafeMetadataError, CorruptCheckpointError)):
                check_metadata(load_metadata(data, WHERE), WHERE)
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
            with pytest.raises(UnsafeMetadataError, match="is not part"):
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


TRAINER = named("trainer.plans", "Plan")


@pytest.mark.parametrize(
    "opcodes",
    [
        TRAINER + b"}" + text("x") + b"K\x01sb",  # an attribute of a class
        TRAINER + b")R)R",  # an instance is called
        TRAINER + b")\x81)\x81",
        named("trainer.plans", "make_plan"),
        named("trainer.plans", "Plan.make"),
        named("trainer.plans", "Plan\n"),
        named("os", "PathLike"),
        named("", "Plan"),
        call("builtins", "getattr", named("os", "PathLike"), text("x")),
    ],
)
def test_instructions_on_stand_ins_that_are_refused(opcodes: bytes) -> None:
    metadata = pickle.dumps(small_metadata())
    assert metadata.endswith(b"ub.")
    for data in (program(opcodes), metadata[:-3] + text("hung") + opcodes + b"ub."):
        with pytest.raises(UnsafeMetadataError):
            load_metadata(data, WHERE)


@pytest.mark.parametrize(
    "opcodes",
    [
        # A long tuple, a long integer and a long offset, hashed again and again.
        b"}(" + b"(" + b"K\x01" * 3000 + b"t\x94N" + b"h\x00N" * 50_000 + b"u",
        b"}(" + pickle.LONG4 + struct.pack("<i", 100_000) + b"\x01" * 100_000 + b"\x94N" + b"h\x00N" * 50_000 + b"u",
        # Attributes copied again and again.
        b"}(" + b"".join(text(f"{i}") + b"N" for i in range(900)) + b"u\x94" + (TRAINER + b")\x81h\x00b") * 900,
        b"}(" + b"".join(text(f"{i}") + b"N" for i in range(2000)) + text("offsets") + b"N" + text("sizes") + b"Nu\x94"
        + (TRAINER + b")\x81h\x00b") * 900,
        TRAINER + b"\x94" + b"h\x00)\x81" * 30_000,
        b"]" + TRAINER + b"\x85" * 50_000 + b"a",
    ],
)  # fmt: skip
def test_stand_ins_and_keys_cost_no_more_than_the_data(opcodes: bytes) -> None:
    """Without a bound, some of these would take hours."""
    with pytest.raises(AzureCheckpointError):
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


@settings(max_examples=600, deadline=60_000)
@given(edits)
def test_damaged_metadata_is_read_or_refused_and_nothing_else(changes: list[tuple[str, int, Any]]) -> None:
    data = damaged(small, changes)
    tracemalloc.start()
    try:
        metadata = load_metadata(data, WHERE)
        assert isinstance(metadata, Metadata)
        check_metadata(metadata, WHERE)
        assert all(type(stored_item(info)) is StoredItem for info in metadata.storage_data.values())
    except AzureCheckpointError as error:
        assert WHERE in str(error) and len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=300, deadline=60_000)
@given(st.binary(max_size=200))
def test_garbage_is_refused(body: bytes) -> None:
    for data in (body, program(body)):
        with pytest.raises(AzureCheckpointError):
            load_metadata(data, WHERE)
