"""Measures saving and loading beside other ways to do it, and writes the figures into the documents.

tox -e bench                                       # against Azurite, small
tox -e bench -- --azsink FOLDER                    # against a server that is as fast as the wire
tox -e bench -- --azsink FOLDER --growth           # cost against bytes, tensors and connections too
tox -e bench -- --url https://ACCOUNT.blob.core.windows.net/CONTAINER
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import peer, plan, results
from tests.benchmarks.document import render
from tests.benchmarks.endpoints import AccountEndpoint, AzsinkEndpoint, AzuriteEndpoint, Endpoint
from tests.benchmarks.processes import ROOT
from tests.benchmarks.rounds import run_rounds
from tests.benchmarks.spec import SLOW, TLS, AsyncCase, Case

# Azurite moves some 100 MB/s and keeps all that it was ever sent.
_AZURITE_SCALE = 1 / 16


def main() -> int:
    options = _options()
    endpoint = _endpoint(options)
    scale = options.scale or (_AZURITE_SCALE if endpoint.name == "azurite" else 1.0)
    slow_or_not = SLOW if endpoint.can(SLOW) else TLS
    cases: dict[str, Sequence[Case | AsyncCase]] = {
        "compare": plan.compare(scale),
        "async": plan.asynchronous(scale, slow_or_not),
        "growth": plan.growth(scale),
    }
    path = options.output / "performance" / f"{endpoint.name}.json"
    parts = results.read(path)
    folder = None if options.without_azstoragetorch else peer.packages()
    failures: list[str] = []
    for name in options.parts:
        begin = time.monotonic()
        chosen = [case for case in cases[name] if re.search(options.only, case.name)]
        seen, errors = run_rounds(endpoint, chosen, options.rounds, peer=folder, keep_seeds=name != "growth")
        parts[name] = results.part(chosen, seen, scale, options.rounds)
        failures += errors
        print(f"{name}: {time.monotonic() - begin:.0f} s")
    if not options.only:
        results.write(path, parts)
        render(options.output, endpoint.name, parts)
    if failures:
        print(f"{len(failures)} runs of cases failed", file=sys.stderr)
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tox -e bench --", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--azsink", type=Path, metavar="FOLDER", help="folder with the programs azsink and climit")
    where.add_argument("--url", help="a container of a real account, reached with DefaultAzureCredential")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["compare", "async", "growth"],
        default=["compare", "async"],
        help="what to measure (default: compare async)",
    )
    parser.add_argument("--growth", action="store_true", help="measure growth too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, help="of all amounts of data (default: 1; 1/16 with Azurite)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cases with such a name; writes no document")
    parser.add_argument("--without-azstoragetorch", action="store_true", help="do not install and measure it")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="where performance.md is (default: docs)")
    options = parser.parse_args()
    if options.growth and "growth" not in options.parts:
        options.parts.append("growth")
    return options


def _endpoint(options: argparse.Namespace) -> Endpoint:
    if options.azsink is not None:
        return AzsinkEndpoint(options.azsink)
    if options.url is not None:
        return AccountEndpoint(options.url)
    return AzuriteEndpoint()


if __name__ == "__main__":
    sys.exit(main())
