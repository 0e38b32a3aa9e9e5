"""`diff` finds every difference of two checkpoints, whatever their sharding, and reads no more than it must."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AzureBlobWriter, CheckpointNotFoundError, CorruptCheckpointError, TransferOptions
from azure_torch_ckpt.catalog import Change, copy, diff
from azure_torch_ckpt.progress import Progress
from tests.support.mixed_checkpoint import KEY, SMALL, flip_in_storage, item_of, save
from tests.support.proxy import FaultProxy
from tests.support.ranks import Ranks
from tests.support.sharded import plain, rows, writer
from tests.support.states import DTYPES, fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]

MIB = 1 << 20
TIGHT = TransferOptions(memory_budget=MIB, concurrency=2, block_size=64 * 1024)


def store(url: str, state: dict[str, Any]) -> str:
    dcp.save(state, storage_writer=AzureBlobWriter(url, credential=KEY))
    return url


def test_keys_kinds_shapes_and_dtypes_cost_two_requests(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    common = {"same": torch.ones(3), "list": [1, torch.zeros(2)]}
    store(
        f"{container}/a",
        {**common, "only_a": 1, "shape": torch.ones(3, 4), "kind": torch.ones(1), "dtype": torch.ones(2)},
    )
    store(
        f"{container}/b",
        {
            **common,
            "only_b": torch.ones(1),
            "shape": torch.ones(4, 3, dtype=torch.float16),
            "kind": "text",
            "dtype": torch.ones(2).bfloat16(),
        },
    )
    found = diff(f"{proxied_container}/a", f"{proxied_container}/b", credential=KEY)
    assert (found.only_a, found.only_b) == (["only_a"], ["only_b"])
    assert found.changed == [
        Change("dtype", "dtype", "float32", "bfloat16"),
        Change("kind", "kind", "tensor", "object"),
        Change("shape", "shape", "[3, 4]", "[4, 3]"),
        Change("shape", "dtype", "float32", "float16"),
    ]
    assert found.unchanged == 3 and not found.same
    assert (found.a, found.b) == (f"{proxied_container}/a", f"{proxied_container}/b")
    assert proxy.count() == 2


def test_equal_checksums_spare_the_reading(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    save(f"{container}/a", 1)
    save(f"{container}/b", 1)
    found = diff(f"{proxied_container}/a", f"{proxied_container}/b", credential=KEY, values=True)
    assert found.same and found.unchanged == 4
    assert proxy.count() == 2
    save(f"{container}/c", 2)
    found = diff(f"{proxied_container}/a", f"{proxied_container}/c", credential=KEY, values=True)
    assert [(change.key, change.what) for change in found.changed] == [
        (name, "value") for name in ("large", "object", "small", "strided")
    ]
    [thing] = [change for change in found.changed if change.key == "object"]
    assert thing.a is not None and thing.a.startswith("'version 1 ") and len(thing.a) == 80 and thing.elements is None


def test_without_checksums_the_bits_are_compared(container: str) -> None:
    for name in ("a", "b"):
        save(f"{container}/{name}", 1, TransferOptions(checksums=False))
    reports: list[Progress] = []
    found = diff(
        f"{container}/a",
        f"{container}/b",
        credential=KEY,
        values=True,
        options=TIGHT,
        progress=reports.append,
    )
    assert found.same
    assert reports[-1].operation == "diff" and reports[-1].total == reports[-1].done > 2 * 240_000
    # A bit that was flipped in storage is a difference of one element, which nothing else tells.
    flip_in_storage(f"{container}/b", item_of(f"{container}/b", "large"), 100_000)
    [change] = diff(f"{container}/a", f"{container}/b", credential=KEY, values=True, options=TIGHT).changed
    assert (change.key, change.elements) == ("large", 1)


@pytest.mark.parametrize("options", [None, TIGHT], ids=["", "in parts"])
def test_the_largest_difference_is_reported(container: str, options: TransferOptions | None) -> None:
    one: dict[str, Any] = {
        "float": torch.arange(200_000, dtype=torch.float32).reshape(400, 500),
        "half": torch.ones(10, dtype=torch.bfloat16),
        "int": torch.zeros(7, dtype=torch.int64),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "wide": torch.zeros(3, dtype=torch.complex128),
        "bool": torch.zeros(5, dtype=torch.bool),
        "nan": torch.tensor([math.nan, 1.0]),
        "same nan": torch.tensor([math.nan, math.inf]),
        "inf": torch.tensor([math.inf, 1.0]),
        "zero": torch.tensor([0.0, 1.0]),
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
    }
    other = {key: value.clone() for key, value in one.items()}
    other["float"][399, 499] += 8
    other["float"][0, 0] -= 2
    other["half"][3] = 1.5
    other["int"][2] = -7
    other["complex"][1] = 3 + 4j
    other["wide"][2] = 1j
    other["bool"][4] = True
    other["nan"][0] = 1.0
    other["inf"][0] = 1.0
    other["zero"][0] = -0.0
    other["scalar"].add_(1)
    store(f"{container}/a", one)
    store(f"{container}/b", other)
    found = diff(f"{container}/a", f"{container}/b", credential=KEY, values=True, options=options)
    differences = {change.key: (change.elements, change.max_abs_difference) for change in found.changed}
    assert math.isnan(differences.pop("nan")[1] or 0)
    assert differences == {
        "float": (2, 8.0),
        "half": (1, 0.5),
        "int": (1, 7.0),
        "complex": (1, 5.0),
        "wide": (1, 1.0),
        "bool": (1, None),
        "inf": (1, math.inf),
        "zero": (1, 0.0),  # other bits, the same number
        "scalar": (1, 1.0),
    }
    assert found.unchanged == 2


def test_every_dtype_can_be_compared(container: str) -> None:
    one = {str(dtype): fill(torch.empty(40, dtype=dtype), 1) for dtype in DTYPES}
    other = {str(dtype): fill(torch.empty(40, dtype=dtype), 2) for dtype in DTYPES}
    store(f"{container}/a", one)
    store(f"{container}/b", other)
    found = diff(f"{container}/a", f"{container}/b", credential=KEY, values=True)
    for change in found.changed:
        size = one[change.key].element_size()
        left, right = (state[change.key].view(torch.uint8).reshape(-1, size) for state in (one, other))
        assert change.elements == int((left != right).any(1).sum()), change.key
    assert len(found.changed) == len(DTYPES)


def save_as(url: str, sharded: bool) -> None:
    """On a rank."""
    state = rows(1) if sharded else plain(1)
    dcp.save(state, storage_writer=writer(url))


def test_another_sharding_is_no_difference(ranks: Ranks, container: str) -> None:
    ranks(2).run(save_as, f"{container}/rows", True)
    ranks(2).run(save_as, f"{container}/whole", False)
    for options in (None, TIGHT):
        found = diff(f"{container}/rows", f"{container}/whole", credential=KEY, values=True, options=options)
        assert found.same and found.unchanged == len(plain())
    ranks(2).run(save_rows_of_another_version, f"{container}/other")
    found = diff(f"{container}/other", f"{container}/whole", credential=KEY, values=True)
    assert {change.key for change in found.changed} == set(plain()) - {"none"}


def save_rows_of_another_version(url: str) -> None:
    """On a rank."""
    dcp.save(rows(2), storage_writer=writer(url))


class Unsafe:
    """A class that torch.load does not trust."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_objects_are_compared_by_value_where_their_pickles_differ(container: str) -> None:
    shared = [1]
    store(f"{container}/a", {"alias": ((shared, shared),), "t": (torch.ones(2), 1), "u": Unsafe(1), "v": Unsafe(2)})
    store(f"{container}/b", {"alias": (([1], [1]),), "t": (torch.zeros(2), 1), "u": Unsafe(1), "v": Unsafe(3)})
    found = diff(f"{container}/a", f"{container}/b", credential=KEY, values=True)
    assert [change.key for change in found.changed] == ["t", "v"]
    assert "does not trust" in str(found.changed[1].a)


def test_torchs_own_checkpoint_beside_ours(container: str, tmp_path: Path) -> None:
    state = {"x": fill(torch.empty(300, 400)).nan_to_num_(), "step": 3}
    store(f"{container}/ours", state)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path))
    copy(tmp_path, f"{container}/torch", credential=KEY)
    assert diff(f"{container}/ours", f"{container}/torch", credential=KEY, values=True, options=TIGHT).same


def test_damage_is_found_while_comparing(container: str) -> None:
    save(f"{container}/a", 1, SMALL)
    save(f"{container}/b", 2, SMALL)
    flip_in_storage(f"{container}/b", item_of(f"{container}/b", "strided"), 2000)
    with pytest.raises(CorruptCheckpointError, match="'strided'"):
        diff(f"{container}/a", f"{container}/b", credential=KEY, values=True)
    assert [change.what for change in diff(f"{container}/a", f"{container}/b", credential=KEY).changed] == []


def test_nothing_to_compare(container: str) -> None:
    save(f"{container}/a", 1)
    for pair in (("a", "nothing"), ("nothing", "a")):
        with pytest.raises(CheckpointNotFoundError, match="nothing"):
            diff(*(f"{container}/{name}" for name in pair), credential=KEY)
    store(f"{container}/empty", {})
    assert diff(f"{container}/empty", f"{container}/empty", credential=KEY, values=True).same
    assert diff(f"{container}/a", f"{container}/empty", credential=KEY, values=True).only_a == [
        "large",
        "object",
        "small",
        "strided",
    ]
