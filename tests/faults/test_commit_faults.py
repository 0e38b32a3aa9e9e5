"""Every pair of faults at the requests of a save, a removal, a clean-up: the checkpoint is the old one or the new one.

The pairs run against `tests/support/memory_service.py`, with the package's code from the socket up; a sample of them
runs through the proxy against Azurite as well. A pair is two requests of one act, each with a fault or with another
writer just before it. The second may be the retry of the first one, or the request that finds its outcome. Retries do
not wait.

The rule: whatever happens to an act's requests, the checkpoint is the old one or the new one, whole. An act that
returned was carried out. An act that raised was not, unless its error says that this is unknown.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    AzureBlobHuggingFaceReader,
    AzureBlobHuggingFaceWriter,
    AzureBlobReader,
    AzureBlobWriter,
    BlobLocation,
    CheckpointNotFoundError,
    CommitUnknownError,
    TransferOptions,
    prune,
    remove_checkpoint,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import AzureCheckpointError, CheckpointReplacedError, CommitConflictError
from azure_torch_ckpt.huggingface.blob_names import parse_index
from tests.faults.tally import Tally
from tests.support import faults
from tests.support.faults import Action, Call, Cut, Exchange, Flip, Kind
from tests.support.memory_service import Fault, MemoryService
from tests.support.proxy import FaultProxy
from tests.support.waits import without_waiting

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

# ---- Acts: saves, removals, clean-ups, and what must hold after each ------------------------------------------------

OLD, NEW, OTHER, NEXT = 0, 1, 2, 3
NO_GRACE = datetime.timedelta(0)
# One request after the other, so that the k-th is the same one in every run.
IN_TURN = TransferOptions(concurrency=1)


class Act(ABC):
    """Changes what is at `url`; also does the same as another process would.

    Args:
        container: URL of a container that no other act uses.
    """

    name: str
    first: int | None = OLD  # the version that is there before

    def __init__(self, container: str, credential: Any) -> None:
        self.container = container
        self.url = f"{container}/run/step-1"
        self.access = {"credential": credential, "options": IN_TURN}

    def prepare(self) -> None:
        if self.first is not None:
            self.save(self.url, self.first)

    @abstractmethod
    def begin(self) -> None:
        """Make the objects that one process keeps from one act to the next."""

    @abstractmethod
    def run(self) -> object: ...

    def check(self, error: BaseException | None, killed: bool, others: bool) -> str:
        """Assert the rule; return a text about what is there.

        Args:
            error: that `run` raised.
            killed: the process was killed, so that `run` returned nothing and raised nothing.
            others: another save or removal was carried out meanwhile.
        """
        now = self.version(self.url)
        allowed = {self.first, *self.made} | ({OTHER, None} if others else set())
        assert now in allowed, f"version {now} is there"
        if killed:
            return self.summary(now)
        if error is None:
            assert now in self.made or others, f"it returned, and {now} is there"
        else:
            error = error.failures[0][0] if isinstance(error, CheckpointException) else error
            assert isinstance(error, AzureCheckpointError), repr(error)
            if not isinstance(error, CommitUnknownError):
                assert now not in self.made - {self.first} or others, f"{now} is there in spite of {error!r}"
            if isinstance(error, (CommitConflictError, CheckpointReplacedError)):
                assert others, repr(error)
        unknown = isinstance(error, CommitUnknownError)
        return f"{self.summary(now)}{', unknown to the caller' if unknown else '' if error is None else ', an error'}"

    made: frozenset[int | None]  # versions that may be there after the act was carried out

    def summary(self, version: int | None) -> str:
        return {OLD: "old whole", NEW: "new whole", OTHER: "the other's whole", None: "none"}[version]

    def check_recovery(self) -> None:
        """Assert that a save succeeds, by the same writer if there is one, and that prune removes leftovers only."""
        self.save_next()
        assert self.version(self.url) == NEXT
        prune(self.container, grace=NO_GRACE, dry_run=False, **self.access)
        assert self.version(self.url) == NEXT
        assert set(self.blobs()) == set(self.live(self.url))

    def other_saves(self) -> None:
        self.save(self.url, OTHER)

    def other_removes(self) -> None:
        self.remove()

    # What is there

    def blobs(self) -> Iterator[str]:
        return (blob.path for blob in self.store().list(""))

    def store(self) -> BlobStore:
        return BlobStore(BlobLocation.parse(self.container), Access(self.access["credential"]))

    def save_next(self) -> None:
        self.save(self.url, NEXT)

    def save(self, url: str, version: int) -> None:
        dcp.save(_state(version), storage_writer=AzureBlobWriter(url, **self.access), no_dist=True)

    def remove(self) -> None:
        with contextlib.suppress(CheckpointNotFoundError):
            remove_checkpoint(self.url, **self.access)

    def version(self, url: str) -> int | None:
        """The version that loads, bit for bit; None where there is none."""
        loaded: dict[str, Any] = {**{name: torch.zeros(3) for name in _NAMES}, "version": None}
        try:
            dcp.load(loaded, storage_reader=AzureBlobReader(url, **self.access), no_dist=True)
        except CheckpointException as caught:
            error, _ = caught.failures[0]
            if isinstance(error, CheckpointNotFoundError):
                return None
            raise error from caught
        version: int = loaded["version"]
        for name in _NAMES:
            assert torch.equal(loaded[name], _state(version)[name]), f"{name} is not what version {version} had"
        return version

    def live(self, url: str) -> Iterator[str]:
        prefix = BlobLocation.parse(url).path
        yield f"{prefix}/.metadata"
        metadata = AzureBlobReader(url, **self.access).read_metadata()
        yield from {f"{prefix}/{info.relative_path}" for info in metadata.storage_data.values()}


_NAMES = ("weight", "bias")


def _state(version: int) -> dict[str, Any]:
    return {**{name: torch.full((3,), version + 1.0) for name in _NAMES}, "version": version}


class OverwritingSave(Act):
    name = "overwriting save"
    made = frozenset({NEW})

    def begin(self) -> None:
        self._writer = AzureBlobWriter(self.url, **self.access)

    def run(self) -> object:
        return dcp.save(_state(NEW), storage_writer=self._writer, no_dist=True)

    def save_next(self) -> None:
        dcp.save(_state(NEXT), storage_writer=self._writer, no_dist=True)


class FirstSave(OverwritingSave):
    name = "first save"
    first = None


class Removal(Act):
    name = "removal"
    made = frozenset({None})

    def begin(self) -> None:
        pass

    def run(self) -> object:
        return remove_checkpoint(self.url, **self.access)


class Prune(Act):
    """Removes one checkpoint of two, and leftovers beside the other one."""

    name = "prune"
    made = frozenset({OLD, None})  # either: prune keeps a checkpoint where it cannot tell

    def __init__(self, container: str, credential: Any) -> None:
        super().__init__(container, credential)
        self._stays = f"{self.container}/run/step-2"

    def prepare(self) -> None:
        super().prepare()
        self.save(self._stays, OLD)
        self.store().put(f"{BlobLocation.parse(self._stays).path}/{'ab' * 16}/__0_0.distcp", b"left over")

    def begin(self) -> None:
        pass

    def run(self) -> object:
        return prune(self.container, keep_last=1, grace=NO_GRACE, dry_run=False, **self.access)

    def check(self, error: BaseException | None, killed: bool, others: bool) -> str:
        result = super().check(error, killed, others)
        assert self.version(self._stays) == OLD
        return result

    def check_recovery(self) -> None:
        self.run()
        assert self.version(self._stays) == OLD
        # A checkpoint that was saved meanwhile is young, so prune may keep it.
        keeps = [self._stays] + ([self.url] if self.version(self.url) == OTHER else [])
        assert set(self.blobs()) == {path for url in keeps for path in self.live(url)}


class OverwritingModelSave(Act):
    """In the HuggingFace layout."""

    name = "overwriting save of a model"
    made = frozenset({NEW})

    def begin(self) -> None:
        self._writer = self._make()

    def run(self) -> object:
        self._save(self._writer, NEW)
        return None

    def save_next(self) -> None:
        self._save(self._writer, NEXT)

    def save(self, url: str, version: int) -> None:
        self._save(self._make(), version)

    def remove(self) -> None:
        index = f"{BlobLocation.parse(self.url).path}/model.safetensors.index.json"
        self.store().delete(index)

    def _make(self) -> AzureBlobHuggingFaceWriter:
        return AzureBlobHuggingFaceWriter(self.url, overwrite=True, **self.access)

    def _save(self, writer: AzureBlobHuggingFaceWriter, version: int) -> None:
        tensors = {name: _state(version)[name] for name in _NAMES}
        dcp.save(tensors, storage_writer=writer, no_dist=True)

    def version(self, url: str) -> int | None:
        loaded = {name: torch.zeros(3) for name in _NAMES}
        reader = AzureBlobHuggingFaceReader(url, **self.access)
        try:
            dcp.load(loaded, storage_reader=reader, no_dist=True)
        except CheckpointException as caught:
            error, _ = caught.failures[0]
            if isinstance(error, CheckpointNotFoundError):
                return None
            raise error from caught
        [value] = {float(number) for tensor in loaded.values() for number in tensor}
        return round(value) - 1

    def live(self, url: str) -> Iterator[str]:
        prefix = BlobLocation.parse(url).path
        data, _ = self.store().read(f"{prefix}/model.safetensors.index.json", limit=1 << 20)
        yield f"{prefix}/model.safetensors.index.json"
        yield from {f"{prefix}/{name}" for name in parse_index(data, "index").files.values()}


class FirstModelSave(OverwritingModelSave):
    name = "first save of a model"
    first = None


ACTS = (FirstSave, OverwritingSave, Removal, Prune, FirstModelSave, OverwritingModelSave)

# ---- Faults ----------------------------------------------------------------------------------------------------------

OTHERS = ("another saves", "another removes")
What = Fault | str
WHAT: tuple[What, ...] = (*Fault, *OTHERS)
Happening = tuple[int, What]  # at the request with this number, from 1 on


@pytest.fixture
def service() -> Iterator[MemoryService]:
    with MemoryService() as made, without_waiting():
        yield made


class Trial:
    """Runs one act again and again from the same beginning."""

    def __init__(self, service: MemoryService, kind: type[Act]) -> None:
        self.service = service
        self.act = kind(service.url, False)
        self.act.prepare()
        self._before = dict(service.blobs)

    def run(self, *happen: Happening) -> tuple[str, list[tuple[str, str]]]:
        """Run the act; return what is there afterwards, and the requests."""
        service, act = self.service, self.act
        service.calm()
        service.restore(self._before)
        act.begin()
        others: dict[What, Callable[[], object]] = dict(zip(OTHERS, (act.other_saves, act.other_removes), strict=True))
        service.at = {number: what if isinstance(what, Fault) else others[what] for number, what in happen}
        error: BaseException | None = None
        try:
            act.run()
        except BaseException as caught:  # torch's CheckpointException is one, and so is the end of the process
            error = caught
        seen, killed = service.seen, service.dead
        service.calm()
        try:
            result = act.check(error, killed, any(what in OTHERS for _, what in happen))
            if killed:
                act.begin()
            act.check_recovery()
        except BaseException as caught:
            where = [f"{what} at request {number} {seen[number - 1]}" for number, what in happen if number <= len(seen)]
            raise AssertionError(f"{act.name}: {where}; it raised {error!r}; requests: {seen}") from caught
        return result, seen

    def singles(self) -> Iterator[tuple[Happening, str, int]]:
        """Everything that can happen at each request of the undisturbed act; the result, and the number of requests."""
        _, seen = self.run()
        for number, what in itertools.product(range(1, len(seen) + 1), WHAT):
            result, after = self.run((number, what))
            yield (number, what), result, len(after)


def seconds(first: Happening, count: int) -> Iterator[Happening]:
    """Everything that can happen after the first of two things; the act with that one has `count` requests."""
    yield from itertools.product(range(first[0] + 1, count + 1), WHAT)


@pytest.mark.parametrize("kind", ACTS, ids=lambda kind: kind.name)
def test_one_fault_at_every_request(service: MemoryService, tally: Tally, kind: type[Act]) -> None:
    outcomes = Counter(result for _, result, _ in Trial(service, kind).singles())
    tally.add_all(f"{kind.name}, in memory: one fault or another writer at every request", outcomes)


# The number of the request of an undisturbed act that is the commit, or that deletes the metadata.
_DECIDES = {FirstSave: 4, OverwritingSave: 4, Removal: 3}


@pytest.mark.parametrize("kind", _DECIDES, ids=lambda kind: kind.name)
def test_two_faults_of_which_the_first_is_at_the_commit(service: MemoryService, tally: Tally, kind: type[Act]) -> None:
    """The part of the next test that every run makes."""
    trial = Trial(service, kind)
    outcomes: Counter[str] = Counter()
    for what in WHAT:
        first = (_DECIDES[kind], what)
        _, seen = trial.run(first)
        for second in seconds(first, len(seen)):
            outcomes[trial.run(first, second)[0]] += 1
    assert any("unknown" in result for result in outcomes)
    tally.add_all(f"{kind.name}, in memory: pairs of faults or other writers from the commit on", outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACTS, ids=lambda kind: kind.name)
def test_two_faults_at_every_pair_of_requests(service: MemoryService, tally: Tally, kind: type[Act]) -> None:
    trial = Trial(service, kind)
    outcomes: Counter[str] = Counter()
    for first, _, count in list(trial.singles()):
        for second in seconds(first, count):
            outcomes[trial.run(first, second)[0]] += 1
    tally.add_all(f"{kind.name}, in memory: every pair of faults or other writers at its requests", outcomes)


# ---- The same through the proxy ------------------------------------------------------------------------------------

# What the proxy can do as well. It kills no process: `tests/faults/test_crash_matrix.py` does.
PROXIED: dict[What, Sequence[Action]] = {
    Fault.CUT: [Cut("request")],
    Fault.LOST: [Cut("answer")],
    Fault.BUSY: [faults.Answer(503, "ServerBusy")],
    Fault.FAILED: [faults.Answer(500, "InternalError")],
    Fault.REFUSED: [faults.Answer(403, "AuthorizationFailure")],
    Fault.DAMAGED: [Flip(200)],
    Fault.TRUNCATED: [Cut(100, reset=False)],
}


def run_proxied(azurite: Azurite, container: str, kind: type[Act], *happen: Happening) -> tuple[str, int]:
    """As `Trial.run`; the act's container is new."""
    direct = kind(container, azurite.account_key)
    direct.prepare()
    with FaultProxy(azurite.endpoint) as proxy:
        act = kind(f"{proxy.endpoint}/{container.rpartition('/')[2]}", azurite.account_key)
        act.begin()
        ended: list[bool] = []
        others = dict(zip(OTHERS, (direct.other_saves, direct.other_removes), strict=True))
        for number, what in happen:
            actions = [Call(others[what], "request")] if what in OTHERS else PROXIED[what]
            proxy.when(_numbered(number, "Get Blob" if what is Fault.DAMAGED else None, ended)).do(*actions)
        error: BaseException | None = None
        try:
            act.run()
        except BaseException as caught:
            error = caught
        proxy.wait_until(lambda: proxy.in_flight == 0)
        count = proxy.count()
        try:
            result = direct.check(error, False, any(what in OTHERS for _, what in happen))
            ended.append(True)
            act.check_recovery()
        except BaseException as caught:
            raise AssertionError(f"{act.name}: {happen}; it raised {error!r}; requests: {proxy.log}") from caught
    return result, count


def _numbered(number: int, kind: Kind | None, ended: list[bool]) -> Callable[[Exchange], bool]:
    """A condition for the proxy: a request with this number, of this kind if one is given, until `ended` has any."""
    numbers = itertools.count(1)
    return lambda seen: next(numbers) == number and kind in (None, seen.kind) and not ended


@pytest.mark.parametrize("kind", [OverwritingSave, Removal, OverwritingModelSave], ids=lambda kind: kind.name)
def test_a_sample_of_the_pairs_through_the_proxy(azurite: Azurite, tally: Tally, kind: type[Act]) -> None:
    """A random sample, the same in every run."""
    chance = random.Random(kind.name)
    outcomes: Counter[str] = Counter()
    what = [*PROXIED, *OTHERS]
    with without_waiting():
        _, count = run_proxied(azurite, azurite.create_container(f"pairs-{chance.randrange(1 << 48):x}"), kind)
        for _ in range(25):
            # The second one may be at a request that only the first one causes.
            numbers = sorted(chance.sample(range(1, count + 2), 2))
            happen = [(number, chance.choice(what)) for number in numbers]
            container = azurite.create_container(f"pairs-{chance.randrange(1 << 48):x}")
            outcomes[run_proxied(azurite, container, kind, *happen)[0]] += 1
    tally.add_all(f"{kind.name}, through the proxy: a sample of pairs of faults or other writers", outcomes)
