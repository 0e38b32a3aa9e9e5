"""Faults that do not heal end in one clear error, on all ranks, within the time that was allowed."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobReader,
    AzureBlobWriter,
    AzureCheckpointError,
    ContainerNotFoundError,
    ServiceUnavailableError,
    TransferOptions,
)
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.transport import connections
from tests.faults.tally import Tally
from tests.support import sharded
from tests.support.faults import Action, Answer, Cut, Hold, Kind
from tests.support.mixed_checkpoint import KEY, assert_right, failure, load, save
from tests.support.proxy import FaultProxy
from tests.support.ranks import Ranks
from tests.support.waits import waiting_at_most, without_waiting

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

IMPATIENT = TransferOptions(block_size=128 * 1024, concurrency=2, retry_seconds=1)
_E = TypeVar("_E", bound=AzureCheckpointError)
# What a save or load may wait for retries that gives up after a second, all its requests together.
BOUND_SECONDS = 8.0


@pytest.fixture(autouse=True)
def retries_at_once() -> Iterator[None]:
    """How often a request is tried again does not depend on how long an attempt takes on this machine."""
    with without_waiting():
        yield


def gives_up(kind: type[_E], run: Callable[..., object], *args: Any, **options: Any) -> _E:
    """The error of a save or load that waits for a bounded time only."""
    with waiting_at_most(BOUND_SECONDS):
        return failure(kind, run, *args, options=IMPATIENT, **options)


# ---- One process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Get Blob", "Put Block", "Put Block List", "Put Blob"])
def test_a_refused_credential_is_not_asked_again(
    proxy: FaultProxy, container: str, proxied_container: str, kind: Kind, tally: Tally
) -> None:
    url = f"{proxied_container}/a"
    save(f"{container}/a")
    proxy.when(kind, times=None).do(Answer(403, "AuthorizationPermissionMismatch"))
    error = gives_up(AccessDeniedError, save, url, 1)
    assert error.error_code == "AuthorizationPermissionMismatch"
    assert "Storage Blob Data Contributor" in str(error)
    # Blocks that were on their way together are refused together.
    assert proxy.count(kind) <= IMPATIENT.concurrency
    assert_right(load(f"{container}/a"))
    tally.add(f"403 to {kind} of a save", 1, "one clear error, the old checkpoint stands", 1)


def test_a_refused_credential_ends_a_load(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    save(f"{container}/a")
    proxy.when(lambda seen: seen.path.endswith(".distcp"), times=None).do(Answer(403, "AuthorizationFailure"))
    gives_up(AccessDeniedError, load, f"{proxied_container}/a")
    assert proxy.count("Get Blob") <= 1 + IMPATIENT.concurrency


def test_a_container_that_does_not_exist(azurite: Azurite, proxy: FaultProxy) -> None:
    for run in (save, load):
        sent = len(proxy.log)
        error = gives_up(ContainerNotFoundError, run, f"{proxy.endpoint}/no-such-container/a")
        assert "no-such-container" in str(error)
        assert len(proxy.log) == sent + 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_service_that_stays_down(
    proxy: FaultProxy, container: str, proxied_container: str, status: int, tally: Tally
) -> None:
    save(f"{container}/a")
    steps: list[tuple[Kind, Callable[..., object]]] = [
        ("Put Block", save),
        ("Put Block List", save),
        ("Get Blob", load),
    ]
    for kind, run in steps:
        rule = proxy.when(kind, times=None)
        rule.do(Answer(status, "ServerBusy"))
        error = gives_up(ServiceUnavailableError, run, f"{proxied_container}/a")
        assert error.status == status
        assert "retries" in str(error)
        assert rule.seen >= 3
        rule.do()
    assert_right(load(f"{container}/a"))
    tally.add(f"{status} for ever", 3, "one clear error, the old checkpoint stands", 3)


def test_connections_that_always_break(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    save(f"{container}/a")
    breaks: list[Sequence[Action]] = [[Cut("request")], [Cut("answer")], [Cut(100)], [Cut(100, reset=False)]]
    for actions in breaks:
        rule = proxy.when("Get Blob", times=None)
        rule.do(*actions)
        error = gives_up(ServiceUnavailableError, load, f"{proxied_container}/a")
        assert error.status is None
        assert "reached" in str(error)
        rule.do()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_service_that_falls_silent(
    azurite: Azurite,
    tls_files: tuple[Path, Path],
    container: str,
    monkeypatch: pytest.MonkeyPatch,
    tls: bool,
    tally: Tally,
) -> None:
    """Before the request was read, before the answer, and in the middle of the body."""
    monkeypatch.setattr(connections, "IO_SECONDS", 0.3)
    monkeypatch.setattr(connections, "TIMEVAL", struct.pack("ll", 0, 300_000))
    save(f"{container}/a")
    with FaultProxy(azurite.endpoint, tls=tls_files if tls else None) as proxy:
        url = proxy.through(f"{container}/a")
        stalls: list[tuple[Kind, Callable[..., object], Hold]] = [
            ("Put Block", save, Hold()),
            ("Put Block", save, Hold(at="answer")),
            ("Put Blob", save, Hold()),
            ("Get Blob", load, Hold()),
            ("Get Blob", load, Hold(at="answer")),
            ("Get Blob", load, Hold(at=500)),
        ]
        for kind, run, hold in stalls:
            rule = proxy.when(kind, times=None)
            rule.do(hold)
            while not rule.seen:  # on a machine that pauses, the attempts may end at an earlier request
                error = gives_up(ServiceUnavailableError, run, url, ca_file=str(tls_files[0]))
                assert "imeout" in str(error)
            assert rule.seen >= 2
            rule.do()
    assert_right(load(f"{container}/a"))
    tally.add(f"{'TLS: ' if tls else ''}stall for ever", len(stalls), "one clear error, the old checkpoint stands", 6)


# ---- All ranks hear of it --------------------------------------------------------------------------------------------


def save_on_ranks(url: str, version: int) -> dict[int, tuple[str, str]]:
    writer = AzureBlobWriter(url, credential=KEY, options=IMPATIENT)
    return _failures(lambda: dcp.save(sharded.rows(version), storage_writer=writer))


def load_on_ranks(url: str) -> dict[int, tuple[str, str]]:
    reader = AzureBlobReader(url, credential=KEY, options=IMPATIENT)
    return _failures(lambda: dcp.load(sharded.empty(sharded.rows()), storage_reader=reader))


def _failures(run: Any) -> dict[int, tuple[str, str]]:
    """Of each rank that failed: the type of its error, and what it says. As this rank hears of it."""
    try:
        run()
    except CheckpointException as caught:
        return {rank: (type(error).__name__, str(error)) for rank, (error, _) in caught.failures.items()}
    return {}


def save_well(url: str, version: int) -> int:
    dcp.save(sharded.rows(version), storage_writer=sharded.writer(url))
    return dist.get_rank()


FOR_EVER: dict[str, tuple[Sequence[Action], str]] = {
    "403": ([Answer(403, "AuthorizationFailure")], "AccessDeniedError"),
    "503": ([Answer(503, "ServerBusy")], "ServiceUnavailableError"),
    "reset": ([Cut("request")], "ServiceUnavailableError"),
}


@pytest.mark.parametrize("fault", FOR_EVER)
def test_one_ranks_fault_is_every_ranks_error(
    ranks: Ranks, proxy: FaultProxy, container: str, proxied_container: str, fault: str, tally: Tally
) -> None:
    actions, expected = FOR_EVER[fault]
    group = ranks(2)
    group.run(save_well, f"{container}/a", 0)
    for kind in ("Put Block", "Put Block List"):
        rule = proxy.when(lambda seen, kind=kind: seen.kind == kind and "/__1_" in seen.path, times=None)  # type: ignore[misc]
        rule.do(*actions)
        heard = group.run(save_on_ranks, f"{proxied_container}/a", 1)
        rule.do()
        assert heard[0] == heard[1]
        [(rank, (error, message))] = heard[0].items()
        assert (rank, error) == (1, expected)
        assert "/__1_0.distcp" in message
    rule = proxy.when(lambda seen: seen.path.endswith("/.metadata"), times=None)
    rule.do(*actions)
    for run in (save_on_ranks, load_on_ranks):
        args = (1,) if run is save_on_ranks else ()
        heard = group.run(run, f"{proxied_container}/a", *args)
        assert heard[0] == heard[1]
        assert {error for error, _ in heard[0].values()} == {expected}
    rule.do()
    group.run(sharded.assert_version, f"{container}/a", 0)
    tally.add(f"{fault} for ever to one of 2 ranks", 4, "the same clear error on all ranks", 4)
