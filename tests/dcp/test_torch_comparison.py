"""What the README says about torch's own writer and reader, and the same for ours.

torch's ``FsspecWriter`` (with adlfs, for a blob URL) inherits all of this from ``FileSystemWriter``. If a newer torch
mends one of these, its test fails, and the README's table loses a row.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, BlobLocation, UnsafeMetadataError
from azure_torch_ckpt.blobs.store import BlobStore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


class FailingPlanner(dcp.DefaultSavePlanner):
    """Cannot resolve the tensors named by `failing`."""

    def __init__(self, *failing: str) -> None:
        super().__init__()
        self._failing = failing

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.index.fqn in self._failing:
            raise OSError("disk or device gone")
        return super().resolve_data(write_item)


class FailsInHelpers(dcp.DefaultSavePlanner):
    """Cannot resolve what another thread than its maker's asks for. Its maker's waits until another one has asked."""

    def __init__(self) -> None:
        super().__init__()
        self._own = threading.current_thread()
        self._has_failed = threading.Event()

    def resolve_data(self, write_item: WriteItem) -> Any:
        if threading.current_thread() is self._own:
            assert self._has_failed.wait(60)
            return super().resolve_data(write_item)
        self._has_failed.set()
        raise OSError("disk or device gone")


def values(value: float) -> dict[str, Any]:
    return {f"t{number}": torch.full((4,), value) for number in range(8)}


def load(reader: StorageReader) -> dict[str, Any]:
    state = values(0.0)
    dcp.load(state, storage_reader=reader)
    return state


def failed_save(writer: StorageWriter, planner: dcp.DefaultSavePlanner, state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointException):
        dcp.save(state, storage_writer=writer, planner=planner)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_torch_writer_reports_success_though_a_thread_failed(tmp_path: Path) -> None:
    # Of four threads the fourth is the caller's own.
    writer = dcp.FileSystemWriter(tmp_path, thread_count=4)
    metadata: Metadata = dcp.save(values(1.0), storage_writer=writer, planner=FailsInHelpers())
    assert len(metadata.storage_data) < 8


def test_our_writer_reports_what_failed(container: str) -> None:
    for number in range(8):
        url = f"{container}/{number}"
        failed_save(AzureBlobWriter(url), FailingPlanner(f"t{number}"), values(1.0))
        assert not list(BlobStore(BlobLocation.parse(url)).list(f"{number}/"))


class FailingFileSystem(FileSystem):
    """Opens so many files for writing, and no more."""

    def __init__(self, files: int) -> None:
        self._left = files

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if "w" in mode:
            self._left -= 1
            if self._left < 0:
                raise OSError("the process dies here")
        with super().create_stream(path, mode) as stream:
            yield stream


def test_torch_writer_leaves_a_mixture_when_an_overwrite_is_cut_short(tmp_path: Path) -> None:
    def writer() -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(tmp_path, single_file_per_rank=False)

    dcp.save(values(1.0), storage_writer=writer())
    dying = writer()
    dying.fs = FailingFileSystem(5)
    failed_save(dying, dcp.DefaultSavePlanner(), values(2.0))
    loaded = load(dcp.FileSystemReader(tmp_path))
    assert {tensor[0].item() for tensor in loaded.values()} == {1.0, 2.0}


def test_our_writer_leaves_the_old_checkpoint_when_an_overwrite_is_cut_short(container: str) -> None:
    dcp.save(values(1.0), storage_writer=AzureBlobWriter(f"{container}/last"))
    failed_save(AzureBlobWriter(f"{container}/last"), FailingPlanner("t5"), values(2.0))
    loaded = load(AzureBlobReader(f"{container}/last"))
    assert {tensor[0].item() for tensor in loaded.values()} == {1.0}


class Bomb:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


def test_torch_reader_runs_what_the_metadata_says(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointException):
        load(dcp.FileSystemReader(tmp_path))
    assert (tmp_path / "ran").exists()


def test_our_reader_runs_nothing(container: str, tmp_path: Path) -> None:
    location = BlobLocation.parse(f"{container}/bomb")
    BlobStore(location).put("bomb/.metadata", pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointException) as raised:
        load(AzureBlobReader(location))
    assert isinstance(raised.value.failures[0][0], UnsafeMetadataError)
    assert not (tmp_path / "ran").exists()
