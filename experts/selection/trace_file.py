"""Compression trace as a CSV table: writing, strict reading."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import UserError
from configs.output import write_bytes
from experts.selection.compression_trace import Averaging, CompressionTrace, Removal, Step

PLAN_FILE = "compression_plan.csv"
COLUMNS = tuple(Step(Removal(0, 0), 0, None, None, 1, 1, 0).row(1))


class _Row(BaseModel):
    """Executable columns of one step; ``other`` and figures that no step needs are not read."""

    model_config = ConfigDict(frozen=True)

    step: int
    layer: int = Field(ge=0)
    decoder_layer: int = Field(ge=0)
    action: Literal["prune", "merge"]
    expert: int = Field(ge=0)
    into: int | None = Field(ge=0)
    weight_cosine: float | None
    jaccard: float | None
    saliency_rank: float
    perplexity: float
    perplexity_loss: float
    weight_into: float | None = Field(ge=0, allow_inf_nan=False)
    weight_expert: float | None = Field(ge=0, allow_inf_nan=False)
    alignment: str | None


def write_trace(trace: CompressionTrace, path: Path) -> None:
    """Write the steps of a trace as CSV, atomically; a cell without a value is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(trace.rows)
    write_bytes(Path(path), text.getvalue().encode())


def read_trace(path: Path) -> list[Step]:
    """Read the steps of a trace file in order, each checked against those before it.

    Raises:
        UserError: no such file, a column missing, a malformed or incomplete step, an expert used after its removal.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected a compression plan (CSV), got {path}, which cannot be read: {error}"
        ) from None
    table = csv.DictReader(lines)
    missing = [name for name in _Row.model_fields if name not in (table.fieldnames or ())]
    if missing:
        raise UserError(
            f"expected a compression plan with the columns {', '.join(_Row.model_fields)}, got {path} without "
            f"{', '.join(missing)}; write it again with `fedgraft experts plan`"
        )
    try:
        rows = list(table)
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}: expected CSV, got {error}") from None
    steps = [_step(row, f"{path}, step {number}", number) for number, row in enumerate(rows, start=1)]
    _check_order(steps, path)
    return steps


def _step(row: dict[Any, Any], place: str, number: int) -> Step:
    try:
        found = _Row.model_validate(
            {name: value or None for name, value in row.items() if isinstance(name, str)}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where, expected = first["loc"][0], first["msg"].removeprefix("Input should be ")
        raise UserError(f"{place}: expected {where} to be {expected}, got {first['input']!r}") from None
    if found.step != number:
        raise UserError(f"{place}: expected steps 1, 2, ... in order, got step {found.step}")
    return Step(
        Removal(found.layer, found.expert, found.into),
        found.decoder_layer,
        found.weight_cosine,
        found.jaccard,
        found.saliency_rank,
        found.perplexity,
        found.perplexity_loss,
        averaging=_averaging(found, place),
    )


def _averaging(row: _Row, place: str) -> Averaging | None:
    given = (row.into, row.weight_into, row.weight_expert, row.alignment)
    if row.action == "prune":
        if given != (None,) * 4:
            raise UserError(f"{place}: expected no into, weights and alignment beside prune, got {given}")
        return None
    _, into, expert, alignment = given
    if row.into is None or into is None or expert is None or alignment is None:
        raise UserError(
            f"{place}: expected into, weight_into, weight_expert and alignment of a merge, got {given}"
        )
    return Averaging(into, expert, alignment)


def _check_order(steps: Sequence[Step], path: Path) -> None:
    removed: set[tuple[int, int]] = set()
    for number, step in enumerate(steps, start=1):
        layer, expert, into = step.removal.layer, step.removal.expert, step.removal.into
        if expert == into:
            raise UserError(
                f"{path}, step {number}: expected an expert to merge into another, got {into} into itself"
            )
        for used in (expert, into):
            if (layer, used) in removed:
                raise UserError(
                    f"{path}, step {number}: expected experts that are left, got {layer}:{used}, removed before"
                )
        removed.add((layer, expert))
