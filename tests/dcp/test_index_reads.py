"""Metadata that is too large for one request is read in part: the index, and what a rank needs of the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from azure_torch_ckpt import AzureBlobReader, BlobLocation, CheckpointReplacedError, CorruptCheckpointError
from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.dcp import metadata_blob
from azure_torch_ckpt.dcp.metadata import views
from azure_torch_ckpt.dcp.metadata.schema import dump_metadata
from azure_torch_ckpt.dcp.written_items import UploadedItem
from tests.dcp.metadata.index_parts import IndexParts
from tests.dcp.metadata.virtual_saves import VirtualSave, assert_same_metadata, finished, rows, write_item
from tests.support.containers import KEY, put, store_of
from tests.support.faults import Call, Flip
from tests.support.proxy import FaultProxy
from tests.support.sharded import ShardPlanner
from tests.support.states import assert_same, fill

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

RANKS, TENSORS, ROWS = 16, 24, 64  # 4 rows for each rank
FIRST = 256  # bytes of the first request, where the front has some 2,000


@pytest.fixture(autouse=True)
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is true of some hundred megabytes is true of some kilobytes then."""
    monkeypatch.setattr(metadata_blob, "_FIRST", FIRST)
    monkeypatch.setattr(views, "_NEAR", 16)


def state_of(version: int = 0) -> dict[str, torch.Tensor]:
    return {f"layers.{number}.w": fill(torch.empty(ROWS, 3), seed=100 * version + number) for number in range(TENSORS)}


def save(url: str, version: int = 0) -> tuple[VirtualSave, bytes]:
    """Save `state_of` as `RANKS` ranks would, sharded by rows; return what was saved, and the metadata's bytes."""
    state = state_of(version)
    entries = {name: rows(tensor.shape, RANKS) for name, tensor in state.items()}
    items: list[list[UploadedItem]] = [[] for _ in range(RANKS)]
    for rank in range(RANKS):
        blob = b""
        for name, entry in entries.items():
            chunk = entry.chunks[rank]
            values = state[name][chunk.offsets[0] :][: chunk.sizes[0]]
            data = bytes(values.contiguous().view(torch.uint8).flatten().tolist())
            items[rank].append(UploadedItem(write_item(name, entry, rank), len(blob), len(data), 0, crc64(data)))
            blob += data
        put(url, BlobLocation.parse(url).join(f"save-id/__{rank}_0.distcp").path, blob)
    made = finished(entries, items)
    data = made.dump()
    put_metadata(url, data)
    return made, data


def put_metadata(url: str, data: bytes) -> None:
    put(url, BlobLocation.parse(url).join(".metadata").path, data)


def ranges(proxy: FaultProxy) -> list[tuple[int, int]]:
    """Beginnings and ends of what was requested of `.metadata`."""
    found = []
    for request in proxy.requests("Get Blob"):
        if request.path.endswith("/.metadata"):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["x-ms-range"]).groups()  # type: ignore[union-attr]
            found.append((int(first), int(last) + 1))
    return found


def load(url: str, first: int, count: int, version: int = 0) -> None:
    """Load some rows of every tensor."""
    state = {name: torch.zeros(count, 3) for name in state_of()}
    planner = ShardPlanner({name: (first, 0) for name in state})
    dcp.load(state, storage_reader=AzureBlobReader(url, credential=KEY), planner=planner)
    for name, value in state_of(version).items():
        assert_same(state[name], value[first : first + count], name)


def spans(data: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Where the front ends, and where the section of each rank lies."""
    parts = IndexParts.of(data)
    end = start = len(data) - len(parts.rest) - sum(map(len, sum(parts.sections, ())))
    found = []
    for section, order in parts.sections:
        found.append((end, end + len(section) + len(order)))
        end = found[-1][1]
    return start - 9, found


@pytest.mark.parametrize(
    ("first", "count", "wanted"),
    [
        (20, 4, [5]),
        (0, 4, [0]),
        (60, 4, [15]),
        (22, 4, [5, 6]),
        (0, 64, range(RANKS)),
    ],
)
def test_a_rank_reads_what_it_needs(proxy: FaultProxy, container: str, first: int, count: int, wanted: Any) -> None:
    _, data = save(f"{container}/run")
    load(proxy.through(f"{container}/run"), first, count)
    end, sections = spans(data)
    assert FIRST < end < sections[0][0] < len(data)
    assert ranges(proxy) == [(0, FIRST), (FIRST, end), (sections[wanted[0]][0], sections[wanted[-1]][1])]


def test_sections_that_lie_apart_are_read_at_once(proxy: FaultProxy, container: str) -> None:
    save_, data = save(f"{container}/run")
    metadata = AzureBlobReader(proxy.through(f"{container}/run"), credential=KEY).read_metadata()
    end, sections = spans(data)
    assert ranges(proxy) == [(0, FIRST), (FIRST, end)]
    keys = {rank: MetadataIndex("layers.3.w", (4 * rank, 0)) for rank in (2, 9, 10, 15)}
    number_of = metadata.storage_data.number_of
    found = metadata.storage_data.fetch([number_of(key) for key in keys.values()])
    assert [item.relative_path for item in found] == [f"save-id/__{rank}_0.distcp" for rank in keys]
    apart = {sections[2], (sections[9][0], sections[10][1]), sections[15]}
    assert set(ranges(proxy)[2:]) == apart and len(ranges(proxy)) == 5
    # What was read is not read again.
    for key in keys.values():
        assert metadata.storage_data[key] == save_.made.storage_data[key]
    assert metadata.storage_data[MetadataIndex("layers.4.w", (8, 0))].length == 48
    assert len(ranges(proxy)) == 5
    assert_same_metadata(metadata, with_load_id(metadata, save_.made))


def with_load_id(metadata: Metadata, made: Metadata) -> Metadata:
    """Each tensor is shown as one chunk to torch's planners; see `views.whole_tensors`."""
    assert made.storage_meta is not None and metadata.storage_meta is not None
    made.storage_meta.load_id = metadata.storage_meta.load_id
    for name, entry in made.state_dict_metadata.items():
        shown = metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata) and isinstance(shown, TensorStorageMetadata)
        assert shown.chunks == [ChunkStorageMetadata(torch.Size([0, 0]), entry.size)]
        made.state_dict_metadata[name] = shown
    return made


def test_a_small_checkpoint_is_one_request(proxy: FaultProxy, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_blob, "_FIRST", 1 << 20)
    save(f"{container}/run")
    load(proxy.through(f"{container}/run"), 20, 4)
    assert [first for first, _ in ranges(proxy)] == [0]


def test_metadata_without_an_index_is_read_whole(proxy: FaultProxy, container: str) -> None:
    made, _ = save(f"{container}/run")
    data = dump_metadata(made.made)
    put_metadata(f"{container}/run", data)
    load(proxy.through(f"{container}/run"), 22, 4)
    assert ranges(proxy) == [(0, FIRST), (FIRST, len(data))]


# Replaced meanwhile


def replace(url: str) -> Callable[[], object]:
    return lambda: save(url, version=1)


def of_metadata(number: int) -> Callable[[Any], bool]:
    seen = iter(range(1 << 30))

    def matches(exchange: Any) -> bool:
        return exchange.kind == "Get Blob" and exchange.path.endswith("/.metadata") and next(seen) == number

    return matches


def test_replaced_within_the_front(proxy: FaultProxy, container: str) -> None:
    """The reader begins again, and gets all of the new one."""
    save(f"{container}/run")
    proxy.when(of_metadata(1)).do(Call(replace(f"{container}/run"), "request"))
    load(proxy.through(f"{container}/run"), 22, 4, version=1)
    assert [first for first, _ in ranges(proxy)][:4] == [0, FIRST, 0, FIRST]


def test_replaced_again_and_again_within_the_front(proxy: FaultProxy, container: str) -> None:
    url = f"{container}/run"
    _, data = save(url)
    proxy.when(lambda exchange: exchange.headers.get("x-ms-range", "").startswith(f"bytes={FIRST}-"), times=None).do(
        Call(lambda: put_metadata(url, data), "request")
    )
    with pytest.raises(CheckpointReplacedError, match="Load again"):
        AzureBlobReader(proxy.through(url), credential=KEY).read_metadata()
    assert len(ranges(proxy)) == 10


def test_replaced_between_the_front_and_a_section(proxy: FaultProxy, container: str) -> None:
    save(f"{container}/run")
    proxy.when(of_metadata(2)).do(Call(replace(f"{container}/run"), "request"))
    with pytest.raises(dcp.CheckpointException) as raised:
        load(proxy.through(f"{container}/run"), 22, 4)
    (error,) = [error for error, _ in raised.value.failures.values()]
    assert isinstance(error, CheckpointReplacedError)


def test_removed_between_the_front_and_a_section(proxy: FaultProxy, container: str) -> None:
    url = f"{container}/run"
    save(url)
    reader = AzureBlobReader(proxy.through(url), credential=KEY)
    metadata = reader.read_metadata()
    store_of(url).delete(BlobLocation.parse(url).join(".metadata").path)
    with pytest.raises(CheckpointReplacedError):
        dict(metadata.storage_data)


# Damaged


def test_a_section_that_is_damaged(container: str) -> None:
    url = f"{container}/run"
    _, data = save(url)
    _, sections = spans(data)
    damaged = bytearray(data)
    damaged[sections[5][0] + 20] ^= 1
    put_metadata(url, bytes(damaged))
    load(url, 0, 4)
    with pytest.raises(dcp.CheckpointException) as raised:
        load(url, 20, 4)
    (error,) = [error for error, _ in raised.value.failures.values()]
    assert isinstance(error, CorruptCheckpointError)
    assert "/run/.metadata" in str(error) and "save-id/__5_0.distcp" in str(error)


def test_a_section_that_is_damaged_on_its_way(proxy: FaultProxy, container: str) -> None:
    url = f"{container}/run"
    save(url)
    proxy.when(of_metadata(2)).do(Flip(20))
    metadata = AzureBlobReader(proxy.through(url), credential=KEY).read_metadata()
    key = MetadataIndex("layers.3.w", (20, 0))
    with pytest.raises(CorruptCheckpointError, match="Try again"):
        metadata.storage_data[key]
    assert metadata.storage_data[key].offset == 3 * 48  # and the next try is well


@pytest.mark.parametrize("where", ["first", "second"])
def test_a_front_that_is_damaged(proxy: FaultProxy, container: str, where: str) -> None:
    url = f"{container}/run"
    save(url)
    proxy.when(of_metadata(0 if where == "first" else 1)).do(Flip(100))
    with pytest.raises(CorruptCheckpointError, match="its index does not have the CRC64"):
        AzureBlobReader(proxy.through(url), credential=KEY).read_metadata()
