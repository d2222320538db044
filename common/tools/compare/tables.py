"""Tables of a comparison, and how numbers are written in them."""

import math
from dataclasses import dataclass
from typing import Any


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


def text(table: Table) -> str:
    """As lines. What a terminal would obey, in names of runs that somebody else made, is "?"."""
    header, *rows = [[_printable(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_printable(table.title)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(table: Table) -> str:
    rows = [table.header, *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(table.header) + "|", *lines[1:]])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
