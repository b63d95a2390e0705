"""``fedgraft submit``: a federation on a SuperLink, followed to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scripts.shared.console import print_result
from scripts.shared.follow import follow_to_end
from scripts.shared.options import JsonFlag
from scripts.shared.run_config import PROJECT, read_run_config
from scripts.shared.run_options import ConnectionOptions, RunConfigFile, RunOptions, Settings, Timeout
from scripts.shared.verb import verb


@verb
def submit(
    options: RunOptions = RunOptions(),
    link: ConnectionOptions = ConnectionOptions(),
    config: RunConfigFile = None,
    settings: Settings = None,
    server_folder: Annotated[
        str,
        typer.Option(
            help="[[USER@]HOST:]/FOLDER of the run on the SuperLink's machine, reached over SSH or mounted here, from "
            "which logs and model are copied; not needed where the SuperLink runs on this machine."
        ),
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Return once the run is submitted.")] = False,
    timeout: Timeout = None,
    as_json: JsonFlag = False,
) -> None:
    """Train and rewire an expert graph on a SuperLink and its SuperNodes, as simulate does on this machine.

    The run outlasts this command: `fedgraft resume LOG_DIR` follows it again, `fedgraft stop LOG_DIR` ends it. Paths of
    graph and data are those of the machines of the SuperLink and the SuperNodes.
    """
    from configs.output import check_output_directory
    from server.flower.deployed_run import submit_run
    from server.state.run_lock import DRIVER_LOCK, holding

    run = read_run_config(config, options.values(), settings or [])
    connection, log_dir = link.read(), Path(run.log_dir)
    if run.out and (server_folder or connection.is_loopback):
        check_output_directory(Path(run.out), overwrite=run.overwrite)
    with holding(log_dir, DRIVER_LOCK):
        submission = submit_run(PROJECT, run, connection=connection, server_folder=server_folder)
        if not detach:
            follow_to_end(submission, log_dir, timeout=timeout, as_json=as_json)
            return
    line = f"run {submission.run_id} is submitted; `fedgraft resume {log_dir}` follows it"
    print_result({"run_id": submission.run_id, "log_dir": str(log_dir)}, as_json=as_json, lines=[line])
