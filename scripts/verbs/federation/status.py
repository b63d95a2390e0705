"""``fedgraft status``: state and progress of a submitted run, or the runs and nodes of a SuperLink."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.shared.console import print_result
from scripts.shared.follow import recorded_submission
from scripts.shared.options import JsonFlag
from scripts.shared.run_options import ConnectionOptions
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from server.flower.connection import Connection


@verb
def status(
    log_dir: Annotated[
        Path | None,
        typer.Argument(
            metavar="[LOG_DIR]",
            help="Log directory of a submitted run; without it all runs and SuperNodes are listed.",
        ),
    ] = None,
    link: ConnectionOptions = ConnectionOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Show state and progress of a submitted run, or the runs and SuperNodes of a SuperLink."""
    if log_dir is None:
        result = _superlink(link.read())
        lines = [
            f"{kind[:-1]} {key}: {state}" for kind in ("runs", "nodes") for key, state in result[kind].items()
        ]
        return print_result(result, as_json=as_json, lines=lines or ["no runs, no nodes"])
    result = _run(log_dir.absolute(), link)
    return print_result(result, as_json=as_json, lines=[_line(result), f"logs: {result['log_dir']}"])


def _superlink(connection: Connection) -> dict[str, Any]:
    from server.flower.deployed_run import flower_commands
    from server.flower.flower_cli import known_nodes, known_runs

    with flower_commands(connection) as commands:
        return {"runs": known_runs(**commands.options), "nodes": known_nodes(**commands.options)}


def _run(log_dir: Path, link: ConnectionOptions) -> dict[str, Any]:
    from dataclasses import replace

    from server.flower.deployed_run import current_status
    from server.reporting.run_log import read_rounds

    submission = recorded_submission(log_dir)
    submission = replace(submission, connection=link.read(submission.connection))
    found = current_status(submission, log_dir)
    rounds = read_rounds(log_dir)
    return {
        "run_id": submission.run_id,
        "state": found.state,
        "details": found.details,
        "rounds": rounds[-1]["round"] if rounds else 0,
        "num_rounds": int(submission.values["num-rounds"]),
        "perplexity": rounds[-1]["perplexity"] if rounds else None,
        "bytes_up": sum(row["bytes_up"] for row in rounds),
        "bytes_down": sum(row["bytes_down"] for row in rounds),
        "log_dir": str(log_dir),
    }


def _line(result: dict[str, Any]) -> str:
    perplexity = "" if result["perplexity"] is None else f", perplexity {result['perplexity']:.2f}"
    return f"run {result['run_id']}: {result['state']}, round {result['rounds']} of {result['num_rounds']}{perplexity}"
