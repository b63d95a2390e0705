"""Style sheets and scripts of the page, served inline from this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "assets"


@cache
def asset(name: str) -> str:
    """Text of a file in ``ui/assets``."""
    return (_FOLDER / name).read_text(encoding="utf-8")
