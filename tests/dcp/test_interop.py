"""What this package writes, torch's and fsspec's readers load; what their writers write, this package loads."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt import (
    AzureBlobReader,
    BlobLocation,
    CheckpointNotFoundError,
    TransferOptions,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.emulator import Azurite
from tests.support.containers import blob_names, download, upload
from tests.support.sharded import ShardPlanner
from tests.support.states import COPIED, Place, assert_same, fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]


def state(seed: int = 0) -> dict[str, Any]:
    """A state dict of many kinds, the same for the same seed; with another one, something to load into."""
    number = float(seed)
    return {
        "dtypes": {str(dtype): fill(torch.empty(3, 4, dtype=dtype), seed) for dtype in COPIED},
        "shapes": {str(shape): torch.full(shape, number) for shape in [(), (0,), (0, 3), (1,), (2, 3, 4)]},
        "large": fill(torch.empty(300, 400, dtype=torch.int32), seed),
        "strided": fill(torch.empty(30, 40, dtype=torch.int32), seed).t() if seed == 0 else torch.zeros(40, 30).int(),
        "list": [torch.full((5,), number), {"rate": number}, "text" * seed],
        "object": (seed, "x"),
    }


def assert_state(loaded: Any, saved: Any, where: str = "") -> None:
    if isinstance(saved, torch.Tensor):
        assert_same(loaded, saved, where)
    elif isinstance(saved, dict):
        assert loaded.keys() == saved.keys(), where
        for key, value in saved.items():
            assert_state(loaded[key], value, f"{where}/{key}")
    elif isinstance(saved, list):
        assert len(loaded) == len(saved), where
        for number, value in enumerate(saved):
            assert_state(loaded[number], value, f"{where}/{number}")
    else:
        assert loaded == saved, where


def abfs(place: Place, azurite: Azurite) -> tuple[str, dict[str, Any]]:
    """How fsspec names the place, and how it gets there."""
    location = BlobLocation.parse(place.url)
    # Two tests must not share a file system's cached listings.
    options = {"connection_string": azurite.connection_string, "skip_instance_cache": True}
    return f"abfs://{location.container}/{location.path}", options


# Ours, read by others


@pytest.mark.parametrize(
    "options", [None, TransferOptions(block_size=50_000, checksums=False)], ids=["", "many blocks"]
)
def test_a_copy_on_a_disk_is_torchs_own(place: Place, tmp_path: Path, options: TransferOptions | None) -> None:
    place.save(state(), options)
    loaded = state(seed=1)
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(download(place.url, tmp_path)))
    assert_state(loaded, state())


def test_torch_loads_a_shard_of_ours(place: Place, tmp_path: Path) -> None:
    place.save(state())
    shard = {"large": torch.zeros(75, 100, dtype=torch.int32)}
    planner = ShardPlanner({"large": (150, 300)})
    dcp.load(shard, storage_reader=dcp.FileSystemReader(download(place.url, tmp_path)), planner=planner)
    assert_same(shard["large"], state()["large"][150:225, 300:])


def test_fsspec_reads_ours_through_adlfs(place: Place, azurite: Azurite) -> None:
    place.save(state())
    url, options = abfs(place, azurite)
    loaded = state(seed=1)
    dcp.load(loaded, storage_reader=FsspecReader(url, **options))
    assert_state(loaded, state())


def test_torchs_converter_makes_a_torch_save_file(place: Place, tmp_path: Path) -> None:
    place.save(state())
    dcp_to_torch_save(download(place.url, tmp_path / "dcp"), tmp_path / "file.pt")
    assert_state(torch.load(tmp_path / "file.pt", weights_only=False), state())


# Others', read by us


WRITERS: dict[str, Callable[[Path], dcp.FileSystemWriter]] = {
    "a file per rank": dcp.FileSystemWriter,
    "four threads": lambda folder: dcp.FileSystemWriter(folder, thread_count=4),
    "a file per tensor": lambda folder: dcp.FileSystemWriter(folder, single_file_per_rank=False),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_torch_writes_is_loaded(place: Place, tmp_path: Path, writer: str) -> None:
    dcp.save(state(), storage_writer=WRITERS[writer](tmp_path))
    upload(tmp_path, place.url)
    loaded = state(seed=1)
    place.load(loaded)
    assert_state(loaded, state())
    # With room for one item at a time.
    loaded = state(seed=1)
    place.load(loaded, TransferOptions(memory_budget=1 << 20))
    assert_state(loaded, state())


def test_a_shard_of_what_torch_writes(place: Place, tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path))
    upload(tmp_path, place.url)
    shard = {"large": torch.zeros(75, 100, dtype=torch.int32)}
    place.load(shard, planner=ShardPlanner({"large": (150, 300)}))
    assert_same(shard["large"], state()["large"][150:225, 300:])


def test_what_fsspec_writes_through_adlfs_is_loaded(place: Place, azurite: Azurite) -> None:
    url, options = abfs(place, azurite)
    dcp.save(state(), storage_writer=FsspecWriter(url, **options))
    loaded = state(seed=1)
    place.load(loaded)
    assert_state(loaded, state())


def test_a_converted_torch_save_file_is_loaded(place: Place, tmp_path: Path) -> None:
    saved = {"model": {"a": torch.randn(3, 4)}, "epoch": 3}
    torch.save(saved, tmp_path / "file.pt")
    torch_save_to_dcp(tmp_path / "file.pt", tmp_path / "dcp")
    upload(tmp_path / "dcp", place.url)
    loaded = {"model": {"a": torch.zeros(3, 4)}, "epoch": 0}
    place.load(loaded)
    assert_state(loaded, saved)


def test_a_checkpoint_of_ours_replaces_one_of_torchs(place: Place, tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=2))
    upload(tmp_path, place.url)
    place.save({"x": torch.arange(3)})
    assert sorted(name.rpartition("/")[2] for name in blob_names(place.url)) == [".metadata", "__0_0.distcp"]
    loaded = {"x": torch.zeros(3, dtype=torch.int64)}
    place.load(loaded)
    assert loaded["x"].tolist() == [0, 1, 2]


def test_metadata_of_an_older_torch(place: Place, tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path))
    metadata: Metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    # torch 2.3 knew nothing of these: its pickles do not have them.
    for newer in ("storage_meta", "version"):
        del metadata.__dict__[newer]
    for info in metadata.storage_data.values():
        info.__dict__.pop("transform_descriptors", None)
    metadata_of_old = pickle.dumps(metadata)
    assert b"storage_meta" not in metadata_of_old and b"transform_descriptors" not in metadata_of_old
    (tmp_path / ".metadata").write_bytes(metadata_of_old)
    upload(tmp_path, place.url)
    loaded = state(seed=1)
    place.load(loaded)
    assert_state(loaded, state())


# Others', and not for us


class Inverted(StreamTransformExtension):
    """A transform that users bring themselves; torch has a registry, but nothing of a checkpoint tells where it is."""

    @staticmethod
    def registry_name() -> str:
        return "stream.inverted"

    @staticmethod
    def from_descriptor(version: str) -> Inverted:
        return Inverted()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return _Inverting(output)  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        raise NotImplementedError


class _Inverting:
    def __init__(self, output: IO[bytes]) -> None:
        self._output = output

    def write(self, data: Any) -> int:
        return self._output.write(bytes(byte ^ 255 for byte in bytes(data)))

    def flush(self) -> None:
        self._output.flush()

    def close(self) -> None:
        pass


def test_an_unknown_transform_is_named(place: Place, tmp_path: Path) -> None:
    dcp.save({"weight": torch.arange(3)}, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[Inverted()]))
    upload(tmp_path, place.url)
    with pytest.raises(CheckpointException) as raised:
        place.load({"weight": torch.zeros(3, dtype=torch.int64)})
    error = raised.value.failures[0][0]
    assert isinstance(error, UnsupportedCheckpointError)
    assert "stream.inverted/1" in str(error) and "'weight'" in str(error)


def test_safetensors_shards_are_no_checkpoint_and_the_error_shows_them(place: Place, tmp_path: Path) -> None:
    weights = {"a": torch.arange(3.0), "b": torch.arange(4.0)}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), fqn_to_index_mapping={"a": 1, "b": 2})
    dcp.save(dict(weights), storage_writer=writer)
    upload(tmp_path, place.url)
    with pytest.raises(CheckpointException) as raised:
        place.load({"a": torch.zeros(3)})
    error = raised.value.failures[0][0]
    assert isinstance(error, CheckpointNotFoundError)
    assert place.url in str(error) and ".safetensors" in str(error)


def test_a_torch_save_file_is_no_checkpoint(place: Place, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    upload(tmp_path, place.url)
    with pytest.raises(CheckpointNotFoundError, match=r"weights\.pt"):
        AzureBlobReader(place.url, credential=place.key).read_metadata()
    with pytest.raises(CheckpointNotFoundError):
        AzureBlobReader(place.url + "/weights.pt", credential=place.key).read_metadata()
