"""``fedgraft simulate``: a federation of Flower clients on this machine, through Flower's simulation engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.shared.console import quiet_libraries, stderr
from scripts.shared.finished_run import print_finished, unused_clients
from scripts.shared.options import JsonFlag
from scripts.shared.run_config import PROJECT, check_run, read_resumed_config, read_run_config
from scripts.shared.run_options import RunConfigFile, RunOptions, Settings
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from configs.schema import RunConfig

_START_SECONDS = 300.0  # for Flower's and Ray's processes to start and stop


@verb
def simulate(
    options: RunOptions = RunOptions(),
    config: RunConfigFile = None,
    settings: Settings = None,
    client_cpus: Annotated[int, typer.Option(min=1, help="CPU cores of one client.")] = 1,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Log directory of a run to continue after its last completed round; its settings are kept, so that "
            "only --client-cpus, --overwrite and --json may be given, too."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train and rewire an expert graph with several clients, each with its own data.

    Runs real Flower processes: a SuperLink, the simulation engine, the ServerApp and the ClientApp of this project. The
    state of the run is saved after each round: a run that was killed is continued with --resume.
    """
    quiet_libraries()
    if resume is not None:
        alone = options in (RunOptions(), RunOptions(overwrite=True)) and not config and not settings
        run = read_resumed_config(resume, alone=alone, overwrite=options.overwrite)
    else:
        run = read_run_config(config, options.values(), settings or [])
    check_run(run)
    failure = _run(run, client_cpus)
    print_finished(Path(run.log_dir), failure=failure, out=run.out, as_json=as_json)


def _run(run: RunConfig, client_cpus: int) -> list[str]:
    """Run the federation in Flower's simulation engine, with a live table on stderr.

    Returns:
        The failure of a completed run in which no update of a client was used; else nothing.

    Raises:
        Interrupted: on Ctrl-C.
    """
    from server.flower.simulation import run_simulation
    from server.reporting.live_table import following
    from server.rounds.loop import ROUND_ATTEMPTS

    folder = Path(run.log_dir)
    with (
        unused_clients(folder) as failure,
        _log_directory(folder, keep=run.resume),
        following(folder, num_rounds=run.num_rounds, console=stderr),
    ):
        run_simulation(
            PROJECT,
            run_config=run.values(),
            num_supernodes=run.num_clients,
            log_dir=folder,
            client_cpus=client_cpus,
            timeout=_START_SECONDS + (run.num_rounds * ROUND_ATTEMPTS + 1) * run.reply_timeout,
        )
    return failure


@contextmanager
def _log_directory(folder: Path, *, keep: bool) -> Iterator[None]:
    """Lock the log directory of a run and remove the files of an earlier one, which the live table would show.

    Args:
        folder: log directory.
        keep: keep these files, for a run that is continued.

    Raises:
        UserError: another run uses it.
        Interrupted: on Ctrl-C in the block; says what was saved.
    """
    from server.flower.flower_run import interruption
    from server.reporting.run_log import clear_run
    from server.reporting.summary import clear_summary
    from server.rounds.reply_spool import remove_spools
    from server.state.run_lock import DRIVER_LOCK, SERVER_LOCK, check_unused, holding
    from server.state.stop_request import clear_stop

    with holding(folder, DRIVER_LOCK):
        check_unused(folder, SERVER_LOCK)
        if not keep:
            clear_run(folder)
            clear_summary(folder)
            shutil.rmtree(folder / "clients", ignore_errors=True)
        clear_stop(folder)
        try:
            yield
        except KeyboardInterrupt:
            raise interruption(folder) from None
        finally:
            clear_stop(folder)
            remove_spools(folder)
