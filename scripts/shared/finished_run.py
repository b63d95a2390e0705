"""Result of a finished run: its summary, and its failure where no update of some client was used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from scripts.shared.console import print_result, stderr
from scripts.shared.run_summary import summary_lines


@contextmanager
def unused_clients(log_dir: Path) -> Iterator[list[str]]:
    """Collect the failure of a completed run in which no update of some client was used; others are raised.

    Args:
        log_dir: log directory of the run.

    Yields:
        A list that receives the message of the failure.
    """
    from server.flower.flower_process import RunFailed
    from server.reporting.failure import read_failure
    from server.reporting.unused_clients import UnusedClients

    found: list[str] = []
    try:
        yield found
    except RunFailed:
        name, message = read_failure(log_dir) or ("", "")
        if name != UnusedClients.__name__:
            raise
        found.append(message)


def print_finished(log_dir: Path, *, failure: list[str], out: str, as_json: bool) -> None:
    """Print the summary of a finished run.

    Args:
        log_dir: log directory of the run.
        failure: see ``unused_clients``; its message goes to stderr.
        out: folder of the model; empty: none.
        as_json: print the summary as one JSON object.

    Raises:
        typer.Exit: code 1 after a failure.
        RuntimeError: there is no summary.
    """
    from server.reporting.summary import read_summary

    try:
        summary = read_summary(log_dir)
    except FileNotFoundError:
        model = f"; the model is in {out}" if out else ""
        raise RuntimeError(f"the summary could not be written, see {log_dir}/flower.log{model}") from None
    print_result(summary, as_json=as_json, lines=summary_lines(summary))
    for message in failure:
        stderr.print(f"fedgraft: error: {message}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(1)
