"""One run of a Flower app: staging of the bundle, submission, and cause of a failure."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from configs.errors import Interrupted, UserError
from server.flower.flower_cli import ANSI, RunStatus, submit
from server.flower.flower_process import RunFailed
from server.flower.run_waiting import wait_for_run
from server.reporting.failure import clear_failure, read_failure
from server.state.run_lock import SERVER_LOCK, check_unused, wait_until_unused
from server.state.stop_request import StopRequested, request_stop

APP_SUFFIXES = frozenset(
    {".py", ".toml", ".json", ".jsonl", ".yaml", ".yml", ".md"}
)  # file types of a bundle
_EXCEPTION = re.compile(r"^((?:\w+\.)*[A-Z]\w*)(?:: (.*))?$")
# Message of the exception that Flower raises from the cause when the thread of the simulation ends.
_WRAPPER = "An error was encountered. Ending simulation."

_log = logging.getLogger(__name__)

RunConfigValues = Mapping[str, bool | int | float | str]


def run_and_wait(
    project: Path,
    *,
    run_config: RunConfigValues,
    env: Mapping[str, str],
    scratch: Path,
    log_file: Path,
    timeout: float,
    federation_config: Mapping[str, int | float] | None = None,
) -> None:
    """Submit a Flower app to a SuperLink and wait for the end of the run.

    Args:
        project: folder of the app.
        run_config: run configuration; the ServerApp leaves ``failure.json`` in its ``log-dir``.
        env: environment of Flower's commands, which names the SuperLink.
        scratch: folder for temporary files.
        log_file: destination of the run's log.
        timeout: limit of the run in seconds.
        federation_config: resources of simulated clients.

    Raises:
        UserError: the ServerApp raised it, or another ServerApp uses the log directory.
        RunFailed: any other failure.
        KeyboardInterrupt: on Ctrl-C, after the ServerApp has saved the model of the rounds so far.
        Interrupted: the end of the run was requested otherwise.
    """
    log_dir = Path(str(run_config["log-dir"])) if run_config.get("log-dir") else None
    if log_dir is not None:
        check_unused(log_dir, SERVER_LOCK)
    clear_failure(log_dir)
    run_id = start_run(
        project, run_config=run_config, env=env, scratch=scratch, federation_config=federation_config
    )
    try:
        finish_run(run_id, log_dir=log_dir, env=env, scratch=scratch, log_file=log_file, timeout=timeout)
    except KeyboardInterrupt:
        if log_dir is not None:
            end_run(log_dir)
        raise


def start_run(
    project: Path,
    *,
    run_config: RunConfigValues,
    env: Mapping[str, str],
    scratch: Path,
    federation_config: Mapping[str, int | float] | None = None,
) -> str:
    """Submit a Flower app to a SuperLink; returns the run id. Arguments and errors as ``run_and_wait``."""
    app = stage_app(Path(project), scratch / "app")
    config_file = scratch / "run-config.toml"
    config_file.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
    cwd = empty_folder(scratch)
    return submit(app, config_file=config_file, federation_config=federation_config, env=env, cwd=cwd)


def finish_run(
    run_id: str,
    *,
    log_dir: Path | None,
    env: Mapping[str, str],
    scratch: Path,
    log_file: Path,
    timeout: float,
) -> None:
    """Wait for the end of a run; raises the cause of a failure, see ``run_and_wait``.

    Args:
        run_id: of the run.
        log_dir: folder with the ``failure.json`` of its ServerApp; None: there is none.
        env: environment of Flower's commands, which names the SuperLink.
        scratch: folder for temporary files.
        log_file: destination of the run's log.
        timeout: limit in seconds.
    """
    status = wait_for_run(run_id, env=env, cwd=empty_folder(scratch), log_file=log_file, timeout=timeout)
    failure = read_failure(log_dir)
    if log_dir is not None and failure and failure[0] == StopRequested.__name__:
        raise interruption(log_dir)
    raise_for_status(status, log_file, failure=failure)


def end_run(log_dir: Path) -> None:
    """Request that the run of a log directory ends, and wait until its ServerApp has saved the model and ended."""
    _log.warning("interrupted: the model is being saved; interrupt again to end at once without it")
    request_stop(log_dir)
    wait_until_unused(log_dir, SERVER_LOCK)


def interruption(log_dir: Path) -> Interrupted:
    """Exception of an interrupted run, which says what is saved, from its log directory."""
    from server.rounds.interruption import interruption_line  # takes seconds: it opens models

    return Interrupted(interruption_line(log_dir))


def empty_folder(scratch: Path) -> Path:
    """Create the working directory of Flower's processes, empty because Ray puts it before the app on ``sys.path``."""
    folder = scratch / "empty"
    folder.mkdir(exist_ok=True)
    return folder


def stage_app(project: Path, target: Path) -> Path:
    """Copy the files of ``project`` that Flower may bundle to ``target``; returns ``target``.

    Hidden folders, caches and file types that a bundle never holds are left out: Flower walks every file of a
    project before it filters, which takes seconds where the project holds a virtual environment.
    """

    def unwanted(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if not _may_be_bundled(Path(folder, name))}

    shutil.copytree(project, target, ignore=unwanted)
    return target


def raise_for_status(status: RunStatus, log_file: Path, *, failure: tuple[str, str] | None = None) -> None:
    """Raise the cause of a run that did not complete.

    Args:
        status: final status.
        log_file: log of the run, parsed for the cause where ``failure`` is None.
        failure: class name and message of the exception that the ServerApp recorded; None: its process ended first.

    Raises:
        UserError: the app raised it.
        RunFailed: any other cause.
    """
    if status.state == "finished:completed":
        return
    name, message = failure or root_cause(log_file.read_text(encoding="utf-8", errors="replace"))
    if name.rpartition(".")[2] == UserError.__name__:
        raise UserError(message)
    cause = ": ".join(part for part in (name, message) if part) or status.details
    raise RunFailed(f"the run ended as {status.state}: {cause} (log: {log_file})")


def root_cause(log: str) -> tuple[str, str]:
    """Class name and first message line of the last exception in a log; two empty strings without one."""
    found = ("", "")
    in_traceback = False
    for line in ANSI.sub("", log).splitlines():
        if line.startswith("Traceback (most recent call last):"):
            in_traceback = True
        elif in_traceback and (match := _EXCEPTION.match(line)):
            in_traceback = False
            if match[2] != _WRAPPER:
                found = (match[1], match[2] or "")
    return found


def _may_be_bundled(path: Path) -> bool:
    if path.name in ("LICENSE", ".gitignore"):
        return True
    if path.name.startswith(".") or path.is_symlink() or path.name == "__pycache__":
        return False
    return path.is_dir() or path.suffix in APP_SUFFIXES
