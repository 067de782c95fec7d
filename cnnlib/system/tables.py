"""Print tables on a terminal and write tables in Markdown. If the terminal is too narrow, a table becomes lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int = 1,
    headers: Mapping[str, str] | None = None,
    padding: int = 0,
) -> None:
    """Print a table; if the terminal is too narrow, print each row as a list of its cells.

    The first `left` columns are aligned left, the others right. `headers` maps a column name to the text to show.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, padding=(0, padding))
    for index, name in enumerate(columns):
        header = (headers or {}).get(name, name)
        table.add_column(header, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print()
    if Console(width=1000).measure(table).maximum <= console.width:
        console.print(table, markup=False, highlight=False)
    else:
        for title, *cells in rows:
            console.print(f"\n{title}", markup=False, highlight=False)
            for name, cell in zip(columns[1:], cells, strict=True):
                console.print(f"  {name}: {cell}", markup=False, highlight=False)
    console.print()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table that ends in a newline. The first `left` columns are aligned left, the others right."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * left + " ---: |" * (len(columns) - left)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
