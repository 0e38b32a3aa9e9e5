"""Measures saving and loading beside other ways to do it, and writes the figures into the documents.

tox -e bench                                       # against Azurite, small
tox -e bench -- --azsink FOLDER                    # against a server that is as fast as the wire
tox -e bench -- --azsink FOLDER --growth           # cost against bytes, tensors and connections too
tox -e bench -- --azsink FOLDER --parts ranks      # coordination of many ranks, for scale.md
tox -e bench -- --url https://ACCOUNT.blob.core.windows.net/CONTAINER
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks import cases, charts, results, tables
from tests.benchmarks.endpoints import AccountEndpoint, AzsinkEndpoint, AzuriteEndpoint, Endpoint
from tests.benchmarks.processes import ROOT, azstoragetorch_folder
from tests.benchmarks.ranks import page
from tests.benchmarks.ranks import results as rank_results
from tests.benchmarks.ranks.run import Measurement, measure
from tests.benchmarks.results import Part
from tests.benchmarks.rounds import run_rounds
from tests.benchmarks.spec import SLOW, TLS, AsyncCase, Case

# Azurite moves some 100 MB/s and keeps all that it was ever sent.
_AZURITE_SCALE = 1 / 16

_TABLES: dict[str, tuple[str, Callable[[Part], str]]] = {
    "targets": ("compare", tables.target_table),
    "tables": ("compare", tables.compare_tables),
    "async": ("async", tables.async_table),
    "growth": ("growth", tables.growth_table),
}
_CHARTS: dict[str, Callable[[Part, Path, str], None]] = {
    "compare": charts.compare_charts,
    "async": charts.async_chart,
    "growth": charts.growth_charts,
}


def main() -> int:
    options = _options()
    endpoint = _endpoint(options)
    scale = options.scale or (_AZURITE_SCALE if endpoint.name == "azurite" else 1.0)
    slow_or_not = SLOW if endpoint.can(SLOW) else TLS
    of_parts: dict[str, Sequence[Case | AsyncCase]] = {
        "compare": cases.compare(scale),
        "async": cases.asynchronous(scale, slow_or_not),
        "growth": cases.growth(scale),
    }
    path = options.output / "performance" / f"{endpoint.name}.json"
    parts = results.read(path)
    failures: list[str] = []
    if "ranks" in options.parts:
        options.parts.remove("ranks")
        failures += _measure_ranks(options, endpoint)
    folder = None if options.without_azstoragetorch or not options.parts else azstoragetorch_folder()
    for name in options.parts:
        begin = time.monotonic()
        chosen = [case for case in of_parts[name] if re.search(options.only, case.name)]
        seen, errors = run_rounds(endpoint, chosen, options.rounds, peer=folder, keep_seeds=name != "growth")
        parts[name] = results.part(chosen, seen, scale, options.rounds)
        failures += errors
        print(f"{name}: {time.monotonic() - begin:.0f} s")
    if options.parts and not options.only:
        results.write(path, parts)
        _render(options.output, endpoint.name, parts)
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
        choices=["compare", "async", "growth", "ranks"],
        default=["compare", "async"],
        help="what to measure (default: compare async)",
    )
    parser.add_argument("--growth", action="store_true", help="measure growth too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, help="of all amounts of data (default: 1; 1/16 with Azurite)")
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="only cases with such a name; writes no document but scale.md, where the others keep their figures",
    )
    parser.add_argument(
        "--before", type=Path, metavar="FOLDER", help="a tree of an earlier version, which the part ranks measures too"
    )
    parser.add_argument("--without-azstoragetorch", action="store_true", help="do not install and measure it")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="where performance.md is (default: docs)")
    options = parser.parse_args()
    if options.growth and "growth" not in options.parts:
        options.parts.append("growth")
    return options


def _measure_ranks(options: argparse.Namespace, endpoint: Endpoint) -> list[str]:
    """Run the part ``ranks``, and write scale.md; return the errors."""
    path = options.output / "scale" / f"{endpoint.name}.json"
    found = rank_results.read(path)
    if options.before is not None:
        found.before = _commit(options.before)

    def keep(measurement: Measurement) -> None:
        print(f"{measurement.name}: {measurement.stopped or 'done'}", flush=True)
        found.keep(measurement)
        rank_results.write(path, found)

    failures = measure(endpoint, options.before, lambda name: bool(re.search(options.only, name)), keep)
    page.chart(found, path.with_name(f"{endpoint.name}-ranks.svg"))
    document = options.output / "scale.md"
    text = document.read_text(encoding="utf-8")
    for name, table in page.tables(found, rank_results.read(path.with_name("before.json"))).items():
        text = _filled(text, f"{endpoint.name} {name}", table)
    document.write_text(text, encoding="utf-8")
    return failures


def _commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _endpoint(options: argparse.Namespace) -> Endpoint:
    if options.azsink is not None:
        return AzsinkEndpoint(options.azsink)
    if options.url is not None:
        return AccountEndpoint(options.url)
    return AzuriteEndpoint()


def _render(folder: Path, endpoint: str, parts: dict[str, Part]) -> None:
    """Draw the charts of an endpoint, and fill the places of performance.md that are for its tables.

    A place is the text between the lines ``<!-- begin ENDPOINT TABLE -->`` and ``<!-- end ENDPOINT TABLE -->``, with
    a name of `_TABLES` for TABLE. The document need not have all of them.

    Args:
        folder: with performance.md; the charts are put into its folder ``performance``.
    """
    for name, part in parts.items():
        _CHARTS[name](part, folder / "performance", endpoint)
    document = folder / "performance.md"
    text = document.read_text(encoding="utf-8")
    for name, (of_part, table) in _TABLES.items():
        if of_part in parts:
            text = _filled(text, f"{endpoint} {name}", table(parts[of_part]))
    document.write_text(text, encoding="utf-8")


def _filled(text: str, place: str, content: str) -> str:
    before, begin, rest = text.partition(f"<!-- begin {place} -->\n")
    _, end, after = rest.partition(f"<!-- end {place} -->\n")
    return f"{before}{begin}\n{content}\n{end}{after}" if end else text


if __name__ == "__main__":
    sys.exit(main())
