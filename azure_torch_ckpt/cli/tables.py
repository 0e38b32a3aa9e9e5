"""Tables without lines, for terminals of any width; thousands of rows take no time that anybody would notice.

(rich's own take 0.4 ms a row, most of it to measure each cell three times.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len, chop_cells
from rich.text import Text

__all__ = ["Table"]

_GAP = "  "
# So wide is the first column at least, where it has to be folded.
_LEAST = 24


class Table:
    """Rows of cells, each a line, of which the first is a name that may be folded.

    Args:
        columns: their headings.
        right: those of them whose cells are aligned to the right.
    """

    def __init__(self, *columns: str, right: Sequence[str] = ()) -> None:
        self._columns = columns
        self._right = [column in right for column in columns]
        self._rows: list[tuple[Text | str, ...]] = []

    def add_row(self, *cells: Text | str) -> None:
        """One cell for each column."""
        self._rows.append(cells)

    def lines(self, width: int) -> Iterator[Text]:
        """The table, no line of it longer than `width`.

        Where it cannot be had so, each row has lines of its own: the first cell, which is not folded then, so that it
        can be copied from the terminal; and the others with their headings.
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
