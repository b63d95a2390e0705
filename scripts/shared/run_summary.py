"""Summary of a run as lines of text."""

from __future__ import annotations

from typing import Any


def summary_lines(summary: dict[str, Any]) -> list:
    """Format the summary of a run: a table of clients, then bytes, edits and paths."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

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
    lines += [_model_line(name, summary[name]) for name in ("last", "best") if summary.get(name)]
    for way in ("up", "down"):
        sent, dense = summary[f"bytes_{way}"], summary[f"bytes_{way}_dense"]
        ratio = f" ({dense / sent:.0f} times less)" if sent else ""
        lines.append(f"bytes {way}: {decimal(sent)}, dense FedAvg in bf16 {decimal(dense)}{ratio}")
    lines.append(f"graph edits: {summary['edits']}, graph {summary['graph_hash'][:12]}")
    errors = summary.get("log_errors", {}).items()
    lines += [f"the log file {file} is incomplete: {reason}" for file, reason in errors]
    lines.append(f"logs: {summary['log_dir']}")
    if summary["out"]:
        lines.append(f"model: {summary['out']}")
    return [table, *map(escape, lines)]


def _model_line(name: str, model: dict[str, Any]) -> str:
    """Round, perplexity and folder of the last or the best model."""
    perplexity = "unknown" if model["perplexity"] is None else f"{model['perplexity']:.2f}"
    where = f", in {model['out']}" if model.get("out") else ""
    return f"{name} model: round {model['round']}, perplexity {perplexity}{where}"
