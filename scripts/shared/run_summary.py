"""Summary of a run as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MOST_NAMES = 8  # clients whose rounds of drift are listed one by one


def summary_lines(summary: dict[str, Any]) -> list:
    """Format the summary of a run: a table of clients, then bytes, edits and paths."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from server.reporting.summary import model_line

    table = Table("client", "budget", title="held-out perplexity of the global model")
    for column in ("before", "after", "after, personal"):
        table.add_column(column, justify="right")
    clients = summary["clients"]
    for client in clients:
        names = ("perplexity_before", "perplexity_after", "perplexity_after_personal")
        cells = ["-" if client[name] is None else f"{client[name]:.2f}" for name in names]
        table.add_row(
            escape(client["name"]), "-" if client["budget"] is None else str(client["budget"]), *cells
        )
    lines = [
        f"no update of {each['name']} was used: {each['refused']}" for each in clients if each["refused"]
    ]
    if summary["stopped"]:
        lines.append(f"stopped after round {summary['rounds']}: {summary['stopped']}")
    lines += [model_line(name, summary[name], digits=2) for name in ("last", "best") if summary.get(name)]
    for way in ("up", "down"):
        sent, dense = summary[f"bytes_{way}"], summary[f"bytes_{way}_dense"]
        ratio = f" ({dense / sent:.0f} times less)" if sent else ""
        lines.append(f"bytes {way}: {decimal(sent)}, dense FedAvg in bf16 {decimal(dense)}{ratio}")
    lines += _drift_lines(summary)
    lines.append(f"graph edits: {summary['edits']}, graph {summary['graph_hash'][:12]}")
    if summary.get("epsilon") is not None:
        lines.append(
            f"differential privacy of each client: epsilon {summary['epsilon']:.3f} at delta {summary['delta']:g}"
        )
    errors = summary.get("log_errors", {}).items()
    lines += [f"the log file {file} is incomplete: {reason}" for file, reason in errors]
    lines.append(f"logs: {summary['log_dir']}")
    if summary["out"]:
        lines.append(f"model: {summary['out']}")
    return [table, *map(escape, lines)]


def _drift_lines(summary: dict[str, Any]) -> list[str]:
    """One line with the rounds in which clients and the federation had drifted; none without any."""
    clients = {each["name"]: each.get("drift_rounds") for each in summary["clients"]}
    known = {name: _ranges(rounds) for name, rounds in clients.items() if rounds}
    if not known:
        return []
    names = ", ".join(f"{name} in rounds {rounds}" for name, rounds in known.items())
    some = names if len(known) <= _MOST_NAMES else f"{len(known)} clients"
    overall = _ranges(summary.get("drift_rounds", []))
    return [f"drift: {some}; the federation in {f'rounds {overall}' if overall else 'none'}"]


def _ranges(rounds: Sequence[int]) -> str:
    """Rising numbers as text, runs of neighbours as their ends: ``1, 4-6``."""
    runs: list[list[int]] = []
    for each in rounds:
        if runs and runs[-1][-1] == each - 1:
            runs[-1][1:] = [each]
        else:
            runs.append([each])
    return ", ".join("-".join(map(str, run)) for run in runs)
