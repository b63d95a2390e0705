"""Free TCP ports, submission of one job to a SuperLink, and the end of its processes, for `local.sh`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from configs.errors import UserError
from configs.values import parse_assignments
from server.flower.flower_process import (
    JOB_VARIABLE,
    RunFailed,
    flower_environment,
    free_ports,
    stop_job,
    wait_until_healthy,
    write_connection,
)
from server.flower.flower_run import run_and_wait


def main() -> int:
    """Run one sub-command; returns the exit status: 0, 2 for bad input, 1 for a failed run."""
    options = _parser().parse_args()
    try:
        if options.verb == "ports":
            print(*free_ports(options.count))
        elif options.verb == "stop":
            stop_job(options.job)
        else:
            _run(options)
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def _run(options: argparse.Namespace) -> None:
    wait_until_healthy(options.port)
    with tempfile.TemporaryDirectory(prefix="fedgraft-submit-") as folder:
        scratch = Path(folder)
        write_connection(scratch / "home", f"127.0.0.1:{options.port}")
        run_and_wait(
            options.app,
            run_config=parse_assignments(options.assignments),
            env=flower_environment(scratch / "home", job=os.environ.get(JOB_VARIABLE, "")),
            scratch=scratch,
            log_file=options.log,
            timeout=options.timeout,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    ports = verbs.add_parser("ports", help="print free TCP ports on loopback")
    ports.add_argument("count", type=int)
    stop = verbs.add_parser("stop", help="end every process started for a job")
    stop.add_argument("job")
    run = verbs.add_parser(
        "run", help="submit a job to the SuperLink on a loopback port and wait for its end"
    )
    run.add_argument("--app", type=Path, required=True, help="folder of the Flower app")
    run.add_argument("--port", type=int, required=True, help="port of the SuperLink")
    run.add_argument("--log", type=Path, required=True, help="file that receives the log of the run")
    run.add_argument(
        "--timeout", type=float, default=3600.0, help="time limit of the run in seconds (%(default)s)"
    )
    run.add_argument("assignments", nargs="*", metavar="KEY=VALUE", help="run configuration")
    return parser


if __name__ == "__main__":
    sys.exit(main())
