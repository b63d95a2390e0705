"""Summary of a run, as ``summary.json`` in its log directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.output import write_json

SUMMARY_FILE = "summary.json"


def model_line(name: str, model: Mapping[str, Any], *, digits: int) -> str:
    """Line of the last or the best model: round, perplexity and folder.

    Args:
        name: ``last`` or ``best``.
        model: its entry of the summary.
        digits: decimals of the perplexity.
    """
    perplexity = "unknown" if model["perplexity"] is None else f"{model['perplexity']:.{digits}f}"
    where = f", in {model['out']}" if model.get("out") else ""
    return f"{name} model: round {model['round']}, perplexity {perplexity}{where}"


def write_summary(log_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary of a run, JSON types without NaN and infinities, to its log directory."""
    write_json(log_dir / SUMMARY_FILE, summary)


def read_summary(log_dir: Path) -> dict[str, Any]:
    """Read the summary of a finished run from its log directory."""
    return json.loads((log_dir / SUMMARY_FILE).read_text(encoding="utf-8"))


def clear_summary(log_dir: Path) -> None:
    """Remove the summary of an earlier run."""
    (log_dir / SUMMARY_FILE).unlink(missing_ok=True)
