"""``fedgraft resume``: follow-up of a submitted run again, or its continuation after a failure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scripts.shared.console import stderr
from scripts.shared.follow import follow_to_end
from scripts.shared.options import JsonFlag
from scripts.shared.run_config import PROJECT, read_resumed_config
from scripts.shared.run_options import ConnectionOptions, LogDirectory, Timeout
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from server.flower.connection import Connection
    from server.flower.submission import Submission


@verb
def resume(
    log_dir: LogDirectory,
    link: ConnectionOptions = ConnectionOptions(),
    timeout: Timeout = None,
    as_json: JsonFlag = False,
) -> None:
    """Follow a submitted run again after its terminal was lost, or continue it after its last completed round.

    A run that goes on is followed; a completed one is reported, its results fetched; one that failed, or was lost with
    its SuperLink, continues as a new run from the state in its log directory. That of `fedgraft simulate` does, too.
    """
    from server.flower.submission import read_submission
    from server.state.run_lock import DRIVER_LOCK, holding

    log_dir = log_dir.absolute()
    recorded = read_submission(log_dir)
    if recorded is None:
        read_resumed_config(
            log_dir, alone=True
        )  # refuses what is no log directory before anything is connected to
    connection = link.read(recorded.connection if recorded else None)
    with holding(log_dir, DRIVER_LOCK):
        submission = _running(recorded, connection) or _continued(recorded, connection, log_dir)
        follow_to_end(submission, log_dir, timeout=timeout, as_json=as_json)


def _running(recorded: Submission | None, connection: Connection) -> Submission | None:
    """The recorded run if it goes on or is completed on the SuperLink of ``connection``; else None."""
    from dataclasses import replace

    from server.flower.deployed_run import known_status

    if recorded is None:
        return None
    submission = replace(recorded, connection=connection)
    status = known_status(submission)
    if status is None or status.state in ("finished:failed", "finished:stopped"):
        return None
    stderr.print(f"run {submission.run_id} is {status.state}", highlight=False)
    return submission


def _continued(recorded: Submission | None, connection: Connection, log_dir: Path) -> Submission:
    """Submit the continuation of a run from its state."""
    from configs.schema import load_run_config
    from server.flower.deployed_run import submit_run

    if recorded is None or not recorded.server_folder:
        run = read_resumed_config(log_dir, alone=True)
        return submit_run(PROJECT, run, connection=connection)
    own = {"resume": True, "log-dir": str(log_dir), "out": recorded.out}
    run = load_run_config({**recorded.values, **own})
    return submit_run(PROJECT, run, connection=connection, server_folder=recorded.server_folder)
