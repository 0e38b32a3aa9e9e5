"""Memory, requests and bytes: a save or a load takes no more of them than it must."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from azure.core.rest import HttpRequest, HttpResponse

from azure_torch_ckpt import TransferOptions
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from tests.dcp.memory_growth import child_result
from tests.support.sharded import ShardPlanner
from tests.support.states import Place, assert_same, fill

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

KIB, MIB = 1 << 10, 1 << 20


# Memory

BUDGET = 16 * MIB  # for a state dict of 128 MiB
# Small objects and threads' stacks: nothing that grows with the state dict or the budget.
SLACK = 8 * MIB


@pytest.fixture(scope="module")
def growth(azurite: Azurite) -> dict[str, int]:
    """How much a process' memory grew in each step of tests/dcp/memory_growth.py, in bytes."""
    url = azurite.create_container("memory")
    return dict(child_result("tests.dcp.memory_growth", url, azurite.account_key, BUDGET))


@pytest.mark.parametrize("step", ["save contiguous tensors", "load contiguous tensors"])
def test_contiguous_tensors_need_no_memory_beside_them(growth: dict[str, int], step: str) -> None:
    assert growth[step] < SLACK


@pytest.mark.parametrize(
    "step",
    [
        "save a transposed tensor",
        "load a transposed tensor",
        "load an eighth of the columns",
        "load as another dtype",
    ],
)
def test_other_tensors_stay_within_the_memory_budget(growth: dict[str, int], step: str) -> None:
    assert growth[step] < BUDGET + SLACK


def test_python_copies_no_tensor(place: Place) -> None:
    state = {str(number): torch.full((4 * MIB,), number, dtype=torch.uint8) for number in range(8)}
    options = TransferOptions(concurrency=4, block_size=4 * MIB)
    place.save(state, options)
    place.load(state, options)
    for step in (place.save, place.load):
        tracemalloc.start()
        try:
            step(state, options)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MIB, step


# Requests and bytes


@dataclass(frozen=True)
class Sent:
    method: str
    path: str
    query: str
    uploaded: int
    downloaded: int


@dataclass
class Traffic:
    """What went through the transport since the last `clear`."""

    all: list[Sent] = field(default_factory=list)

    def of(self, method: str, ending: str, query: str = "") -> list[Sent]:
        return [
            sent for sent in self.all if sent.method == method and sent.path.endswith(ending) and query in sent.query
        ]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    seen = Traffic()
    send = GatherTransport.send

    def watched(self: GatherTransport, request: HttpRequest, **kwargs: Any) -> HttpResponse:
        response = send(self, request, **kwargs)
        path, _, query = request.url.partition("?")
        seen.all.append(
            Sent(
                request.method,
                path,
                query,
                int(request.headers.get("Content-Length", 0)),
                int(response.headers.get("Content-Length", 0)) if request.method == "GET" else 0,
            )
        )
        return response

    monkeypatch.setattr(GatherTransport, "send", watched)
    yield seen


def matrices(count: int, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {f"layer.{number}": fill(torch.empty(rows, columns), seed=number) for number in range(count)}


def shard(
    place: Place,
    state: dict[str, torch.Tensor],
    start: tuple[int, int],
    size: tuple[int, int],
    options: TransferOptions,
) -> int:
    """Load a part of every tensor; return its bytes."""
    parts = {name: torch.zeros(size) for name in state}
    place.load(parts, options, ShardPlanner(dict.fromkeys(parts, start)))
    for name, part in parts.items():
        assert_same(part, state[name][start[0] : start[0] + size[0], start[1] : start[1] + size[1]], name)
    return sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("part", [0, 3, 7])
def test_an_eighth_of_the_rows_moves_an_eighth_of_the_bytes(place: Place, traffic: Traffic, part: int) -> None:
    state = matrices(count=8, rows=2048, columns=1024)  # 8 MiB each
    place.save(state)
    traffic.all.clear()
    wanted = shard(place, state, (part * 256, 0), (256, 1024), TransferOptions())
    gets = traffic.of("GET", ".distcp")
    assert wanted == 8 * MIB
    assert wanted <= sum(get.downloaded for get in gets) <= 1.02 * wanted
    assert len(gets) <= 3 * len(state)


def test_wide_columns_move_no_other_columns(place: Place, traffic: Traffic) -> None:
    state = matrices(count=2, rows=16, columns=256 * KIB)  # 1 MiB a row
    place.save(state)
    traffic.all.clear()
    wanted = shard(place, state, (0, 64 * KIB), (16, 32 * KIB), TransferOptions())
    gets = traffic.of("GET", ".distcp")
    assert sum(get.downloaded for get in gets) == wanted == 4 * MIB
    assert len(gets) == 2 * 16


def test_narrow_columns_are_few_requests(place: Place, traffic: Traffic) -> None:
    state = matrices(count=2, rows=4096, columns=1024)  # 4 KiB a row, 16 MiB a tensor
    place.save(state)
    traffic.all.clear()
    shard(place, state, (0, 512), (4096, 128), TransferOptions())
    gets = traffic.of("GET", ".distcp")
    assert sum(get.downloaded for get in gets) <= 32 * MIB
    assert len(gets) <= 2 * 5


def test_everything_is_read_once(place: Place, traffic: Traffic) -> None:
    state = matrices(count=3, rows=4096, columns=1024)
    place.save(state)
    stored = sum(put.uploaded for put in traffic.of("PUT", ".distcp", "comp=block&"))
    traffic.all.clear()
    place.load(state)
    gets = traffic.of("GET", ".distcp")
    assert 48 * MIB < sum(get.downloaded for get in gets) <= stored < 48 * MIB + 8 * KIB
    assert len(gets) <= 3 * len(state) * 2
    assert len(traffic.of("GET", ".metadata")) == 1
    assert len(traffic.all) == len(gets) + 1


def test_a_save_is_blocks_a_commit_and_the_metadata(place: Place, traffic: Traffic) -> None:
    state = matrices(count=3, rows=4096, columns=1024)
    place.save(state, TransferOptions(block_size=8 * MIB))
    assert len(traffic.of("PUT", ".distcp", "comp=block&")) == 7
    assert len(traffic.of("PUT", ".distcp", "comp=blocklist")) == 1
    assert len(traffic.of("PUT", ".metadata")) == len(traffic.of("GET", ".metadata")) == 1
    assert len(traffic.all) == 10


def test_small_tensors_share_requests(place: Place, traffic: Traffic) -> None:
    values = fill(torch.empty(2000, 64))
    state = {f"layer.{number}.bias": values[number] for number in range(2000)}
    place.save(state)
    assert len(traffic.all) <= 6
    traffic.all.clear()
    place.load({name: torch.zeros(64) for name in state})
    assert len(traffic.all) <= 3
    traffic.all.clear()
    # Every tenth: what lies between two of them costs less than a request.
    place.load({name: torch.zeros(64) for name in list(state)[::10]})
    assert len(traffic.all) <= 3


def test_far_apart_tensors_are_fetched_alone(place: Place, traffic: Traffic) -> None:
    state: dict[str, Any] = {}
    for number in range(4):
        state[f"{number} bias"] = torch.full((1000,), number)
        state[f"{number} weight"] = torch.zeros(MIB)
    place.save(state)
    traffic.all.clear()
    place.load({name: value for name, value in state.items() if "bias" in name})
    gets = traffic.of("GET", ".distcp")
    assert len(gets) == 4
    assert sum(get.downloaded for get in gets) < 4 * (8000 + 2 * KIB)
