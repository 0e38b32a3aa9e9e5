"""Everything that a state dict can hold comes back bit for bit. One process, no process group."""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from azure_torch_ckpt import CheckpointError, CheckpointNotFoundError, TransferOptions, UnsupportedCheckpointError
from tests.support.states import DTYPES, Place, assert_same, cleared, fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support"),
]

SHAPES = [(), (0,), (0, 3), (3, 0), (1,), (3, 5), (2, 1, 4, 3)]


def round_trip(place: Place, state: dict[str, torch.Tensor], options: TransferOptions | None = None) -> None:
    place.save(state, options)
    loaded = cleared(state)
    place.load(loaded, options)
    for key, value in state.items():
        assert_same(loaded[key], value, key)


# Tensors


def test_every_dtype_and_shape(place: Place) -> None:
    assert len(DTYPES) > 20
    state = {f"{dtype} {shape}": fill(torch.empty(shape, dtype=dtype)) for dtype in DTYPES for shape in SHAPES}
    round_trip(place, state)


@pytest.mark.parametrize(
    ("dtype", "patterns"),
    [
        (torch.float64, [0x7FF0000000000001, 0x7FF8DEADBEEF0001, -1, -0x8000000000000000, 1, 0x7FF0000000000000]),
        (torch.float32, [0x7F800001, 0x7FC0BEEF, -1, -0x80000000, 1, -0x800000]),
        (torch.bfloat16, [0x7F81, 0x7FC1, -1, -0x8000, 1, 0x7F80]),
        (torch.float16, [0x7C01, 0x7E01, -1, -0x8000, 1, 0x7C00]),
    ],
    ids=str,
)
def test_nan_payloads_negative_zero_and_subnormals(place: Place, dtype: torch.dtype, patterns: list[int]) -> None:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    values = torch.tensor(patterns, dtype=integer)
    round_trip(place, {"contiguous": values.view(dtype), "strided": values.repeat(2, 1).t().view(dtype)})
    loaded = {"contiguous": torch.zeros(len(patterns), dtype=dtype)}
    place.load(loaded)
    assert loaded["contiguous"].view(integer).tolist() == patterns


def strided() -> dict[str, torch.Tensor]:
    whole = fill(torch.empty(64, 48))
    volume = fill(torch.empty(4, 6, 8, 10))
    return {
        "transposed": whole.t(),
        "row": whole[7],
        "column": whole[:, 7],
        "every third column": whole[:, ::3],
        "every other row": whole[::2],
        "block": whole[10:20, 30:40],
        "element": whole[3, 4],
        "diagonal": whole.diagonal(),
        "flipped": whole.flip(0, 1),
        "expanded": whole[0].expand(100, 48),
        "expanded scalar": torch.tensor(3.5).expand(7, 9),
        "overlapping": whole.flatten().unfold(0, 16, 4),
        "permuted": volume.permute(2, 0, 3, 1),
        "channels last": volume.to(memory_format=torch.channels_last),
        "empty slice": whole[:, 5:5],
        "size one": whole[:1, :1].expand(1, 1),
    }


def test_tensors_of_any_strides(place: Place) -> None:
    round_trip(place, strided())


def test_large_strided_tensors_are_written_in_pieces(place: Place) -> None:
    state = {"transposed": fill(torch.empty(1000, 700)).t(), "columns": fill(torch.empty(900, 800))[:, 1::2]}
    round_trip(place, state, TransferOptions(block_size=64 * 1024))


def test_of_a_view_only_the_view_is_written(place: Place) -> None:
    storage = fill(torch.empty(1 << 20, dtype=torch.uint8))
    state = {
        "head": storage[:1000],
        "tail": storage[-1000:],
        "strided": storage[:: 1 << 10],
        "subclass": storage[:1000].as_subclass(Labelled),
    }
    place.save(state)
    for key, value in state.items():
        assert value.nbytes < place.stored_bytes(key, 0) < value.nbytes + 4096, key


def test_conjugate_and_negative_views(place: Place) -> None:
    values = fill(torch.empty(3, 4, dtype=torch.complex64))
    state = {"conj": values.conj(), "neg": values.conj().imag, "transposed conj": values.mH}
    assert state["conj"].is_conj() and state["neg"].is_neg()
    round_trip(place, state)


def test_tensors_with_a_gradient(place: Place) -> None:
    leaf = torch.nn.Parameter(torch.randn(3, 4))
    state = {"leaf": leaf, "graph": leaf * 2, "buffer": torch.nn.Buffer(torch.randn(3)), "plain": leaf.detach()}
    round_trip(place, state)
    assert leaf.grad is None and leaf.requires_grad


def test_tensors_of_inference_mode(place: Place) -> None:
    with torch.inference_mode():
        state = {"contiguous": torch.randn(5), "strided": torch.randn(4, 5).t()}
    round_trip(place, state)
    with torch.inference_mode():
        round_trip(place, state)


class Labelled(torch.Tensor):
    """A subclass as user code has them."""


def test_a_subclass_comes_back_once_it_is_declared_safe(place: Place) -> None:
    saved = fill(torch.empty(5, 6)).as_subclass(Labelled)
    place.save({"x": saved})
    plain = {"x": torch.zeros(5, 6)}
    with pytest.raises(CheckpointException) as raised:
        place.load(plain)
    error = raised.value.failures[0][0]
    assert isinstance(error, UnsupportedCheckpointError) and "add_safe_globals" in str(error)
    with torch.serialization.safe_globals([Labelled]):
        labelled = {"x": torch.zeros(5, 6).as_subclass(Labelled)}
        place.load(plain)
        place.load(labelled)
    assert_same(plain["x"], saved)
    assert_same(labelled["x"], saved)
    assert type(labelled["x"]) is Labelled


def test_quantized_tensors(place: Place) -> None:
    # Of one scale: what is loaded in place keeps the destination's.
    saved = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 3, torch.qint8)
    loaded = {"x": torch.quantize_per_tensor(torch.zeros(8, 8), 0.1, 3, torch.qint8)}
    place.save({"x": saved})
    place.load(loaded)
    assert torch.equal(loaded["x"].int_repr(), saved.int_repr())
    assert torch.equal(loaded["x"].dequantize(), saved.dequantize())


def test_quantized_tensors_of_another_scale_are_refused(place: Place) -> None:
    saved = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 3, torch.qint8)
    loaded = {"x": torch.quantize_per_tensor(torch.zeros(8, 8), 0.2, 3, torch.qint8)}
    place.save({"x": saved})
    with pytest.raises(CheckpointException) as raised:
        place.load(loaded)
    assert isinstance(raised.value.failures[0][0], CheckpointError)


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr"])
def test_what_could_not_be_loaded_is_not_saved(place: Place, layout: str) -> None:
    # DCP's planners narrow the tensor that they load into, which a sparse one does not allow.
    dense = torch.eye(4)
    sparse = dense.to_sparse_bsr((2, 2)) if layout == "sparse_bsr" else dense.to_sparse(layout=getattr(torch, layout))
    with pytest.raises(CheckpointException) as raised:
        place.save({"dense": dense, "x": sparse})
    error = raised.value.failures[0][0]
    if "do not have strides" not in str(error):  # with which torch 2.15 itself refuses all layouts but COO
        assert isinstance(error, CheckpointError) and "'x'" in str(error) and layout in str(error)
    with pytest.raises(CheckpointNotFoundError):
        place.reader().read_metadata()


def test_three_thousand_small_tensors(place: Place) -> None:
    values = fill(torch.empty(3000, 16))
    round_trip(place, {f"layer.{number}.weight": values[number] for number in range(3000)})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mix_of_tensors_and_sizes_of_blocks(place: Place, data: st.DataObject) -> None:
    state = {}
    for number in range(data.draw(st.integers(1, 6))):
        shape = data.draw(st.lists(st.integers(0, 40), max_size=3))
        tensor = fill(torch.empty(shape, dtype=data.draw(st.sampled_from(DTYPES))), seed=number)
        state[str(number)] = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    options = TransferOptions(
        concurrency=data.draw(st.integers(1, 8)),
        block_size=data.draw(st.integers(4096, 100_000)),
        checksums=data.draw(st.booleans()),
    )
    round_trip(place, state, options)


# Everything else


class Phase(enum.Enum):
    WARM_UP = 1


@dataclasses.dataclass
class Progress:
    step: int
    seen: dict[int, float]


def test_python_objects(place: Place) -> None:
    saved: dict[str, Any] = {
        "none": None,
        "flag": True,
        "int": 1 << 100,
        "float": -0.0,
        "complex": 1 - 2j,
        "text": "\N{SNOWMAN}\x00",
        "bytes": bytes(range(256)) * 1000,
        "tuple": (1, (2, 3), "x"),
        "set": {1, 2},
        "enum": Phase.WARM_UP,
        "dataclass": Progress(3, {1: 0.5}),
        "ordered": collections.OrderedDict(a=1),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "tensor in a tuple": (torch.arange(3),),
    }
    place.save(saved)
    loaded: dict[str, Any] = dict.fromkeys(saved)
    loaded["none"] = "something"
    loaded["ordered"] = collections.OrderedDict(a=0)
    place.load(loaded)
    assert torch.equal(loaded.pop("tensor in a tuple")[0], saved.pop("tensor in a tuple")[0])
    assert loaded == saved
    assert {key: type(value) for key, value in loaded.items()} == {key: type(value) for key, value in saved.items()}


def test_nested_containers(place: Place) -> None:
    def state(seed: int) -> dict[str, Any]:
        return {
            "deep": {"deeper": {"deepest": torch.full((2,), seed)}},
            "list": [torch.full((3,), seed), {"a": torch.full((4,), seed)}, seed],
            "tuple": (torch.full((5,), seed), seed),
            # Of tensors only: DCP gives an object back under str(key).
            "int keys": {8: torch.full((6,), seed), 10: {11: torch.full((7,), seed)}},
            "empty dict": {},
            "empty list": [],
        }

    place.save(state(1))
    loaded = state(0)
    place.load(loaded)
    assert str(loaded) == str(state(1))


class Counter:
    """A Stateful, as training loops hand them to DCP."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.history = torch.full((4,), float(count))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.history = state["history"].clone()


def test_stateful_objects(place: Place) -> None:
    place.save({"counter": Counter(5)})
    counter = Counter(0)
    place.load({"counter": counter})
    assert counter.count == 5 and counter.history.tolist() == [5.0] * 4


def trained(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1), amsgrad=True)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    inputs = torch.linspace(-1, 1, 64).reshape(8, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("helpers", [True, False], ids=["torch's helpers", "int keys"])
def test_training_goes_on_as_if_nothing_had_happened(place: Place, helpers: bool) -> None:
    def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if helpers:
            names, values = get_state_dict(model, optimizer)
            return {"model": names, "optimizer": values}
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    model, optimizer = trained(seed=1, steps=3)
    place.save(state(model, optimizer))
    other_model, other_optimizer = trained(seed=2, steps=1)
    loaded = state(other_model, other_optimizer)
    place.load(loaded)
    if helpers:
        set_state_dict(
            other_model, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
    else:
        other_model.load_state_dict(loaded["model"])
        other_optimizer.load_state_dict(loaded["optimizer"])
    train(model, optimizer, 2)
    train(other_model, other_optimizer, 2)
    for (name, value), other in zip(model.state_dict().items(), other_model.state_dict().values(), strict=True):
        assert_same(other, value, name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "../../x",
        "a b",
        "a.b.c",
        "\N{SNOWMAN}.\U0001f600",
        "nul\x00",
        "line\nbreak",
        "%2e%2e",
        "k" * 10_000,
    ],
    ids=ascii,
)
def test_odd_names(place: Place, name: str) -> None:
    place.save({name: torch.arange(3), "object": {name: "x"}})
    loaded: dict[str, Any] = {name: torch.zeros(3, dtype=torch.int64), "object": {name: ""}}
    place.load(loaded)
    assert loaded[name].tolist() == [0, 1, 2] and loaded["object"] == {name: "x"}


def test_an_empty_state_dict(place: Place) -> None:
    place.save({})
    place.load({})
    assert place.reader().read_metadata().state_dict_metadata == {}


@pytest.mark.skipif(not hasattr(dcp, "CheckpointableTensor"), reason="CheckpointableTensor came with torch 2.14")
def test_local_buffers_that_hold_several_shards_of_a_tensor(place: Place) -> None:
    """A ``CheckpointableTensor``: one local tensor with shards of a global one, and padding between them."""
    whole = torch.arange(24.0).reshape(4, 6)

    def buffer(shards: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]) -> Any:
        local: Any = torch.full((7, 9), -1.0)
        local.global_shape = (4, 6)
        local.global_offsets, local.local_offsets, local.local_sizes = map(tuple, zip(*shards, strict=True))
        return local

    columns = [((0, 0), (0, 0), (4, 2)), ((0, 2), (1, 4), (4, 4))]
    saved = buffer(columns)
    saved[0:4, 0:2], saved[1:5, 4:8] = whole[:, :2], whole[:, 2:]
    place.save({"w": saved})
    plain = {"w": torch.zeros(4, 6)}
    place.load(plain)
    assert torch.equal(plain["w"], whole)
    rows = buffer([((0, 0), (0, 1), (1, 6)), ((1, 0), (3, 3), (3, 6))])
    place.load({"w": rows})
    wanted = torch.full((7, 9), -1.0)
    wanted[0:1, 1:7], wanted[3:6, 3:9] = whole[:1], whole[1:]
    assert torch.equal(rows, wanted)


# Packed dtypes

FLOAT4 = torch.float4_e2m1fn_x2


def packed(*shape: int) -> torch.Tensor:
    return fill(torch.empty(shape, dtype=FLOAT4))


@pytest.mark.parametrize(
    "target",
    [
        packed(6, 4).t(),
        packed(4, 12)[:, ::2],
        packed(4, 6),
    ],
    ids=["transposed", "strided", "contiguous"],
)
def test_packed_elements_come_into_any_layout(place: Place, target: torch.Tensor) -> None:
    saved = packed(6, 4).t()
    place.save({"w": saved})
    place.load({"w": target})
    assert_same(target, saved)


@pytest.mark.parametrize(
    ("saved", "wanted"), [(FLOAT4, torch.float32), (FLOAT4, torch.uint8), (torch.float32, FLOAT4)], ids=str
)
def test_a_dtype_that_torch_does_not_convert_is_refused_before_anything_is_loaded(
    place: Place, saved: torch.dtype, wanted: torch.dtype
) -> None:
    place.save({"a": torch.ones(3), "w": torch.zeros(4, 6, dtype=saved)})
    target = {"a": torch.zeros(3), "w": torch.zeros(4, 6, dtype=wanted)}
    with pytest.raises(CheckpointException) as caught:
        place.load(target)
    error = caught.value.failures[0][0]
    assert isinstance(error, CheckpointError)
    assert f"'w' at [0, 0] of {place.url} was saved as {saved}" in str(error)
    assert str(wanted) in str(error)
    assert target["a"].tolist() == [0, 0, 0]


class Quantizes(dcp.DefaultSavePlanner):
    """Saves what is less exact than what it planned."""

    def resolve_data(self, write_item: Any) -> Any:
        data: Any = super().resolve_data(write_item)
        return torch.quantize_per_tensor(data, 0.5, 0, torch.qint8)


@pytest.mark.parametrize("kind", [None, torch.quint8], ids=["not quantized", "other integers"])
def test_quantized_values_come_into_tensors_of_their_kind_only(place: Place, kind: torch.dtype | None) -> None:
    target = torch.zeros(3) if kind is None else torch.quantize_per_tensor(torch.zeros(3), 0.5, 0, kind)
    dcp.save({"w": torch.ones(3)}, storage_writer=place.writer(), planner=Quantizes())
    with pytest.raises(CheckpointException) as caught:
        place.load({"w": target})
    error = caught.value.failures[0][0]
    assert isinstance(error, CheckpointError)
    assert f"'w' at [0] of {place.url} was saved" in str(error)
    assert "quantizer" in str(error)


def test_a_tensor_without_values_is_refused_by_name(place: Place) -> None:
    with pytest.raises(CheckpointException) as caught:
        place.save({"a": torch.ones(3), "w": torch.empty(3, device="meta")})
    error = caught.value.failures[0][0]
    assert isinstance(error, CheckpointError)
    assert "'w' is on the meta device" in str(error)
    with pytest.raises(CheckpointException) as caught:
        place.load({"a": torch.zeros(3)})
    assert isinstance(caught.value.failures[0][0], CheckpointNotFoundError)
