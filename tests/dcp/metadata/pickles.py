"""Metadata of real saves, small metadata made by hand, pickles written opcode by opcode, and the results of loads."""

from __future__ import annotations

import pathlib
import pickle
import struct
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
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

from azure_torch_ckpt.dcp.metadata.schema import load_metadata, storage_info
from azure_torch_ckpt.dcp.metadata.unpickler import HANDLERS, MetadataUnpickler
from azure_torch_ckpt.errors import AzureCheckpointError
from tests.support.deep_equality import assert_alike

WHERE = "container/run/.metadata"
CHECKPOINT = "torch.distributed.checkpoint"


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


def saved_by_torch(directory: pathlib.Path, state: dict[str, Any] | None = None, **writer: Any) -> bytes:
    save(state or one_process_state(), storage_writer=FileSystemWriter(directory, **writer), no_dist=True)
    return (directory / ".metadata").read_bytes()


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


def result(data: bytes, *, fast: bool) -> tuple[str, Any]:
    """The object that a load makes with all that the pickle's memo holds, or the error."""
    machine = MetadataUnpickler(data, WHERE, fast=fast)
    try:
        return "read", (machine.run(), machine.memo)
    except AzureCheckpointError as error:
        return type(error).__name__, str(error)


def assert_fast_path_changes_nothing(data: bytes) -> None:
    """A load makes the same with the fast path as opcode by opcode."""
    quick, slow = result(data, fast=True), result(data, fast=False)
    assert quick[0] == slow[0], (quick, slow)
    assert_alike(quick[1], slow[1])


def states_set_one_by_one(data: bytes) -> int:
    """Of how many instances in `data` the fast path leaves the state to the machine."""
    count = 0
    build = HANDLERS[pickle.BUILD[0]]

    def counting(machine: MetadataUnpickler, pos: int) -> int:
        nonlocal count
        count += 1
        return build(machine, pos)

    with mock.patch.dict(HANDLERS, {pickle.BUILD[0]: counting}):
        load_metadata(data, WHERE)
    return count


# Pickles by hand: a program is opcodes between PROTO and STOP.


def program(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def call(module: str, name: str, *args: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(args) + b"t" + b"R"


def damaged(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """`data` after changes of a kind (flip, add, delete, insert, repeat, cut) at a spot."""
    changed = bytearray(data)
    for kind, spot, how in changes:
        spot %= len(changed)
        if kind == "flip":
            changed[spot] = how
        elif kind == "add":
            changed[spot] = (changed[spot] + how) % 256
        elif kind == "delete":
            del changed[spot : spot + how]
        elif kind == "insert":
            changed[spot:spot] = how
        elif kind == "repeat":
            changed[spot:spot] = changed[spot : spot + how]
        else:
            del changed[spot:]
        changed = changed or bytearray(b".")
    return bytes(changed)
