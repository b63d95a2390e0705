"""``fedgraft stop``: the end of a submitted run, with its model saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from scripts.shared.console import print_result, stderr
from scripts.shared.follow import recorded_submission
from scripts.shared.options import JsonFlag
from scripts.shared.run_options import ConnectionOptions, LogDirectory
from scripts.shared.verb import verb


@verb
def stop(
    log_dir: LogDirectory,
    link: ConnectionOptions = ConnectionOptions(),
    now: Annotated[
        bool,
        typer.Option("--now", help="End the run at once, without its model; `fedgraft resume` continues it."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """End a submitted run: the server saves the model of the last completed round first."""
    from server.flower.deployed_run import stop_run

    log_dir = log_dir.absolute()
    recorded = recorded_submission(log_dir)
    submission = replace(recorded, connection=link.read(recorded.connection))
    if not now:
        stderr.print("the model is being saved", highlight=False)
    status = stop_run(submission, log_dir, now=now)
    result = {"run_id": submission.run_id, "state": status.state, "log_dir": str(log_dir)}
    print_result(result, as_json=as_json, lines=[f"run {submission.run_id}: {status.state}"])
