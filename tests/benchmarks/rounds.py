"""Runs cases in interleaved rounds: A B C, A B C, ..., each in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from tests.benchmarks.endpoints import AzsinkEndpoint, Endpoint
from tests.benchmarks.measure import control
from tests.benchmarks.processes import CaseFailedError, Zygote, climit_block, run_climit
from tests.benchmarks.spec import MIB, REGIMES, WARM, AsyncCase, Case, Job, Regime

_PRELOAD = ["adlfs", "aiohttp", "azure.storage.blob.aio", "tests.benchmarks.clients", "torch.distributed.tensor"]
_RAW = ("obstore", "sdk")

Values = dict[str, float]


def run_rounds(
    endpoint: Endpoint, cases: Sequence[Case | AsyncCase], rounds: int, *, peer: Path | None, keep_seeds: bool
) -> tuple[dict[str, list[Values]], list[str]]:
    """Run every case once a round, with servers that are new in each round.

    Args:
        peer: the folder of azstoragetorch; None skips its cases.
        keep_seeds: keep what the loads of a round read until its end. Otherwise the server forgets it after each case.

    Returns:
        The values of each case by its name, a dict for each round; and the errors of cases that failed.
    """
    seen: dict[str, list[Values]] = defaultdict(list)
    errors = []
    wanted = [case for case in cases if _can_run(case, endpoint, peer)]
    for number in range(rounds):
        with endpoint, _Round(endpoint, peer, keep_seeds) as this_round:
            for position, case in enumerate(wanted):
                begin = time.monotonic()
                try:
                    values = this_round.run(case)
                except CaseFailedError as error:
                    errors.append(str(error))
                    print(error, file=sys.stderr)
                    continue
                seen[case.name].append(values)
                print(
                    f"{number + 1}.{position + 1}/{len(wanted)} {case.name}: {_summary(values)}"
                    f" ({time.monotonic() - begin:.1f} s)",
                    flush=True,
                )
    return seen, errors


class _Round:
    """The processes of one round, and what its loads read."""

    def __init__(self, endpoint: Endpoint, peer: Path | None, keep_seeds: bool) -> None:
        self._endpoint = endpoint
        self._peer = peer
        self._keep_seeds = keep_seeds
        self._seeds: dict[tuple[object, ...], str] = {}
        self._numbers = itertools.count()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Round:
        ca_files = [self._endpoint.address(regime).ca_file for regime in REGIMES.values() if self._endpoint.can(regime)]
        ca_file = next(filter(None, ca_files), None)
        self._main = Zygote(_PRELOAD, ca_file=ca_file)
        self._stack.callback(self._main.close)
        if self._peer is not None:
            self._other = Zygote(["tests.benchmarks.dcp_over_blobio"], search_first=self._peer, ca_file=ca_file)
            self._stack.callback(self._other.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, case: Case | AsyncCase) -> Values:
        regime = REGIMES[case.regime]
        loads = isinstance(case, Case) and case.step != "save" and case.client != "null"
        path = self._seed(case) if isinstance(case, Case) and loads else self._fresh()
        warm = self._fresh()
        if isinstance(case, Case) and loads and case.client != "climit":
            warm = self._seed(replace(case, tensors=WARM))
        self._endpoint.set_regime(regime, discard=not loads)
        if isinstance(case, Case) and case.client == "climit":
            values = self._climit(case, regime)
        else:
            zygote = self._other if isinstance(case, Case) and case.client == "azstoragetorch" else self._main
            values = zygote.run(Job(case, self._endpoint.address(regime), path, warm))
        if not self._keep_seeds and isinstance(self._endpoint, AzsinkEndpoint):
            self._endpoint.command(regime, "/__wipe")
            self._seeds.clear()
        return values

    def _fresh(self) -> str:
        return f"{self._endpoint.root}/{next(self._numbers)}"

    def _seed(self, case: Case) -> str:
        """Put there what a load of this case reads; return its path."""
        fast = Regime("seed", tls=REGIMES[case.regime].tls)
        client = {"climit": "climit"}.get(case.client, "obstore" if case.client in _RAW else "ours")
        # The blob of the C client has a fixed name, and one block for each of its requests.
        key = (fast.tls, client, case.tensors, case.connections if client == "climit" else 0)
        if self._seeds.get(key) is None:
            path = self._fresh()
            self._endpoint.set_regime(fast, discard=False)
            save = replace(case, client=client, step="save", ranks=1, checksums=True)
            if client == "climit":
                self._seed_climit(save, fast)
            else:
                self._main.run(Job(save, self._endpoint.address(fast), path, self._fresh()))
            self._seeds[key] = path
        return self._seeds[key]

    def _climit(self, case: Case, regime: Regime) -> Values:
        assert isinstance(self._endpoint, AzsinkEndpoint)
        port = urlsplit(self._endpoint.address(regime).account).port
        assert port is not None
        return run_climit(self._endpoint.folder, case, port, _payload(case))

    def _seed_climit(self, case: Case, regime: Regime) -> None:
        """The C client leaves its blocks uncommitted, under names that the SDK cannot say."""
        self._climit(case, regime)
        block = climit_block(case, _payload(case))
        names = "".join(f"<Latest>{offset:08d}</Latest>" for offset in range(0, _payload(case) // MIB, block))
        body = f"<?xml version='1.0' encoding='utf-8'?><BlockList>{names}</BlockList>"
        with contextlib.closing(control(self._endpoint.address(regime))) as connection:
            connection.request("PUT", "/devstoreaccount1/c/limit?comp=blocklist", body)
            assert connection.getresponse().status == 201


def _can_run(case: Case | AsyncCase, endpoint: Endpoint, peer: Path | None) -> bool:
    if not endpoint.can(REGIMES[case.regime]):
        return False
    if isinstance(case, AsyncCase):
        return True
    if case.client == "climit":
        return isinstance(endpoint, AzsinkEndpoint)
    return peer is not None or case.client != "azstoragetorch"


def _payload(case: Case) -> int:
    """Bytes of a state dict that is written ``COUNTxBYTES``."""
    count, size = map(int, case.tensors.partition("@")[0].split("x"))
    return count * size


def _summary(values: Values) -> str:
    if "MBps" not in values:
        return f"blocked {values['blocked']:.2f} s, saved in {values['save']:.2f} s, lost {values['lost']:.2f} s"
    return f"{values['MBps']:.0f} MB/s, {values['cpu_per_GiB']:.2f} CPU-s/GiB"
