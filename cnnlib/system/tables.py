"""Print tables on a terminal and write tables in Markdown. If the terminal is too narrow, a table becomes lists."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

NARROW = {
    "connectivity": "connec-\ntivity",
    "parameters": "para-\nmeters",
    "connections": "connec-\ntions",
    "multiply-adds": "multiply-\nadds",
    "test accuracy %, 95 % interval": "test accuracy %,\n95 % interval",
    "seconds per lane": "s /\nlane",
    "lanes at a time": "lanes at\na time",
    "cycles": "cycles per\nlane-step",
}
"""Headers with line breaks, for tables that are wider than the terminal without them."""


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int = 1,
    padding: int = 0,
) -> None:
    """Print a table; if the terminal is too narrow, print each row as a list of its cells.

    The first `left` columns are aligned left, the others right. If the table would be too wide, the headers of `NARROW`
    replace long column names.
    """
    tables = [_table([shorter.get(name, name) for name in columns], rows, left, padding) for shorter in ({}, NARROW)]
    fitting = [table for table in tables if Console(width=1000).measure(table).maximum <= console.width]
    console.print()
    if fitting:
        console.print(fitting[0], markup=False, highlight=False)
    else:
        for title, *cells in rows:
            console.print(f"\n{title}", markup=False, highlight=False)
            for name, cell in zip(columns[1:], cells, strict=True):
                console.print(f"  {name}: {cell}", markup=False, highlight=False)
    console.print()


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int, padding: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, padding=(0, padding))
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table that ends in a newline. The first `left` columns are aligned left, the others right."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * left + " ---: |" * (len(columns) - left)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
