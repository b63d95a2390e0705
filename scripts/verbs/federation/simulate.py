"""``fedgraft simulate``: a federation of Flower clients on this machine, through Flower's simulation engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import LossOn
from scripts.shared.console import print_result, quiet_libraries, stderr
from scripts.shared.options import DATA, LOSS_ON, JsonFlag
from scripts.shared.run_config import absolute_path, check_run, read_resumed_config, read_run_config
from scripts.shared.run_summary import summary_lines
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from configs.schema import RunConfig

PROJECT = Path(__file__).resolve().parents[3]
_START_SECONDS = 300.0  # for Flower's and Ray's processes to start and stop


@dataclass(frozen=True)
class RunOptions:
    """Keys of the run configuration that have an option of their own; options not given are left to the file."""

    graph: Annotated[str, typer.Option(help="Expert graph: directory that `fedgraft bootstrap` wrote.")] = ""
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None
    rounds: Annotated[int | None, typer.Option(help="Number of server rounds.")] = None
    data: Annotated[list[str] | None, DATA] = None
    partition: Annotated[
        str | None,
        typer.Option(help="Documents of each client: domain, iid, dirichlet:ALPHA or natural:COLUMN."),
    ] = None
    loss_on: Annotated[LossOn | None, LOSS_ON] = None
    budgets: Annotated[
        str | None, typer.Option(help="Experts per layer that each client holds, comma-separated.")
    ] = None
    log_dir: Annotated[
        Path | None, typer.Option(help="Directory of the run's logs; logs/run unless given.")
    ] = None
    out: Annotated[Path | None, typer.Option("--out", "--output", help="Directory of the trained graph.")] = (
        None
    )
    overwrite: Annotated[bool, typer.Option(help="Replace output directories that are not empty.")] = False

    def values(self) -> dict[str, Any]:
        """The run configuration keys and their values, paths made absolute; None where an option is not given."""
        return {
            "graph": absolute_path(self.graph),
            "num-clients": self.clients,
            "num-rounds": self.rounds,
            "data": self.data or None,
            "partition": self.partition,
            "loss-on": self.loss_on and str(self.loss_on),
            "budgets": self.budgets,
            "log-dir": absolute_path(self.log_dir),
            "out": absolute_path(self.out),
            "overwrite": self.overwrite or None,
        }


@verb
def simulate(
    options: RunOptions = RunOptions(),
    config: Annotated[
        Path | None, typer.Option(help="TOML file of run configuration keys; options override it.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Run configuration key=value (see configs/default.toml); repeatable."),
    ] = None,
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
    from server.reporting.summary import read_summary

    quiet_libraries()
    if resume is not None:
        alone = options in (RunOptions(), RunOptions(overwrite=True)) and not config and not settings
        run = read_resumed_config(resume, alone=alone, overwrite=options.overwrite)
    else:
        run = read_run_config(config, options.values(), settings or [])
    check_run(run)
    failure = _run(run, client_cpus)
    try:
        summary = read_summary(Path(run.log_dir))
    except FileNotFoundError:
        model = f"; the model is in {run.out}" if run.out else ""
        raise RuntimeError(f"the summary could not be written, see {run.log_dir}/flower.log{model}") from None
    print_result(summary, as_json=as_json, lines=summary_lines(summary))
    if failure:
        stderr.print(f"fedgraft: error: {failure}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(1)


def _run(run: RunConfig, client_cpus: int) -> str:
    """Run the federation in Flower's simulation engine, with a live table on stderr.

    Returns:
        The failure of a completed run in which no update of a client was used; else an empty text.

    Raises:
        Interrupted: on Ctrl-C.
    """
    from server.flower.flower_process import RunFailed
    from server.flower.simulation import run_simulation
    from server.reporting.failure import read_failure
    from server.reporting.live_table import following
    from server.reporting.unused_clients import UnusedClients
    from server.rounds.loop import ROUND_ATTEMPTS

    folder = Path(run.log_dir)
    try:
        with (
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
    except RunFailed:
        name, message = read_failure(folder) or ("", "")
        if name != UnusedClients.__name__:
            raise
        return message
    return ""


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
