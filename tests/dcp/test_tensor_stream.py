"""A stream of tensors says what happened to a checkpoint that changes after it was opened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AzureBlobWriter, CheckpointReplacedError, CorruptCheckpointError
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.dcp.open_checkpoint import OpenCheckpoint, open_checkpoint
from azure_torch_ckpt.dcp.tensor_stream import object_bytes, stored_tensors, stream_chunks
from tests.support.containers import KEY, data_blobs, store_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def save(url: str) -> None:
    dcp.save({"w": torch.ones(300), "step": 1}, storage_writer=AzureBlobWriter(url, credential=KEY))


def read(checkpoint: OpenCheckpoint) -> None:
    list(stream_chunks(checkpoint, stored_tensors(checkpoint).items(), 512))


def read_objects(checkpoint: OpenCheckpoint) -> None:
    list(object_bytes(checkpoint, ["step"], 512))


@pytest.mark.parametrize("reads", [read, read_objects])
def test_a_checkpoint_that_was_replaced_or_damaged_meanwhile(
    container: str, reads: Callable[[OpenCheckpoint], None]
) -> None:
    url = f"{container}/run"
    save(url)
    checkpoint = open_checkpoint(url, Access(KEY))
    reads(checkpoint)
    save(url)
    with pytest.raises(CheckpointReplacedError, match="was replaced or removed"):
        reads(checkpoint)
    checkpoint = open_checkpoint(url, Access(KEY))
    (data,) = data_blobs(url)
    store_of(url).delete(f"run/{data}")
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        reads(checkpoint)
