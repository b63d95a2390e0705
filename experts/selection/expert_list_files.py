"""Validated reading of the two formats of an expert list: an editable CSV table, and JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from configs.errors import UserError, nearest
from experts.versioned_json import read_versioned_json

VERSION = "1.0"
COLUMNS = ("layer", "expert", "rank_sum", "action")
ACTIONS = ("keep", "prune", "merge")

_EXPERT_IDS = TypeAdapter(list[Annotated[int, Field(ge=0)]], config=ConfigDict(strict=True))

Layer = tuple[np.ndarray, dict[int, float]]
"""Kept experts of a layer, sorted int64, and rank sums by expert (empty in JSON)."""


def read_list(path: Path) -> dict[int, Layer]:
    """Read the layers of an expert list in order; CSV where the name ends in ``.csv``, else JSON.

    Raises:
        UserError: as ``experts.selection.expert_list.load_expert_list``.
    """
    layers = _read_csv(path) if path.suffix.lower() == ".csv" else _read_json(path)
    if not layers:
        raise UserError(f"expected an expert list with at least one layer, got {path} without any")
    return dict(sorted(layers.items()))


def _read_csv(path: Path) -> dict[int, Layer]:
    try:
        # Spreadsheet programs put a byte order mark in front.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"expected an expert list, got {path}, which is not there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected an expert list in CSV, got {path}, which cannot be read: {error}"
        ) from None
    table = csv.DictReader(lines, skipinitialspace=True)
    missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
    if missing:
        raise UserError(
            f"expected an expert list with the columns {', '.join(COLUMNS)}, got {path} without {', '.join(missing)}"
        )
    kept: dict[int, list[int]] = {}
    ranks: dict[int, dict[int, float]] = {}
    for row in _rows(table, path):
        layer, expert, rank, action = _parse_row(row, f"{path}, line {table.line_num}")
        if expert in ranks.setdefault(layer, {}):
            raise UserError(f"{path}, line {table.line_num}: expert {expert} of layer {layer} is there twice")
        ranks[layer][expert] = rank
        kept.setdefault(layer, []).extend([expert] if action == "keep" else [])
    return {layer: (_ids(kept[layer]), ranks[layer]) for layer in ranks}


def _rows(table: csv.DictReader, path: Path) -> Iterator[dict[Any, Any]]:
    try:
        yield from table
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}: expected CSV, got {error}") from None


def _parse_row(row: Mapping[Any, Any], place: str) -> tuple[int, int, float, str]:
    layer, expert = (_number(row[name], int, name, place) for name in ("layer", "expert"))
    # Ranks are optional: a table made by hand has none.
    rank = _number(row["rank_sum"] or "nan", float, "rank_sum", place)
    action = (row["action"] or "").strip().lower()
    if action not in ACTIONS:
        raise UserError(
            f"{place}: expected an action of {', '.join(ACTIONS)}, got {action!r}{nearest(action, ACTIONS)}"
        )
    if layer < 0 or expert < 0:
        raise UserError(f"{place}: expected layer and expert of at least 0, got {layer} and {expert}")
    return layer, expert, rank, action


def _number(text: str | None, kind: type, name: str, place: str) -> Any:
    try:
        return kind(text)
    except (TypeError, ValueError):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{place}: expected {what} as {name}, got {text!r}") from None


def _read_json(path: Path) -> dict[int, Layer]:
    value = read_versioned_json(path, what="an expert list", version=VERSION)
    keep_map = value.get("keep_map")
    if not isinstance(keep_map, dict):
        raise UserError(f"expected an expert list with keep_map, layers to expert ids, got {path} without it")
    layers: dict[int, Layer] = {}
    for name, experts in keep_map.items():
        if not name.isdecimal() or int(name) in layers:
            raise UserError(f"{path}: expected keep_map to name each layer once by its number, got {name!r}")
        try:
            _EXPERT_IDS.validate_python(experts)
        except ValidationError:
            raise UserError(
                f"{path}, layer {name}: expected a list of expert ids, got {str(experts)[:80]}"
            ) from None
        if len(set(experts)) < len(experts):
            raise UserError(f"{path}, layer {name}: expected every expert once, got {str(experts)[:80]}")
        layers[int(name)] = _ids(experts), {}
    return layers


def _ids(experts: list[int]) -> np.ndarray:
    try:
        return np.sort(np.asarray(experts, dtype=np.int64))
    except OverflowError:
        raise UserError(f"expected expert ids of at most 63 bits, got {max(experts)}") from None
