"""Objects whose rebuilding looks at their tensors find there what torch.load would give them."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsupportedCheckpointError
from azure_torch_ckpt.objects import load_object, pack, save_object, unpack
from azure_torch_ckpt.objects.sharded import load_sharded, save_sharded
from azure_torch_ckpt.objects.single_process import save_state_dict
from tests.support.containers import KEY
from tests.support.deep_equality import assert_alike, through_codec, through_torch
from tests.support.ranks import Ranks

# What the objects below saw of their tensors while they were rebuilt.
SEEN: list[tuple[tuple[int, ...], float]] = []


def look(tensor: torch.Tensor) -> None:
    SEEN.append((tuple(tensor.shape), float(tensor.detach().sum())))


class Stats(collections.namedtuple("Stats", "mean std")):
    def __new__(cls, mean: Any, std: Any) -> Any:
        look(mean)
        look(std)
        return super().__new__(cls, mean, std)


class Checked(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        look(value)
        super().__setitem__(key, value)


class Appended(list):  # type: ignore[type-arg]
    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    def append(self, value: Any) -> None:
        look(value)
        super().append(value)


class Scaler:
    def __init__(self, scale: torch.Tensor) -> None:
        look(scale)
        self.scale, self.total = scale, float(scale.sum())

    def __reduce__(self) -> Any:
        return Scaler, (self.scale,)


class Normed(torch.nn.Linear):
    def __setstate__(self, state: Any) -> None:
        look(state["_parameters"]["weight"])
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def checked(**entries: Any) -> Checked:
    made = Checked()
    for key, value in entries.items():
        dict.__setitem__(made, key, value)
    return made


def appended(*values: Any) -> Appended:
    made = Appended()
    for value in values:
        list.append(made, value)
    return made


BASE = torch.arange(12.0).reshape(3, 4)
NET = Normed(4, 3)


def with_attribute() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.scaler = Scaler(BASE)  # type: ignore[attr-defined]
    return parameter


def sparse() -> dict[str, Any]:
    """The indices and values of a sparse tensor are tensors of their own, too."""
    indices, values = torch.tensor([[0, 2]]), torch.tensor([3.0, 4.0])
    made = torch.sparse_coo_tensor(indices, values, (3,), check_invariants=True)
    return {"indices": indices, "values": values, "sparse": made}


CASES: dict[str, Callable[[], Any]] = {
    "a named tuple": lambda: {"hyper_parameters": Stats(torch.zeros(3), torch.ones(3))},
    "a named tuple of nothing": lambda: Stats(torch.empty(0, 3), torch.ones(())),
    "a dict": lambda: [checked(a=torch.ones(2), b=BASE[1:])],
    "a list": lambda: {"x": appended(torch.ones(2), BASE.t())},
    "a class": lambda: {"x": Scaler(torch.ones(3, dtype=torch.bfloat16))},
    "an object and a state dict that share a tensor": lambda: {"state_dict": {"w": BASE}, "scaler": Scaler(BASE)},
    "an object before the state dict": lambda: {"scaler": Scaler(BASE), "state_dict": {"w": BASE}},
    "an object with a view": lambda: {"state_dict": {"w": BASE, "v": BASE[0]}, "scaler": Scaler(BASE[1:, ::2])},
    "an object with what is expanded": lambda: {"w": torch.ones(1, 3).expand(4, 3), "s": Scaler(BASE[:1].expand(5, 4))},
    "a module among the hyperparameters": lambda: {"state_dict": NET.state_dict(), "hyper_parameters": {"net": NET}},
    "an object in a list in an object": lambda: {"w": BASE, "s": Stats(BASE, torch.ones(1)), "t": [Scaler(BASE)]},
    "an attribute of a parameter": lambda: {"w": BASE, "p": with_attribute()},
    "a sparse tensor": sparse,
    "a set": lambda: {"w": BASE, "s": frozenset([BASE])},
    "an ordered dict with an attribute": lambda: with_metadata(),
    "the same object twice": lambda: [scaler := Scaler(BASE), scaler, BASE],
}


def with_metadata() -> Any:
    state = collections.OrderedDict(w=BASE)
    state._metadata = {"scaler": Scaler(BASE)}  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize("case", CASES)
def test_an_object_sees_its_tensors_as_torch_would_show_them(case: str) -> None:
    value = CASES[case]()
    SEEN.clear()
    wanted = through_torch(value, weights_only=False)
    shown = SEEN.copy()
    SEEN.clear()
    got = through_codec(value, weights_only=False)
    assert shown == SEEN
    if case != "a sparse tensor":  # torch itself makes new tensors of its parts whenever it pickles one
        assert_alike(got, wanted)
    else:
        assert got["sparse"].to_dense().tolist() == [3.0, 0.0, 4.0] == wanted["sparse"].to_dense().tolist()
        assert torch.equal(got["values"], wanted["values"])


def test_the_form_of_earlier_versions_is_read() -> None:
    """A value, and a table of its tensors behind it."""
    first, shared = torch.empty(0), torch.nn.Parameter(torch.empty(0))
    table = {
        "w": [first, 0, 0, [3, 4], [4, 1], "w"],
        "view": [shared, 0, 16, [2, 2], [4, 2], None],
    }
    stream = io.BytesIO()
    torch.save((1, {"state_dict": {"w": first}, "view": shared}, collections.OrderedDict(table)), stream)
    unpacked = unpack(torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8), weights_only=True)
    items = unpacked.allocate()
    items["w"].copy_(BASE)
    wanted = {"state_dict": {"w": BASE}, "view": torch.nn.Parameter(BASE[1:, ::2])}
    assert_alike(unpacked.value, wanted)


def test_a_tensor_takes_few_bytes_and_a_few_steps_of_the_unpickler() -> None:
    """The unpickler of weights_only is a loop in Python, and a model may have 20,000 tensors."""

    def steps(count: int) -> tuple[int, int]:
        state = {"state_dict": {f"layers.{number}.weight": torch.ones(3) for number in range(count)}}
        skeleton = pack(state).skeleton
        with zipfile.ZipFile(io.BytesIO(skeleton.numpy().tobytes())) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return sum(1 for _ in pickletools.genops(archive.read(name))), skeleton.numel()

    (few, short), (many, long) = steps(1000), steps(2000)
    assert (many - few) / 1000 < 10
    assert (long - short) / 1000 < 120


def read_by_torch(skeleton: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(skeleton.numpy().tobytes()), weights_only=False)


def test_names_of_items_stay_where_they_were() -> None:
    value = {"a": Stats(torch.ones(1), torch.ones(2)), "b": {"c": Scaler(BASE), "d": BASE}}
    assert pack(value).tensors.keys() == {"a.0", "a.1", "b.d"}


def test_objects_with_early_tensors_are_refused_like_others_with_weights_only() -> None:
    packed = pack({"w": BASE, "s": Scaler(BASE)})
    with pytest.raises(UnsupportedCheckpointError, match="Scaler"):
        unpack(packed.skeleton, weights_only=True, fetch=lambda early: None)
    # A set needs no permission, and what it holds is early, too.
    assert_alike(through_codec({"w": BASE, "s": {BASE}}, weights_only=True)["w"], BASE)


def test_the_skeleton_alone_says_what_it_is() -> None:
    packed = pack({"w": BASE, "s": Scaler(BASE)})
    with pytest.raises(UnsupportedCheckpointError, match=r"azure_torch_ckpt\.lightning"):
        read_by_torch(packed.skeleton)


def test_objects_come_back_from_storage(container: str) -> None:
    url = f"{container}/objects"
    value = {case: make() for case, make in CASES.items() if case != "a sparse tensor"}
    save_object(value, AzureBlobWriter(url, credential=KEY))
    assert_alike(load_object(AzureBlobReader(url, credential=KEY), weights_only=False), by_torch(value))


def by_torch(value: Any) -> Any:
    return through_torch(value, weights_only=False)


def test_what_metadata_and_skeleton_do_not_agree_on_is_no_memory(container: str) -> None:
    url = f"{container}/damaged"
    packed = pack({"w": BASE, "s": Scaler(BASE)})
    writer = AzureBlobWriter(url, credential=KEY)
    save_state_dict({**packed.state_dict(), "w": torch.ones(2)}, writer)
    with pytest.raises(CorruptCheckpointError, match="'w'"):
        load_object(AzureBlobReader(url, credential=KEY), weights_only=False)


def shared_case() -> dict[str, Any]:
    return {
        "state_dict": {"w": BASE, "big": torch.ones(400_000)},
        "scaler": Scaler(BASE),
        "stats": Stats(BASE, BASE[0]),
    }


def save_and_load(url: str) -> None:
    save_sharded(shared_case(), AzureBlobWriter(url, credential=KEY))
    dist.barrier()
    assert_alike(
        load_sharded(AzureBlobReader(url, credential=KEY), torch.device("cpu"), weights_only=False),
        by_torch(shared_case()),
    )


def test_objects_come_back_on_every_rank(ranks: Ranks, container: str) -> None:
    ranks(2).run(save_and_load, f"{container}/objects")


def test_an_object_that_cannot_be_pickled_raises_what_it_raised_before() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pack({"w": BASE, "f": lambda: None})
