"""The codec gives back what torch.save and torch.load give back, with the tensors' bytes stored elsewhere."""

from __future__ import annotations

import collections
import enum
import gc
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from azure_torch_ckpt import CorruptCheckpointError, UnsupportedCheckpointError
from azure_torch_ckpt.objects import SKELETON, pack, unpack
from tests.support.deep_equality import assert_alike, through_codec, through_torch
from tests.support.states import DTYPES, fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support"),
]

# ---- Any object ----------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "left right")


class Colour(enum.Enum):
    RED = 1


class Thing:
    """A class of the user's own; its state may hold anything."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


def views(base: torch.Tensor) -> list[torch.Tensor]:
    flat = base.flatten()
    return [
        base,
        base.t(),
        base[1:],
        base[:, ::2],
        base.detach(),
        flat[3:9].view(2, 3),
        flat[:1].expand(4, 1),
        flat[2:7].unfold(0, 3, 1),
        flat[:0],
        flat[5],
        torch.nn.Parameter(base[:2], requires_grad=base.is_floating_point()),
    ]


def pool() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        *views(torch.randn(4, 6, generator=generator)),
        *views(torch.randn(4, 6, generator=generator).to(torch.bfloat16)),
        *views(torch.arange(24).view(4, 6)),
        torch.tensor(True),
        torch.tensor(2.5, requires_grad=True),
        torch.empty(0, 3),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.tensor([1 + 2j]).conj(),
        torch.empty(2, 2, device="meta"),
    ]


ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**100), 2**100), st.floats(), st.text(max_size=5), st.complex_numbers()
)
KEYS = st.one_of(st.integers(), st.booleans(), st.text(max_size=3), st.tuples(st.integers()), st.just(Colour.RED))


def nested(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(parts, max_size=4)
    return st.one_of(
        few,
        few.map(tuple),
        few.map(collections.deque),
        st.dictionaries(KEYS, parts, max_size=4),
        st.dictionaries(KEYS, parts, max_size=4).map(collections.OrderedDict),
        st.builds(Pair, parts, parts),
        st.builds(Thing, own=parts),
        st.frozensets(st.integers(), max_size=3),
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_object_comes_back_as_torch_brings_it_back(data: st.DataObject) -> None:
    tensors = pool()
    shared = [{"shared": tensors[0]}, [tensors[1], 1], Thing(x=1)]
    parts = st.one_of(ATOMS, st.sampled_from(tensors), st.sampled_from(shared))
    value = data.draw(st.recursive(parts, nested, max_leaves=25))
    assert_alike(through_codec(value, weights_only=False), through_torch(value, weights_only=False))


def test_the_comparison_sees_what_differs() -> None:
    """The test above would be worth nothing otherwise."""
    base = torch.arange(4.0)
    different = [
        ({1: 2}, {"1": 2}),
        ((1,), [1]),
        ([1], [True]),
        ([base, base], [base, base.clone()]),
        ([base, base[:2]], [base, base[:2].clone()]),
        ([base, base[:2]], [base, base[2:]]),
        (base, torch.nn.Parameter(base)),
        (torch.eye(3), torch.eye(3).t()[:]),
        (float("nan"), -float("nan")),
        (collections.OrderedDict(a=1), {"a": 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (Thing(x=base), Thing(x=base + 1)),
        (torch.ones(3), torch.ones(3, dtype=torch.float64)),
    ]
    for one, other in different:
        if isinstance(one, torch.Tensor) and one.shape == (3, 3):
            other = torch.eye(3).t()
            assert other.stride() != one.stride()
        with pytest.raises(AssertionError):
            assert_alike(one, other)
        assert_alike(one, one)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (3, 5), (2, 1, 4, 3)], ids=str)
def test_every_dtype_comes_back(shape: tuple[int, ...]) -> None:
    assert len(DTYPES) > 20
    state = {str(dtype): fill(torch.empty(shape, dtype=dtype)) for dtype in DTYPES}
    assert_alike(through_codec(state), through_torch(state))
    assert pack(state).tensors.keys() == state.keys()


def test_what_lightning_and_its_users_put_into_a_checkpoint_comes_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    value = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [0.1], "milestones": collections.Counter({3: 1})}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_k_models": {}, "current_score": torch.tensor(0.5)}},
        "hyper_parameters": {"sizes": (1, 2), "nothing": {}, "scalar": np.float32(1.5), "array": np.arange(3)},
        "set": {1, 2},
        "namespace": types.SimpleNamespace(lr=0.1),
        "huge": 10**400,
    }
    back = through_codec(value, weights_only=False)
    assert_alike(back, through_torch(value, weights_only=False))
    assert vars(back["state_dict"]) == vars(model.state_dict())
    assert "_metadata" in vars(back["state_dict"])
    assert list(back["optimizer_states"][0]["state"]) == [0, 1, 2, 3]


def test_attributes_and_classes_of_tensors_come_back() -> None:
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    parameter.tensor_parallel_dim = 1  # type: ignore[attr-defined]
    plain = torch.zeros(2)
    plain.partner = parameter  # type: ignore[attr-defined]
    buffer = torch.nn.Buffer(torch.ones(1))
    state = [parameter, plain, buffer, torch.nn.Linear(2, 2)]
    assert_alike(through_codec(state, weights_only=False), through_torch(state, weights_only=False))


def test_views_of_one_memory_with_different_dtypes_come_back_where_torch_gives_up() -> None:
    base = torch.arange(6.0)
    state = {"float": base, "int": base.view(torch.int32), "byte": base.view(torch.uint8)[4:5]}
    with pytest.raises(RuntimeError, match="different types"):
        through_torch(state)
    back = through_codec(state)
    back["float"][1] = 7
    assert back["int"][1] == torch.tensor(7.0).view(torch.int32)
    assert back["byte"].data_ptr() == back["float"].data_ptr() + 4


# ---- Items ---------------------------------------------------------------------------------------------------------


def test_items_have_the_usual_names() -> None:
    state = {"state_dict": {"layer.weight": torch.ones(1)}, "optimizer_states": [{"state": {0: {"m": torch.ones(2)}}}]}
    assert set(pack(state).tensors) == {"state_dict.layer.weight", "optimizer_states.0.state.0.m"}


def test_names_that_collide_are_told_apart() -> None:
    state = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 1: torch.ones(2), "1": torch.zeros(2), "": torch.ones(3)}
    state |= {SKELETON: torch.ones(4), (1, 2): torch.ones(5)}
    packed = pack(state)
    assert len(packed.tensors) == len(state)
    assert SKELETON not in packed.tensors
    assert_alike(through_codec(state), through_torch(state))


def test_a_tensor_that_is_the_whole_object_is_an_item() -> None:
    assert_alike(through_codec(torch.arange(3)), torch.arange(3))
    assert list(pack(torch.arange(3)).tensors) == ["tensor"]


def stored_bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in pack(value).tensors.values())


def test_memory_is_stored_once_however_many_tensors_lie_in_it() -> None:
    flat = torch.arange(1000.0)
    tied = torch.nn.Parameter(torch.ones(100))
    assert stored_bytes([tied, tied, tied.detach()]) == 400
    assert stored_bytes([flat[i : i + 100] for i in range(0, 1000, 100)] + [flat]) == 4000
    assert stored_bytes([flat[0:600], flat[100:200], flat[500:]]) == 2400 + 2000  # the overlap of two is stored twice
    assert stored_bytes([torch.zeros(1).expand(10**12)]) == 4
    assert stored_bytes([torch.arange(100.0).unfold(0, 50, 1)]) == 400
    assert stored_bytes([flat[::2], flat[::2], flat[1::2]]) == 4000
    assert stored_bytes([flat[::2], flat[1:4]]) == 2000 + 12  # it lies in the gaps of the other


def test_slices_of_one_buffer_are_items_of_their_own() -> None:
    """As the weights of an LSTM on a GPU are; and they share memory again afterwards."""
    flat = torch.arange(10.0)
    state = {"w": flat[:6].view(2, 3), "b": flat[6:]}
    assert {name: tuple(item.shape) for name, item in pack(state).tensors.items()} == {"w": (2, 3), "b": (4,)}
    back = through_codec(state)
    assert back["w"].untyped_storage().data_ptr() == back["b"].untyped_storage().data_ptr()


def test_a_small_slice_of_a_large_tensor_costs_what_it_holds() -> None:
    state = {"slice": torch.zeros(10**6)[500_000:500_010]}
    assert stored_bytes(state) == 40
    assert through_codec(state)["slice"].untyped_storage().nbytes() <= 48


def test_tensors_of_items_are_not_in_the_skeleton() -> None:
    state = {"a": torch.zeros(10**5), "b": [torch.zeros(10**5), torch.zeros(10**5).t()]}
    assert pack(state).skeleton.numel() < 4096
    many = {str(number): torch.zeros(1) for number in range(1000)}
    assert pack(many).skeleton.numel() < 200 * len(many)


def test_items_lie_in_the_memory_of_the_tensors() -> None:
    weight = torch.zeros(4)
    packed = pack({"w": weight})
    weight.fill_(1)
    assert packed.tensors["w"].tolist() == [1, 1, 1, 1]


class Reader:
    """Looks at its tensor while it is rebuilt."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        assert state["tensor"].tolist() == [1, 2, 3]
        self.__dict__.update(state)


def test_tensors_in_other_objects_come_with_the_skeleton_and_are_whole_when_the_object_is_rebuilt() -> None:
    state = {"reader": Reader(torch.tensor([1, 2, 3])), "weight": torch.ones(3)}
    assert list(pack(state).tensors) == ["weight"]
    assert_alike(through_codec(state, weights_only=False), through_torch(state, weights_only=False))


def test_a_tensor_that_pickling_never_reaches_is_no_item() -> None:
    class Forgetful(dict):  # type: ignore[type-arg]
        def __reduce__(self) -> Any:
            return dict, ()

    state = {"kept": torch.ones(1), "dropped": Forgetful(tensor=torch.ones(1))}
    assert list(pack(state).tensors) == ["kept"]
    assert_alike(through_codec(state, weights_only=False), through_torch(state, weights_only=False))


def test_what_cannot_be_pickled_is_refused_as_torch_refuses_it() -> None:
    with pytest.raises(Exception, match="pickle") as ours:
        pack({"f": lambda: None})
    with pytest.raises(type(ours.value)):
        through_torch({"f": lambda: None})


def test_nothing_holds_the_tensors_once_the_packed_object_is_gone() -> None:
    """Not even until the garbage collector comes: the copy of a model's state may be all that fits into memory."""
    gc.collect()
    gc.disable()
    try:
        tensor = torch.ones(3)
        gone = weakref.ref(tensor)
        packed = pack({"t": tensor, "thing": Thing(t=tensor)})
        del tensor, packed
        assert gone() is None
    finally:
        gc.enable()


def test_a_dtensor_is_an_item_and_comes_back_whole(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        whole = torch.arange(12.0).view(3, 4)
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
        packed = pack({"state_dict": {"w": torch.nn.Parameter(sharded)}})
    finally:
        dist.destroy_process_group()
    assert isinstance(packed.tensors["state_dict.w"], DTensor)
    unpacked = unpack(packed.skeleton)
    unpacked.allocate()["state_dict.w"].copy_(whole)
    assert_alike(unpacked.value, {"state_dict": {"w": torch.nn.Parameter(whole.clone())}})


# ---- Loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [None, True])
def test_code_is_not_run_unless_it_is_asked_for(weights_only: bool | None) -> None:
    packed = pack({"thing": Thing(x=torch.ones(1))})
    with pytest.raises(UnsupportedCheckpointError, match=r"checkpoint 7 .*Thing.*weights_only=False"):
        unpack(packed.skeleton, weights_only=weights_only, what="checkpoint 7")
    assert unpack(packed.skeleton, weights_only=False).value["thing"].x == 1
    with torch.serialization.safe_globals([Thing]):
        assert unpack(packed.skeleton, weights_only=weights_only).value["thing"].x == 1


def test_a_checkpoint_of_plain_values_loads_with_weights_only() -> None:
    tensor = torch.ones(2)
    state = {"a": [tensor, (tensor, None)], 3: collections.OrderedDict(p=torch.nn.Parameter(tensor)), "s": {1}}
    assert_alike(through_codec(state, weights_only=True), through_torch(state, weights_only=True))


LOCATIONS: list[Any] = [
    "meta",
    torch.device("meta"),
    {"cpu": "meta"},
    {"cuda:0": "cpu"},
    lambda storage, location: storage if location == "cpu" else None,
    lambda storage, location: None,
    None,
]


@pytest.mark.parametrize("map_location", LOCATIONS)
def test_map_location_means_what_it_means_to_torch(map_location: Any) -> None:
    state = {"w": torch.nn.Parameter(torch.ones(2, 3).t()), "n": torch.arange(4)[1:], "s": torch.eye(2).to_sparse()}
    wanted = through_torch(state, map_location=map_location)
    got = through_codec(state, map_location=map_location)
    assert {name: tensor.device for name, tensor in got.items()} == {n: tensor.device for n, tensor in wanted.items()}
    if got["w"].device.type == "cpu":
        assert_alike(got, wanted)
    else:
        assert got["w"].shape == (3, 2)
        assert isinstance(got["w"], torch.nn.Parameter)


def damaged(**change: Any) -> torch.Tensor:
    """A skeleton with one tensor of two floats, and something else in its row of the table."""
    row = {"tensor": torch.empty(0), "storage": 0, "offset": 0, "size": [2], "stride": [1], "item": "w"} | change
    return pack_skeleton(1, {"w": row["tensor"]}, {"w": list(row.values())})


def pack_skeleton(*content: Any) -> torch.Tensor:
    import io

    stream = io.BytesIO()
    torch.save(content, stream)
    return torch.frombuffer(stream.getvalue(), dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize(
    "change", [{"offset": -4}, {"offset": 2}, {"stride": [-1]}, {"size": [2, 2]}, {"tensor": 5}, {"size": 3}], ids=str
)
def test_a_damaged_skeleton_is_an_error_and_no_access_to_other_memory(change: dict[str, Any]) -> None:
    assert unpack(damaged()).allocate()["w"].shape == (2,)
    with pytest.raises(CorruptCheckpointError, match="checkpoint 7"):
        unpack(damaged(**change), what="checkpoint 7")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_skeleton_cannot_ask_for_memory_that_nothing_fills() -> None:
    with pytest.raises(CorruptCheckpointError, match="without an item"):
        unpack(damaged(item=None, size=[10**15])).allocate()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_skeleton_of_a_later_form_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="Upgrade"):
        unpack(pack_skeleton(2, {}, {}))
    with pytest.raises(CorruptCheckpointError):
        unpack(pack_skeleton(1, {}))
