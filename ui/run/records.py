"""Records of a run as curves and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas

from ui.shared.html import table

Rows = Sequence[Mapping[str, Any]]
_MOST_CURVES = 6  # clients with a curve of their own
_MOST_EDITS = 200


def perplexities(rounds: Rows) -> pandas.DataFrame:
    """Held-out perplexity by round, over all clients and of each of few; columns round, clients, perplexity."""
    names = list(dict.fromkeys(client["name"] for row in rounds for client in row["clients"]))
    rows = []
    for row in rounds:
        rows.append((row["round"], "all", row["perplexity"]))
        if len(names) <= _MOST_CURVES:
            rows += [(row["round"], each["name"], each["perplexity"]) for each in row["clients"]]
    known = [each for each in rows if each[2] is not None]
    return pandas.DataFrame(known, columns=["round", "clients", "perplexity"])


def traffic(rounds: Rows) -> pandas.DataFrame:
    """Kilobytes sent up to each round, in both directions; columns round, direction, kilobytes."""
    rows = []
    for way in ("up", "down"):
        sent = accumulate(row[f"bytes_{way}"] for row in rounds)
        rows += [(row["round"], way, total / 1000) for row, total in zip(rounds, sent, strict=True)]
    return pandas.DataFrame(rows, columns=["round", "direction", "kilobytes"])


def state_line(log_dir: Path, rounds: Rows, summary: Mapping[str, Any] | None) -> str:
    """Sentence with rounds, perplexity, bytes and state of a run."""
    if not rounds:
        return f"{log_dir.name}: no round is complete yet."
    last = rounds[-1]
    state = "running or interrupted" if summary is None else summary.get("stopped") or "finished"
    sent = {way: sum(row[f"bytes_{way}"] for row in rounds) for way in ("up", "down")}
    dense = {way: sum(row[f"bytes_{way}_dense"] for row in rounds) for way in ("up", "down")}
    ways = []
    for way in ("up", "down"):
        ratio = f" ({dense[way] / sent[way]:,.0f} times less than dense)" if sent[way] else ""
        ways.append(f"{sent[way] / 1000:,.1f} kB {way}{ratio}")
    perplexity = "-" if last["perplexity"] is None else f"{last['perplexity']:.3f}"
    return (
        f"{log_dir.name}: round {last['round']}, {state}; perplexity {perplexity}; {', '.join(ways)}; "
        f"{sum(last['edges'])} edges."
    )


def rounds_table(rounds: Rows) -> str:
    """HTML table of the rounds, the latest first."""
    headers = (
        "round",
        "seconds",
        "train loss",
        "perplexity",
        "bytes up",
        "bytes down",
        "density",
        "edges",
        "refused",
    )
    rows = [
        (
            row["round"],
            float(row["seconds"]),
            _shown(row.get("train_loss")),
            _shown(row["perplexity"]),
            row["bytes_up"],
            row["bytes_down"],
            _shown(row["density"]),
            sum(row["edges"]),
            "; ".join(
                f"{client['name']}: {client['refused']}" for client in row["clients"] if client["refused"]
            )
            or "-",
        )
        for row in reversed(rounds)
    ]
    return table(headers, rows)


def edits_table(rewirings: Rows) -> str:
    """HTML table of the graph edits, the latest first."""
    rows = [
        (each["round"], edit["op"], edit["layer"], edit["p"], edit["q"], edit["reason"])
        for each in reversed(rewirings)
        for edit in each["edits"]
    ]
    return table(("round", "edit", "layer", "p", "q", "reason"), rows[:_MOST_EDITS])


def _shown(value: float | None) -> float | str:
    return "-" if value is None else float(value)
