"""Parsers of configuration text: TOML files, ``key=value`` assignments, separated lists, partitions."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError, nearest

PARTITIONS = ("domain", "iid", "dirichlet:ALPHA", "natural:COLUMN")


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a TOML file of hyphenated keys; :class:`UserError` names the file and, if malformed, the line."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"expected a readable TOML file, got {str(path)!r}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"expected TOML in {str(path)!r}, got a syntax error: {error}") from None


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse ``key=value`` texts; values are TOML, or strings where they are not valid TOML.

    The last assignment of a key counts.
    """
    parsed = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(f"expected key=value, got {assignment!r}")
        parsed[key.strip()] = _parse_value(text.strip(), assignment)
    return parsed


def parse_partition(text: str) -> tuple[str, str]:
    """Split a partition into kind and argument, e.g. ``("dirichlet", "0.5")``; empty without argument."""
    kind, _, argument = text.partition(":")
    kinds = [known.partition(":")[0] for known in PARTITIONS]
    expected = f"expected partition to be one of {', '.join(PARTITIONS)}, got {text!r}"
    if kind not in kinds:
        raise UserError(expected + nearest(kind, kinds))
    if bool(argument) != (kind in ("dirichlet", "natural")):
        raise UserError(expected)
    if kind == "dirichlet" and not 0 < _number(argument) < float("inf"):
        raise UserError(f"expected the ALPHA of dirichlet:ALPHA to be a number above 0, got {argument!r}")
    return kind, argument


def parse_budgets(text: str) -> tuple[int, ...]:
    """Parse whole numbers above 0 separated by ``,``; empty text gives none."""
    parts = split_list(text, ",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(
            f"expected budgets to be whole numbers above 0 separated by ',', got {text!r}; "
            "a client that can hold all experts has their number"
        )
    return tuple(int(part) for part in parts)


def split_list(text: str, separator: str) -> tuple[str, ...]:
    """The stripped, non-empty parts of ``text``."""
    return tuple(part.strip() for part in text.split(separator) if part.strip())


def _parse_value(text: str, assignment: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        if text.startswith(("'", '"', "[")):
            raise UserError(f"expected a closed TOML string or list after '=', got {assignment!r}") from None
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list) else text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
