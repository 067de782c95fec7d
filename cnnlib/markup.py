"""Pieces of HTML that pages are made of: text that is safe, and tables that sort and scroll."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A cell of a table that sorts: what is shown, and the number or text that it is sorted by."""

    shown: str
    value: Any = None
    """None where nothing is known: such rows stay below the others, whichever way a table is sorted."""


def text_of(value: Any) -> str:
    """Anything as text that is safe between tags and in quotes."""
    return html.escape(str(value), quote=True)


def number_cell(value: int | float | None, form: str, scale: int = 1) -> Cell:
    """A number in a format such as `.2f`, multiplied for the eye by `scale`; a dash for None."""
    return Cell("-") if value is None else Cell(format(scale * value, form), value)


def sortable(label: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """A table whose headings are buttons that sort; a row is its name and its other cells."""
    head = "".join(f'<th scope="col"><button type="button">{text_of(column)}</button></th>' for column in columns)
    body = []
    for name, cells in rows:
        row = "".join(
            f'<td data-value="{text_of("" if cell.value is None else cell.value)}">{text_of(cell.shown)}</td>'
            for cell in cells
        )
        body.append(f'<tr><th scope="row">{text_of(name)}</th>{row}</tr>')
    caption = f'<caption class="unseen">{text_of(label)}</caption>'
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return scrolling(label, table)


def scrolling(label: str, table: str) -> str:
    """A place in which a table that is too wide is scrolled, with the keyboard as well."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{text_of(label)}">{table}</div>'


def folded(summary: str, content: str, is_open: bool = False) -> str:
    """Content that is shown when its summary is clicked."""
    return f"<details{' open' if is_open else ''}><summary>{text_of(summary)}</summary>{content}</details>"
