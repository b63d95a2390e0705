"""Predicted cost of a round for Llama-2-7B with 50, 1,000 and 100,000 clients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scale.cost_model import Coefficients, Load, predict
from benchmarks.scale.settings import FULL, Size
from benchmarks.support.runner import RESULTS
from configs.errors import UserError

LLAMA_2_7B = Size("Llama-2-7B", 4096, 11008, 32, 64)
# Clients, and how many of them a round asks.
COHORTS = ((50, 25), (1_000, 100), (100_000, 1_000))
DENSITY = 0.006


def read_coefficients() -> Coefficients:
    """Coefficients of the committed full run.

    Raises:
        UserError: there is no such result.
    """
    path = RESULTS / "scale.json"
    if not path.is_file():
        raise UserError(
            f"expected the result of a full run in {path}, got none; run python -m benchmarks.scale"
        )
    return json.loads(path.read_text(encoding="utf-8"))["peers"]["coefficients"]


def predictions(coefficients: Coefficients) -> list[dict[str, Any]]:
    """Predictions for ``COHORTS``, with ``clients``, ``asked`` and, per asked client, ``up`` and ``down`` in bytes."""
    return [_prediction(coefficients, clients, asked) for clients, asked in COHORTS]


def llama_load(clients: int, asked: int) -> Load:
    """Load of a round in the long run: clients hold half of the experts, and all of those asked answer.

    A client lacks as many steps as rounds pass between two requests to it; the server keeps as many.

    Args:
        clients: N.
        asked: clients of a round, drawn uniformly.
    """
    gap = clients / asked
    return Load(
        asked=asked,
        used=asked,
        failed=0,
        weights=LLAMA_2_7B.weights,
        held=0.5,
        density=DENSITY,
        step_density=FULL.downlink_density,
        value_bits=FULL.value_bits,
        layers=LLAMA_2_7B.layers,
        experts=LLAMA_2_7B.experts,
        missing_steps=gap,
        missing_first=0,
        fresh=0,
        kept_steps=gap,
    )


def _prediction(coefficients: Coefficients, clients: int, asked: int) -> dict[str, Any]:
    found = predict(coefficients, llama_load(clients, asked))
    each = {"up": found["bytes_up"] / asked, "down": found["bytes_down"] / asked}
    return {"clients": clients, "asked": asked, **each, **found}


def prediction_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Table of predictions in Markdown."""
    head = (
        "| clients | asked | up, MB per client | down, MB per client | up, GB per round | down, GB per round "
    )
    lines = [head + "| CPU seconds per round | server memory, GB |", "|" + "---|" * 8]
    for row in rows:
        values = (
            f"{row['up'] / 1e6:.1f}",
            f"{row['down'] / 1e6:.0f}",
            f"{row['bytes_up'] / 1e9:.2f}",
            f"{row['bytes_down'] / 1e9:.1f}",
            f"{row['server_seconds']:.0f}",
            f"{row['peak_bytes'] / 1e9:.0f}",
        )
        lines.append(f"| {row['clients']:,} | {row['asked']:,} | " + " | ".join(values) + " |")
    return lines
