"""Every pair of faults at the requests of a save, a removal, a clean-up: the checkpoint is the old one or the new one.

The pairs run against `tests/support/memory_service.py`, with the package's code from the socket up; a sample of them
runs through the proxy against Azurite as well. A pair is two requests of one act, each with a fault or with another
writer just before it. The second may be the retry of the first one, or the request that finds its outcome. Retries do
not wait.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from azure_torch_ckpt.emulator import Azurite
from tests.faults.acts import ACTS, Act, FirstSave, OverwritingModelSave, OverwritingSave, Removal
from tests.faults.tally import Tally
from tests.support import faults
from tests.support.faults import Action, Call, Cut, Exchange, Flip, Kind
from tests.support.memory_service import Fault, MemoryService
from tests.support.proxy import FaultProxy
from tests.support.waits import without_waiting

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

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
