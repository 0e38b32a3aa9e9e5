"""Puts tables and charts into docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import charts, tables
from tests.benchmarks.results import Part

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


def render(folder: Path, endpoint: str, parts: dict[str, Part]) -> None:
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
