"""Parts of the page: sections, tables, notes. Every text of a run is escaped here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Cell:
    """A number of a table: how it is shown, and all of its digits."""

    shown: str
    value: float


Content = str | Cell | None


def cell_of(value: float | None, form: str) -> Content:
    """Return a number as a cell, formatted by `form`, or nothing."""
    return None if value is None else Cell(format(value, form), value)


def section(title: str, *parts: str) -> str:
    """Return a section with a heading; "" where no part has content."""
    content = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def charts(*figures: str) -> str:
    """Return figures next to each other, as many as fit."""
    content = "".join(figures)
    return f'<div class="charts">{content}</div>' if content else ""


def notes(lines: Iterable[str]) -> str:
    """Return what a reader must know first; "" where there is nothing."""
    content = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{content}</ul>' if content else ""


def details(summary: str, content: str) -> str:
    """Return something that opens at a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def code(lines: Iterable[str]) -> str:
    """Return lines of a shell."""
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"


def table(head: Sequence[str], rows: Iterable[Iterable[Content]]) -> str:
    """Return a table that scrolls where it is wider than the page; "" without rows."""
    lines = ["".join(map(_cell, row)) for row in rows]
    if not lines:
        return ""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: Content) -> str:
    if content is None:
        return "<td class=none>-</td>"
    if isinstance(content, Cell):
        return f'<td class=number data-value="{content.value!r}">{escape(content.shown)}</td>'
    return f"<td>{escape(content)}</td>"
