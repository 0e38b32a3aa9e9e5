"""`Table`: rows and columns without rules, for terminals of any width and thousands of rows.

rich's own tables take 0.4 ms a row, mostly because they measure each cell three times.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.cells import cell_len, chop_cells
from rich.text import Text

__all__ = ["Table", "printable"]

_GAP = "  "
# Least width of the first column if it has to be folded.
_LEAST = 24


class Table:
    """Rows of one-line cells. The first cell of a row is a name, which may be folded.

    Args:
        columns: headings.
        right: headings of the columns that are aligned to the right.
    """

    def __init__(self, *columns: str, right: Sequence[str] = ()) -> None:
        self._columns = columns
        self._right = [column in right for column in columns]
        self._rows: list[tuple[Text | str, ...]] = []

    def add_row(self, *cells: Text | str) -> None:
        """Add a row, with one cell for each column. A `Text` must be printable already."""
        self._rows.append(tuple(printable(cell) if isinstance(cell, str) else cell for cell in cells))

    def lines(self, width: int) -> Iterator[Text]:
        """Yield the table's lines, none longer than `width`.

        If the columns do not fit, each row becomes a record: a line with the first cell, which is then not folded so
        that it can be copied from the terminal, and lines with the other cells beside their headings.
        """
        plain = [[str(cell) for cell in row] for row in (self._columns, *self._rows)]
        widths = [max(map(cell_len, column)) for column in zip(*plain, strict=True)]
        others = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
        if others + min(widths[0], _LEAST) > width:
            yield from self._records(width)
            return
        widths[0] = min(widths[0], width - others)
        yield from self._row([Text(column, "bold") for column in self._columns], plain[0], widths)
        for row, texts in zip(self._rows, plain[1:], strict=True):
            yield from self._row(row, texts, widths)

    def _row(self, cells: Sequence[Text | str], texts: list[str], widths: list[int]) -> Iterator[Text]:
        names = [texts[0]] if cell_len(texts[0]) <= widths[0] else chop_cells(texts[0], widths[0])
        line = Text()
        for number, (cell, text, width) in enumerate(zip(cells, texts, widths, strict=True)):
            text = text if number else names[0]
            space = " " * (width - cell_len(text))
            if number:
                line.append(_GAP)
            if self._right[number]:
                line.append(space)
            line.append(text, cell.style if isinstance(cell, Text) else None)
            if not self._right[number]:
                line.append(space)
        yield line
        for name in names[1:]:
            yield Text(name)

    def _records(self, width: int) -> Iterator[Text]:
        for name, *cells in self._rows:
            yield Text(str(name), "bold")
            line = Text(_GAP)
            for heading, cell in zip(self._columns[1:], cells, strict=True):
                if not str(cell):
                    continue
                pair = Text.assemble((f"{heading} ", "dim"), cell)
                if len(line) > len(_GAP):
                    if line.cell_len + len(_GAP) + pair.cell_len <= width:
                        line.append(_GAP)
                    else:
                        yield line
                        line = Text(_GAP)
                line.append_text(pair)
            yield line


def printable(text: str) -> str:
    """Escape control characters, which a terminal would obey, and characters that stdout cannot encode.

    Names in a container may hold any character.
    """
    if text.isprintable() and _encodes(text):
        return text
    return "".join(
        char if char.isprintable() and _encodes(char) else char.encode("unicode_escape").decode() for char in text
    )


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
