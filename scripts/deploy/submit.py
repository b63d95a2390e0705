"""Free TCP ports, submission of one job to a SuperLink, and the end of its processes, for `local.sh`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from configs.errors import Interrupted, UserError
from configs.values import parse_assignments
from federated.driver_watch import driver_mark
from scripts.shared.run_config import read_resumed_config
from server.flower.flower_process import (
    JOB_VARIABLE,
    RunFailed,
    flower_environment,
    free_ports,
    stop_job,
    wait_until_healthy,
    write_connection,
)
from server.flower.flower_run import RunConfigValues, end_run, interruption, run_and_wait
from server.flower.guard import guard
from server.state.run_lock import DRIVER_LOCK, holding

_STATUS = {UserError: 2, RunFailed: 1, Interrupted: 130}


def main() -> int:
    """Run one sub-command; returns the exit status: 0, 2 for bad input, 130 for an interruption, 1 for a failed run."""
    options = _parser().parse_args()
    try:
        if options.verb == "ports":
            print(*free_ports(options.count))
        elif options.verb == "stop":
            stop_job(options.job)
        elif options.verb == "guard":
            guard(options.job, driver_mark(options.pid), [options.folder])
        elif options.verb == "interrupt":
            end_run(options.log_dir)
        else:
            _run(options)
    except (UserError, RunFailed, Interrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        return _STATUS[type(error)]
    except KeyboardInterrupt:  # the second one, which ends at once
        return _STATUS[Interrupted]
    return 0


def _run(options: argparse.Namespace) -> None:
    run_config = _run_config(options)
    log_dir = Path(str(run_config["log-dir"])) if run_config.get("log-dir") else None
    wait_until_healthy(options.port)
    with ExitStack() as stack:
        if log_dir is not None:
            stack.enter_context(holding(log_dir, DRIVER_LOCK))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedgraft-submit-")))
        write_connection(scratch / "home", f"127.0.0.1:{options.port}")
        try:
            run_and_wait(
                options.app,
                run_config=run_config,
                env=flower_environment(scratch / "home", job=os.environ.get(JOB_VARIABLE, "")),
                scratch=scratch,
                log_file=options.log,
                timeout=options.timeout,
            )
        except KeyboardInterrupt:
            raise (interruption(log_dir) if log_dir else Interrupted("interrupted")) from None


def _run_config(options: argparse.Namespace) -> RunConfigValues:
    """Run configuration of the command line, or of the run that is continued."""
    assignments = parse_assignments(options.assignments)
    if options.resume is None:
        return assignments
    return read_resumed_config(options.resume, alone=not assignments).values()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    ports = verbs.add_parser("ports", help="print free TCP ports on loopback")
    ports.add_argument("count", type=int)
    stop = verbs.add_parser("stop", help="end every process started for a job")
    stop.add_argument("job")
    watch = verbs.add_parser(
        "guard", help="wait for the end of a process, then end every process started for a job"
    )
    watch.add_argument("job")
    watch.add_argument("pid", type=int, help="process id")
    watch.add_argument("folder", type=Path, help="temporary folder, removed at the end")
    interrupt = verbs.add_parser(
        "interrupt", help="have the run of a log directory save its model and end; wait until it has"
    )
    interrupt.add_argument("log_dir", type=Path)
    run = verbs.add_parser(
        "run", help="submit a job to the SuperLink on a loopback port and wait for its end"
    )
    run.add_argument("--app", type=Path, required=True, help="folder of the Flower app")
    run.add_argument("--port", type=int, required=True, help="port of the SuperLink")
    run.add_argument("--log", type=Path, required=True, help="file that receives the log of the run")
    run.add_argument(
        "--timeout", type=float, default=3600.0, help="time limit of the run in seconds (%(default)s)"
    )
    run.add_argument(
        "--resume",
        type=Path,
        metavar="LOG_DIR",
        help="continue the run of a log directory, with its settings",
    )
    run.add_argument("assignments", nargs="*", metavar="KEY=VALUE", help="run configuration")
    return parser


if __name__ == "__main__":
    sys.exit(main())
