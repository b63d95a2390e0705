"""Small pieces of HTML, escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in a box that scrolls; numbers are aligned to the right."""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in headers)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return (
        "<div class='fg-table' tabindex='0' role='region' aria-label='table'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def progress_bar(text: str, share: float | None) -> str:
    """A line of text over a progress bar, which moves without a value where the share is unknown."""
    value = "" if share is None else f" value='{share:.4f}'"
    return f"<div class='fg-progress' role='status'>{escape(text)}<progress max='1'{value}></progress></div>"


def note(text: str, *, error: bool = False) -> str:
    """A line of text; errors stand out."""
    kind = " fg-error" if error else ""
    return f"<p class='fg-note{kind}' role='status'>{escape(text)}</p>"


def _cell(value: Any) -> str:
    number = isinstance(value, int | float)
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<td{' class=fg-number' if number else ''}>{escape(shown)}</td>"
