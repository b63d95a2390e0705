"""``fedgraft simulate``: a federation of Flower clients on this machine, through Flower's simulation engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import LossOn
from scripts.shared.console import print_result, quiet_libraries, stderr
from scripts.shared.options import DATA, LOSS_ON, JsonFlag
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from configs.schema import RunConfig

PROJECT = Path(__file__).resolve().parents[3]
DEFAULT_LOG_DIR = "logs/run"
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
            "graph": _absolute(self.graph),
            "num-clients": self.clients,
            "num-rounds": self.rounds,
            "data": self.data or None,
            "partition": self.partition,
            "loss-on": self.loss_on and str(self.loss_on),
            "budgets": self.budgets,
            "log-dir": _absolute(self.log_dir),
            "out": _absolute(self.out),
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
            "only --client-cpus and --json may be given, too."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train and rewire an expert graph with several clients, each with its own data.

    Runs real Flower processes: a SuperLink, the simulation engine, the ServerApp and the ClientApp of this project. The
    state of the run is saved after each round: a run that was killed is continued with --resume.
    """
    from server.rounds.run_observer import read_summary

    quiet_libraries()
    if resume is not None:
        run = read_resumed_config(resume, alone=options == RunOptions() and not config and not settings)
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
    from server.rounds.reply_spool import remove_spools
    from server.rounds.run_observer import SUMMARY_FILE
    from server.state.run_lock import DRIVER_LOCK, SERVER_LOCK, check_unused, holding
    from server.state.stop_request import clear_stop

    with holding(folder, DRIVER_LOCK):
        check_unused(folder, SERVER_LOCK)
        if not keep:
            clear_run(folder)
            (folder / SUMMARY_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder / "clients", ignore_errors=True)
        clear_stop(folder)
        try:
            yield
        except KeyboardInterrupt:
            raise interruption(folder) from None
        finally:
            clear_stop(folder)
            remove_spools(folder)


def read_run_config(config: Path | None, given: dict[str, Any], assignments: list[str]):
    """Read the run configuration: defaults, the file, named options, ``--set``, later ones first; paths made absolute.

    Raises:
        UserError: unknown keys, values out of range, conflicts.
    """
    from configs.schema import load_run_config
    from configs.values import parse_assignments, read_config_file
    from federated.data.documents import absolute_sources

    values = {"log-dir": DEFAULT_LOG_DIR} | (read_config_file(config) if config else {})
    values |= {key: value for key, value in given.items() if value not in (None, "")}
    values |= parse_assignments(assignments)
    run = load_run_config(values)
    absolute = {
        "data": ";".join(absolute_sources(run.sources)),
        "server-data": ";".join(absolute_sources(run.server_sources)),
        "graph": _absolute(run.graph),
        "base": _absolute(run.base),
        "template": _absolute(run.template) if run.template.endswith(".json") else run.template,
        "log-dir": _absolute(Path(run.log_dir)),
        "out": _absolute(Path(run.out)) if run.out else "",
    }
    return load_run_config(run.values() | absolute)


def read_resumed_config(log_dir: Path, *, alone: bool):
    """Read the run configuration of a run that is continued, from the state in its log directory.

    Args:
        log_dir: log directory of the run.
        alone: whether no option of a run configuration was given beside it.

    Raises:
        UserError: other options were given, or the directory holds no state of a run.
    """
    from configs.errors import UserError
    from configs.schema import load_run_config
    from server.rounds.run_observer import read_summary
    from server.state.journal import STATE_FOLDER
    from server.state.settings import read_settings

    if not alone:
        raise UserError("expected --resume alone, got other options of the run, too; its settings are kept")
    log_dir = log_dir.absolute()
    values = dict(read_settings(log_dir / STATE_FOLDER).values)
    with suppress(FileNotFoundError):
        # The model that this run saved when it was interrupted is replaced by the final one.
        values["overwrite"] |= bool(values["out"]) and read_summary(log_dir)["out"] == values["out"]
    return load_run_config(values | {"log-dir": str(log_dir), "resume": True})


def check_run(run) -> None:
    """Check log and output directories, room on disk, graph, and data of server and clients before any process starts.

    Raises:
        UserError: the first problem, in one line.
    """
    from clients.data_stream import all_clients, check_tokens
    from configs.output import check_output_directory
    from configs.paths import graph_or_default
    from federated.data.chat_template import ChatTemplate
    from federated.data.documents import load_documents
    from models.bootstrap.recipe_build import check_base
    from models.checkpoints.load import check_weights, load_tokenizer
    from server.model.config_checks import check_fit, check_room
    from server.state.run_lock import check_unused

    check_unused(Path(run.log_dir))
    folders = (run.out,) if run.resume else (run.log_dir, run.out)
    for folder in filter(None, folders):
        check_output_directory(Path(folder), overwrite=run.overwrite)
    graph = graph_or_default(run.graph)
    check_fit(run, graph)
    check_weights(graph)
    check_room(run, graph)
    if run.base:
        check_base(run.base, graph)
        check_weights(run.base)
    with stderr.status("reading the data"):
        chat = ChatTemplate(partial(load_tokenizer, graph))
        check_tokens(all_clients(run, chat=chat), graph, run.block_size)
        if run.server_sources:
            load_documents(
                run.server_sources, template=run.template, chat=chat, loss_on=run.loss_on, wikimix_documents=1
            )


def summary_lines(summary: dict[str, Any]) -> list:
    """Format the summary of a run: a table of clients, then bytes, edits and paths."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    table = Table("client", "budget", title="held-out perplexity of the global model")
    for column in ("before", "after", "after, personal"):
        table.add_column(column, justify="right")
    clients = summary["clients"]
    for client in clients:
        names = ("perplexity_before", "perplexity_after", "perplexity_after_personal")
        cells = ["-" if client[name] is None else f"{client[name]:.2f}" for name in names]
        table.add_row(
            escape(client["name"]), "-" if client["budget"] is None else str(client["budget"]), *cells
        )
    lines = [
        f"no update of {each['name']} was used: {each['refused']}" for each in clients if each["refused"]
    ]
    if summary["stopped"]:
        lines.append(f"stopped after round {summary['rounds']}: {summary['stopped']}")
    for way in ("up", "down"):
        sent, dense = summary[f"bytes_{way}"], summary[f"bytes_{way}_dense"]
        ratio = f" ({dense / sent:.0f} times less)" if sent else ""
        lines.append(f"bytes {way}: {decimal(sent)}, dense FedAvg in bf16 {decimal(dense)}{ratio}")
    lines.append(f"graph edits: {summary['edits']}, graph {summary['graph_hash'][:12]}")
    errors = summary.get("log_errors", {}).items()
    lines += [f"the log file {file} is incomplete: {reason}" for file, reason in errors]
    lines.append(f"logs: {summary['log_dir']}")
    if summary["out"]:
        lines.append(f"model: {summary['out']}")
    return [table, *map(escape, lines)]


def _absolute(path: str | Path | None) -> str:
    """Make a path absolute; text that is no existing path, e.g. a hub id, stays as it is."""
    found = Path(path).expanduser() if path else None
    return str(found.absolute()) if found and (isinstance(path, Path) or found.exists()) else str(path or "")
