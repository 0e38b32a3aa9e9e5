"""Tensors of the state dict that share memory: what stays is what torch's own reader would leave, every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    AzureBlobHuggingFaceReader,
    AzureBlobHuggingFaceWriter,
    AzureBlobReader,
    AzureBlobWriter,
    CheckpointError,
    TransferOptions,
)
from azure_torch_ckpt.dcp.tensors.overlaps import find_overlaps
from tests.support.containers import KEY, upload
from tests.support.faults import Call, Exchange, Gate, Hold
from tests.support.proxy import FaultProxy
from tests.support.states import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

# Many requests in flight, in whatever order they are answered.
SMALL = TransferOptions(block_size=4096, concurrency=8, memory_budget=1024 * 1024)
ROWS, COLUMNS = 120, 50

_State = dict[str, torch.Tensor]
_Targets = Callable[[], tuple[torch.Tensor, _State]]


def tied() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(ROWS, COLUMNS)
    return memory, {"a": memory, "b": memory, "c": memory}


def tied_and_cast() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    return memory, {"a": memory, "b": memory}


def rows_that_overlap() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(2 * ROWS, COLUMNS)
    return memory, {"a": memory[:ROWS], "b": memory[ROWS // 2 :][:ROWS], "c": memory[ROWS:]}


def columns_that_overlap() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(ROWS, 2 * COLUMNS)
    return memory, {"a": memory[:, :COLUMNS], "b": memory[:, 20 : COLUMNS + 20], "c": memory[:, COLUMNS:]}


def columns_beside_one_another() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(ROWS, 3 * COLUMNS)
    return memory, {name: part for name, part in zip("abc", memory.split(COLUMNS, dim=1), strict=True)}


def interleaved() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(ROWS, 2 * COLUMNS)
    return memory, {"a": memory[:, ::2], "b": memory[:, 1::2], "c": memory[:, COLUMNS:]}


def transposed() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(ROWS, ROWS)
    return memory, {"a": memory[:, :COLUMNS], "b": memory.t()[:, :COLUMNS]}


def other_dtypes() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(ROWS, COLUMNS)
    return memory, {"a": memory, "b": memory.view(torch.int32), "c": memory.view(torch.bfloat16)[:, 30 : 30 + COLUMNS]}


def unfolded() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(ROWS + COLUMNS)
    return memory, {"a": memory.unfold(0, COLUMNS, 1)[:ROWS]}


def too_large_to_stage() -> tuple[torch.Tensor, _State]:
    memory = torch.zeros(600, 700)
    return memory, {"large": memory[:500, :600], "after": memory[100:][:500, 50:650]}


ALL = [
    tied,
    tied_and_cast,
    rows_that_overlap,
    columns_that_overlap,
    columns_beside_one_another,
    interleaved,
    transposed,
    other_dtypes,
    unfolded,
    too_large_to_stage,
]


def saved(targets: _State) -> _State:
    """Values that differ in every element, and from key to key."""
    return {
        key: (torch.arange(tensor.numel(), dtype=torch.float32) + 10_000 * number).reshape(tensor.shape)
        for number, (key, tensor) in enumerate(sorted(targets.items()), start=1)
    }


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("layout", ["dcp", "hf", "torch's"])
def test_what_stays_is_what_torch_leaves(container: str, tmp_path: Path, layout: str, make: _Targets) -> None:
    values = saved(make()[1])
    dcp.save(values, storage_writer=dcp.FileSystemWriter(tmp_path))
    wanted, targets = make()
    dcp.load(targets, storage_reader=dcp.FileSystemReader(tmp_path))

    url = f"{container}/run"
    reader: AzureBlobReader
    if layout == "torch's":
        upload(tmp_path, url)
    else:
        writer = (AzureBlobWriter if layout == "dcp" else AzureBlobHuggingFaceWriter)(url, credential=KEY)
        dcp.save(values, storage_writer=writer)
    reader = (AzureBlobHuggingFaceReader if layout == "hf" else AzureBlobReader)(url, credential=KEY, options=SMALL)
    for _ in range(3):
        memory, targets = make()
        dcp.load(targets, storage_reader=reader)
        assert_same(memory, wanted)


@pytest.mark.parametrize("overlap", ["tied", "cast", "rows"])
@pytest.mark.parametrize("layout", ["dcp", "hf"])
def test_what_arrives_last_need_not_stay(
    container: str, proxied_container: str, proxy: FaultProxy, layout: str, overlap: str
) -> None:
    """The first key's bytes come when the last one's are there."""
    writer = (AzureBlobWriter if layout == "dcp" else AzureBlobHuggingFaceWriter)(f"{container}/run", credential=KEY)
    dcp.save({"a": torch.full((500, 100), 1.0), "b": torch.full((500, 100), 2.0)}, storage_writer=writer)
    # A request for each.
    options = TransferOptions(block_size=256 * 1024)
    kind = AzureBlobReader if layout == "dcp" else AzureBlobHuggingFaceReader
    reader = kind(f"{proxied_container}/run", credential=KEY, options=options)
    offsets = {index.fqn: info.offset for index, info in reader.read_metadata().storage_data.items()}
    gate = Gate()

    def fetches(key: str) -> Callable[[Exchange], bool]:
        start = f"bytes={offsets[key]}-"
        return lambda request: (
            request.headers.get("x-ms-range", "").startswith(start) and not request.path.endswith(".metadata")
        )

    proxy.when(fetches("a")).do(Hold(gate))
    proxy.when(fetches("b")).do(Call(gate.open, "answer"))
    memory = torch.zeros(700, 100, dtype=torch.bfloat16 if overlap == "cast" else torch.float32)
    dcp.load({"a": memory[200:] if overlap == "rows" else memory[:500], "b": memory[:500]}, storage_reader=reader)
    assert memory[:500].unique().tolist() == [2]
    assert memory[500:].unique().tolist() == [1.0 if overlap == "rows" else 0.0]


def test_tied_weights_are_fetched_once(container: str, proxied_container: str, proxy: FaultProxy) -> None:
    state = {key: torch.full((200, 1000), float(value)) for value, key in enumerate("abc")}
    dcp.save(state, storage_writer=AzureBlobWriter(f"{container}/run", credential=KEY))
    weight = torch.zeros(200, 1000)
    reader = AzureBlobReader(f"{proxied_container}/run", credential=KEY, options=SMALL)
    dcp.load(dict.fromkeys("abc", weight), storage_reader=reader)
    assert weight.unique().tolist() == [2]
    assert proxy.count("Get Blob") < 1.1 * weight.nbytes / 4096


@pytest.mark.parametrize("layout", ["dcp", "hf"])
def test_an_expanded_target_is_refused_before_anything_is_changed(container: str, layout: str) -> None:
    url = f"{container}/run"
    values = {"a": torch.ones(4, 6), "b": torch.ones(4, 6)}
    writer = (AzureBlobWriter if layout == "dcp" else AzureBlobHuggingFaceWriter)(url, credential=KEY)
    dcp.save(values, storage_writer=writer)
    reader = (AzureBlobReader if layout == "dcp" else AzureBlobHuggingFaceReader)(url, credential=KEY)
    targets = {"a": torch.zeros(4, 6), "b": torch.zeros(4, 1).expand(4, 6)}
    with pytest.raises(CheckpointException) as caught:
        dcp.load(targets, storage_reader=reader)
    error = caught.value.failures[0][0]
    assert isinstance(error, CheckpointError)
    assert "'b'" in str(error) and "expanded" in str(error) and "clone()" in str(error)
    assert not any(tensor.any() for tensor in targets.values())


def test_the_parts_of_one_target_share_nothing(container: str) -> None:
    """torch plans one for each stored chunk."""
    parts = [part for tensor in (torch.zeros(64, 64), torch.zeros(64, 64)) for part in tensor.split(8, dim=1)]
    found = find_overlaps(parts)
    assert not found.shared and not found.hidden


class Opaque(torch.Tensor):
    """A wrapper around another tensor, with no memory that it would tell of."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError


def test_what_cannot_be_asked_may_share_memory_with_anything() -> None:
    inner = torch.zeros(3)
    assert find_overlaps([Opaque(inner), inner, None, torch.zeros(0)]).shared == {0}


# Against a search of every element


@st.composite
def views(draw: st.DrawFn) -> list[torch.Tensor]:
    """Several views of one storage of 64 bytes, of any strides and two sizes of elements."""
    storage = torch.zeros(64, dtype=torch.uint8)
    made = []
    for _ in range(draw(st.integers(1, 5))):
        base = storage if draw(st.booleans()) else storage.view(torch.int16)
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        strides = [draw(st.integers(0 if size < 2 else 1, 12)) for size in shape]
        reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size > 0)
        room = base.numel() - reach - 1
        if room >= 0:
            made.append(base.as_strided(shape, strides, draw(st.integers(0, room))))
    return made


def addresses(tensor: torch.Tensor) -> list[int]:
    """Of all its bytes, element by element."""
    if tensor.numel() == 0:
        return []
    if tensor.dim() == 0:
        return [tensor.data_ptr() + byte for byte in range(tensor.element_size())]
    return [address for row in tensor for address in addresses(row)]


@given(views())
def test_every_overlap_is_found(targets: list[torch.Tensor]) -> None:
    found = find_overlaps(targets)
    held = [addresses(target) for target in targets]
    for number, mine in enumerate(held):
        if number in found.hidden:
            assert any(set(later) == set(mine) for later in held[number + 1 :])
        elif number not in found.shared:
            assert len(set(mine)) == len(mine)
            others = [other for place, other in enumerate(held) if place != number and place not in found.hidden]
            assert all(set(mine).isdisjoint(other) for other in others)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_boxes_of_one_tensor_share_nothing(rows: int, columns: int, high: int, wide: int, turned: bool) -> None:
    tensor = torch.zeros(rows * high, columns * wide)
    parts = [part for band in tensor.split(high) for part in band.split(wide, dim=1)]
    found = find_overlaps([part.t() if turned else part for part in parts])
    assert not found.shared and not found.hidden
