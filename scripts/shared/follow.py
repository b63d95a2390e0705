"""Follow-up of a run on a SuperLink to its end, with a live table, and its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import Interrupted, UserError
from scripts.shared.console import stderr
from scripts.shared.finished_run import print_finished, unused_clients

if TYPE_CHECKING:
    from server.flower.submission import Submission


def follow_to_end(submission: Submission, log_dir: Path, *, timeout: float | None, as_json: bool) -> None:
    """Follow a run on stderr, fetch its results and print its summary.

    Args:
        submission: of the run.
        log_dir: log directory on this machine.
        timeout: limit in seconds; None: no limit.
        as_json: print the summary as one JSON object.

    Raises:
        Interrupted: on Ctrl-C, after which the run goes on, or the run was requested to end.
        UserError: the ServerApp raised it.
        RunFailed: any other failure.
        typer.Exit: code 1 if no update of some client was used.
    """
    from server.flower.deployed_run import fetch_results, follow_run
    from server.reporting.live_table import following

    rounds = int(submission.values["num-rounds"])
    try:
        with unused_clients(log_dir) as failure, following(log_dir, num_rounds=rounds, console=stderr):
            follow_run(submission, log_dir, timeout=timeout)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; run {submission.run_id} goes on: `fedgraft resume {log_dir}` follows it, `fedgraft stop "
            f"{log_dir}` ends it"
        ) from None
    fetch_results(submission, log_dir)
    print_finished(log_dir, failure=failure, out=submission.out, as_json=as_json)


def recorded_submission(log_dir: Path) -> Submission:
    """Read the record of a submitted run from its log directory.

    Raises:
        UserError: there is none.
    """
    from server.flower.submission import SUBMISSION_FILE, read_submission

    if (submission := read_submission(log_dir)) is None:
        raise UserError(
            f"expected the log directory of `fedgraft submit`, found no {log_dir / SUBMISSION_FILE}"
        )
    return submission
