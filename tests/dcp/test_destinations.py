"""A checkpoint is loaded into whatever tensors the state dict has, and into no others. One process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from azure_torch_ckpt import TransferOptions
from tests.support.states import Place, assert_same, cleared, fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:.*_get_pg_default_device"),
    pytest.mark.filterwarnings("ignore:Multiple backends are registered"),
]


class Labelled(torch.Tensor):
    """A subclass as user code has them."""


def destinations() -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the shape (6, 8) that lie in every way."""
    yield "contiguous", torch.zeros(6, 8)
    yield "transposed", torch.zeros(8, 6).t()
    yield "rows of another", torch.zeros(10, 8)[2:8]
    yield "columns of another", torch.zeros(6, 20)[:, 3:11]
    yield "every other column", torch.zeros(6, 16)[:, ::2]
    yield "channels last", torch.zeros(1, 6, 8, 1).to(memory_format=torch.channels_last)[0, :, :, 0]
    yield "leaf", torch.zeros(6, 8, requires_grad=True)
    yield "graph", torch.zeros(6, 8, requires_grad=True) * 1
    yield "strided graph", (torch.zeros(8, 6, requires_grad=True) * 1).t()
    yield "parameter", torch.nn.Parameter(torch.zeros(6, 8))
    yield "subclass", torch.zeros(6, 8).as_subclass(Labelled)
    yield "negative", torch.zeros(6, 8, dtype=torch.complex64).conj().imag
    with torch.inference_mode():
        contiguous, transposed = torch.zeros(6, 8), torch.zeros(8, 6).t()
    yield "inference", contiguous
    yield "strided inference", transposed


@pytest.mark.parametrize("inference", [False, True], ids=["", "in inference mode"])
def test_any_kind_of_destination(place: Place, inference: bool) -> None:
    saved = fill(torch.empty(6, 8)).nan_to_num_()
    state = dict(destinations())
    place.save(dict.fromkeys(state, saved))
    before = {key: (id(value), value.data_ptr(), value.stride()) for key, value in state.items()}
    with torch.inference_mode(inference):
        place.load(state)
    for key, value in state.items():
        assert_same(value.clone(), saved, key)
        assert before[key] == (id(value), value.data_ptr(), value.stride()), key
    assert state["leaf"].requires_grad and state["leaf"].is_leaf and state["graph"].grad_fn is not None


def test_nothing_beside_a_destination_is_touched(place: Place) -> None:
    place.save({"rows": torch.ones(4, 8), "columns": torch.ones(4, 8)})
    around = {"rows": torch.zeros(8, 8), "columns": torch.zeros(8, 16)}
    place.load({"rows": around["rows"][2:6], "columns": around["columns"][::2, ::2]})
    assert int(around["rows"].sum()) == int(around["columns"].sum()) == 32
    assert bool((around["rows"][2:6] == 1).all()) and bool((around["columns"][::2, ::2] == 1).all())


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float64, torch.int32),
        (torch.int64, torch.uint8),
        (torch.float32, torch.complex64),
        (torch.float32, torch.bool),
    ],
    ids=str,
)
def test_another_dtype_is_cast_as_copy_does(place: Place, saved: torch.dtype, wanted: torch.dtype) -> None:
    values = (torch.arange(24).reshape(4, 6) * 1.37 - 3).to(saved)
    place.save({"contiguous": values, "strided": values})
    state = {"contiguous": torch.empty(4, 6, dtype=wanted), "strided": torch.empty(6, 4, dtype=wanted).t()}
    place.load(state)
    expected = torch.empty(4, 6, dtype=wanted).copy_(values)
    for value in state.values():
        assert_same(value, expected)


def test_meta_tensors_are_materialised(place: Place) -> None:
    saved: dict[str, Any] = {"x": torch.randn(3, 4), "nested": {"y": torch.randn(5)}}
    place.save(saved)
    with torch.device("meta"):
        state: dict[str, Any] = {"x": torch.empty(3, 4), "nested": {"y": torch.empty(5)}}
    # torch asks the process group for the device to put them on.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        place.load(state)
    finally:
        dist.destroy_process_group()
    assert_same(state["x"], saved["x"])
    assert_same(state["nested"]["y"], saved["nested"]["y"])


@pytest.mark.parametrize("checksums", [True, False])
def test_modes_of_the_caller_do_not_matter(place: Place, checksums: bool) -> None:
    state: dict[str, Any] = {"x": torch.randn(3, 4), "strided": torch.randn(4, 3).t(), "number": 3}
    options = TransferOptions(checksums=checksums)
    loaded: dict[str, Any] = {**cleared({"x": state["x"], "strided": state["strided"]}), "number": 0}
    with torch.device("meta"), torch.no_grad():
        place.save(state, options)
        place.load(loaded, options)
    assert_same(loaded["x"], state["x"])
    assert_same(loaded["strided"], state["strided"])
    assert loaded["number"] == 3


def nested() -> dict[str, Any]:
    return {
        "model": {"a": torch.arange(4.0), "b": torch.arange(6).reshape(2, 3)},
        "optimizer": {"state": {"a": {"step": torch.tensor(3.0)}}, "rate": 0.1},
        "epoch": 5,
    }


def test_everything_or_some_keys_without_knowing_them(place: Place) -> None:
    place.save(nested())
    assert str(_load_state_dict_from_keys(storage_reader=place.reader())) == str(nested())
    loaded = _load_state_dict_from_keys({"model.b", "epoch"}, storage_reader=place.reader())
    assert str(loaded) == str({"model": {"b": nested()["model"]["b"]}, "epoch": 5})
    assert str(_load_state_dict_from_keys("optimizer", storage_reader=place.reader())) == str(
        {"optimizer": nested()["optimizer"]}
    )


def test_a_part_of_the_state_dict(place: Place) -> None:
    place.save(nested())
    loaded = {"model": {"b": torch.zeros(2, 3, dtype=torch.int64)}}
    place.load(loaded)
    assert_same(loaded["model"]["b"], nested()["model"]["b"])
