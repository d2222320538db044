"""Tables of a comparison, and how numbers are written in them."""

import math
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WIDTH = 120  # of a terminal


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]


def number(x: Any) -> str:
    """Four digits that count."""
    x = float(x)
    if not math.isfinite(x):
        return "-"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.{max(0, 3 - math.floor(math.log10(abs(x))))}f}" if abs(x) >= 0.001 else f"{x:.4g}"


def integer(x: float) -> str:
    return f"{x:,.0f}" if math.isfinite(x) else "-"


def span(bounds: tuple[float, float]) -> str:
    return f"[{number(bounds[0])}, {number(bounds[1])}]" if math.isfinite(bounds[0]) else "-"


def text(table: Table, width: int = WIDTH) -> str:
    """As lines of at most `width` characters.

    A table that is wider has each first cell on a line of its own; one that still is, each cell. What a terminal would
    obey, in names of runs that somebody else made, is "?".
    """
    header, *rows = [[_printable(shortened(cell, width - 2)) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_printable(table.title)]

    def line(row: list[str], widths: list[int]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    if sum(widths) + 2 * len(widths) - 2 <= width:
        return "\n".join([*lines, *(line(row, widths) for row in (header, *rows))])
    if sum(widths[1:]) + 2 * len(widths) - 2 <= width:
        lines.append(line(["", *header[1:]], [0, *widths[1:]]))
        return "\n".join([*lines, *(part for row in rows for part in (row[0], line(["", *row[1:]], [0, *widths[1:]])))])
    names = [shortened(name, 60) for name in header[1:]]
    for row in rows:
        left = max(map(len, names))
        cells = zip(names, row[1:], strict=True)
        lines += [row[0], *(f"  {name:<{left}}  {shortened(cell, width - left - 4)}" for name, cell in cells)]
    return "\n".join(lines)


def wrapped(notes: Iterable[str], indent: str = "") -> str:
    """Notes under a table in lines of at most `WIDTH` characters, or as many as the terminal has if it has fewer."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 1)).columns)
    wrap = textwrap.TextWrapper(width, indent, indent + "  ", break_on_hyphens=False)
    return "\n".join(wrap.fill(_printable(note)) for note in notes)


def shortened(text: str, width: int) -> str:
    """With an ellipsis in place of its middle where it is longer; names of runs differ most at their end."""
    head = (width - 1) // 3
    return text if len(text) <= width else f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def markdown(table: Table) -> str:
    rows = [table.header, *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(table.header) + "|", *lines[1:]])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
