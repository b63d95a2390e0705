"""One run on a SuperLink that outlasts the command: submission, follow-up to its end, results, request to end."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.schema import RunConfig
from server.flower.connection import Connection
from server.flower.flower_cli import FlowerOptions, RunStatus, end_at_once, known_runs, run_log, run_status
from server.flower.flower_process import (
    flower_environment,
    inherited_job,
    termination_as_interrupt,
    wait_until_healthy,
)
from server.flower.flower_run import empty_folder, finish_run, start_run
from server.flower.server_folder import LOGS, MODEL, ServerFolder
from server.flower.submission import Submission
from server.reporting.failure import clear_failure
from server.reporting.record_stream import write_records, writing_records
from server.reporting.run_log import clear_run
from server.reporting.summary import clear_summary, read_summary, write_summary
from server.state.run_lock import SERVER_LOCK, check_unused
from server.state.stop_request import clear_stop, request_stop

LOG_FILE = "flower.log"
_FETCHED = "fetched.txt"  # run id of the model that was copied to ``out``
POLL_SECONDS = 1.0
_START_SECONDS = 60.0  # for a SuperLink that was started just before
_FOREVER = 10.0 * 365 * 86400


@dataclass(frozen=True)
class FlowerCommands:
    """Environment of Flower's commands for one SuperLink.

    Attributes:
        env: environment variables, with a Flower home folder that names the SuperLink.
        scratch: temporary folder.
    """

    env: dict[str, str]
    scratch: Path

    @property
    def options(self) -> FlowerOptions:
        """Options of Flower's commands, with an empty working directory."""
        return {"env": self.env, "cwd": empty_folder(self.scratch)}


@contextmanager
def flower_commands(connection: Connection, *, wait: float = 10.0) -> Iterator[FlowerCommands]:
    """Flower's commands for a SuperLink, once it answers; the user's own Flower configuration is not changed.

    Args:
        connection: SuperLink.
        wait: seconds to wait for its answer.

    Raises:
        RunFailed: it does not answer.
        UserError: other TLS settings.
    """
    wait_until_healthy(connection, timeout=wait)
    with tempfile.TemporaryDirectory(prefix="fedgraft-") as scratch:
        home = Path(scratch) / "home"
        connection.write(home)
        yield FlowerCommands(flower_environment(home, job=inherited_job()), Path(scratch))


def submit_run(
    project: Path, run: RunConfig, *, connection: Connection, server_folder: str = ""
) -> Submission:
    """Submit a run to a SuperLink and record it in its log directory.

    Args:
        project: folder of the Flower app.
        run: run configuration; ``log-dir`` and ``out`` are folders of this machine.
        connection: SuperLink.
        server_folder: see ``Submission``.

    Raises:
        UserError: the log directory is in use, or the results of a SuperLink elsewhere could not be read.
        RunFailed: the SuperLink does not answer or refuses the run.
    """
    if not server_folder and not connection.is_loopback:
        raise UserError(
            f"expected `server_folder` for the SuperLink at {connection.address}, which writes logs and model on its "
            "own machine, got none; set [USER@]HOST:/FOLDER, or /FOLDER if it is mounted here, too"
        )
    values, log_dir = dict(run.values()), Path(run.log_dir)
    if server_folder:
        place = ServerFolder.parse(server_folder).folder
        values |= {"log-dir": str(place / LOGS), "out": str(place / MODEL) if run.out else ""}
    _clear(log_dir, keep=run.resume)
    with flower_commands(connection, wait=_START_SECONDS if connection.is_loopback else 10.0) as commands:
        run_id = start_run(project, run_config=values, env=commands.env, scratch=commands.scratch)
    submission = Submission(run_id, connection, values, run.out, server_folder)
    submission.write(log_dir)
    return submission


def follow_run(submission: Submission, log_dir: Path, *, timeout: float | None = None) -> None:
    """Follow a run to its end: its log and records appear in ``log_dir``.

    Args:
        submission: of the run.
        log_dir: log directory on this machine.
        timeout: limit in seconds; the run goes on after it; None: no limit.

    Raises:
        UserError: the ServerApp raised it.
        RunFailed: any other failure, or the timeout.
        Interrupted: the end of the run was requested.
        KeyboardInterrupt: on Ctrl-C, SIGTERM and the end of the terminal; the run goes on.
    """
    log_file = log_dir / LOG_FILE
    with ExitStack() as stack:
        stack.enter_context(termination_as_interrupt(signal.SIGTERM, signal.SIGHUP))
        commands = stack.enter_context(flower_commands(submission.connection))
        if submission.server_folder:
            stack.enter_context(writing_records(log_file, log_dir))
        finish_run(
            submission.run_id,
            log_dir=log_dir,
            env=commands.env,
            scratch=commands.scratch,
            log_file=log_file,
            timeout=timeout or _FOREVER,
        )


def fetch_results(submission: Submission, log_dir: Path) -> None:
    """Copy logs and model of a completed run from the SuperLink's machine, if they are on another one.

    The summary names the folders of this machine then.
    """
    if not submission.server_folder:
        return
    place = ServerFolder.parse(submission.server_folder)
    place.fetch_logs(log_dir)
    summary = read_summary(log_dir)
    if submission.out and summary["out"]:
        # The model of this run alone may be replaced: it was fetched before, or the user said so.
        overwrite = bool(submission.values["overwrite"]) or _was_fetched(submission, log_dir)
        place.fetch_model(Path(submission.out), overwrite=overwrite)
        (log_dir / _FETCHED).write_text(submission.run_id)
        summary["out"] = submission.out
    write_summary(log_dir, summary | {"log_dir": str(log_dir)})


def current_status(submission: Submission, log_dir: Path) -> RunStatus:
    """Status of a run; its records in ``log_dir`` are brought up to date.

    Raises:
        RunFailed: the SuperLink does not answer or does not know the run.
    """
    with flower_commands(submission.connection) as commands:
        status = run_status(submission.run_id, **commands.options)
        if submission.server_folder:
            log_file = commands.scratch / LOG_FILE
            log_file.write_text(run_log(submission.run_id, **commands.options))
            write_records(log_file, log_dir)
    return status


def known_status(submission: Submission) -> RunStatus | None:
    """Status of a run; None where the SuperLink does not know it, as after a restart without a database.

    Raises:
        RunFailed: the SuperLink does not answer.
    """
    with flower_commands(submission.connection) as commands:
        options = commands.options
        if submission.run_id not in known_runs(**options):
            return None
        return run_status(submission.run_id, **options)


def stop_run(submission: Submission, log_dir: Path, *, now: bool = False) -> RunStatus:
    """End a run; returns its final status.

    Args:
        submission: of the run.
        log_dir: log directory on this machine.
        now: terminate the ServerApp; otherwise it saves the model of the rounds so far first, which is waited for.

    Raises:
        RunFailed: the SuperLink does not answer, or the folder on its machine cannot be reached.
    """
    with flower_commands(submission.connection) as commands:
        options = commands.options
        status = run_status(submission.run_id, **options)
        if now and not status.finished:
            end_at_once(submission.run_id, **options)
        while not status.finished:
            if not now:  # a ServerApp that starts withdraws earlier requests
                _request_stop(submission, log_dir)
            time.sleep(POLL_SECONDS)
            status = run_status(submission.run_id, **options)
    if not submission.server_folder:
        clear_stop(log_dir)
    return status


def _was_fetched(submission: Submission, log_dir: Path) -> bool:
    path = log_dir / _FETCHED
    return path.is_file() and path.read_text() == submission.run_id


def _request_stop(submission: Submission, log_dir: Path) -> None:
    if submission.server_folder:
        ServerFolder.parse(submission.server_folder).request_stop()
    else:
        request_stop(log_dir)


def _clear(log_dir: Path, *, keep: bool) -> None:
    """Remove the records of an earlier run, which would be shown as those of this one; ``keep``: a continued run."""
    check_unused(log_dir, SERVER_LOCK)
    clear_failure(log_dir)
    clear_stop(log_dir)
    if not keep:
        clear_run(log_dir)
        clear_summary(log_dir)
