"""``fedgraft simulate``: a federation of Flower clients on this machine, through Flower's simulation engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.console import DataSources, JsonFlag, Overwrite, print_result, quiet_libraries, stderr

PROJECT = Path(__file__).resolve().parents[1]
_START_SECONDS = 300.0  # for Flower's and Ray's processes to start and stop


def simulate(
    graph: Annotated[str, typer.Option(help="Folder that `fedgraft bootstrap` wrote.")] = "",
    clients: Annotated[int | None, typer.Option(help="Clients.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Server rounds.")] = None,
    data: DataSources | None = None,  # type: ignore[assignment]
    partition: Annotated[
        str | None, typer.Option(help="domain, iid, dirichlet:ALPHA or natural:COLUMN.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Experts per layer that each client holds, comma-separated.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of run configuration keys.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of configs/default.toml; repeatable.")
    ] = None,
    log_dir: Annotated[Path, typer.Option(help="Folder of the run's logs.")] = Path("logs/run"),
    out: Annotated[
        Path | None, typer.Option("--out", "--output", help="Folder of the trained graph.")
    ] = None,
    client_cpus: Annotated[int, typer.Option(min=1, help="Cores that one client occupies.")] = 1,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Train and re-wire an expert graph with several clients, each with data of its own.

    Runs real Flower processes: a SuperLink, the simulation engine, the ServerApp and the ClientApp of this project.
    """
    from configs.output import check_output_directory
    from server.live_table import following
    from server.run_observer import read_summary
    from server.simulation import run_simulation

    quiet_libraries()
    given = {
        "graph": _absolute(graph),
        "num-clients": clients,
        "num-rounds": rounds,
        "data": data or None,
        "partition": partition,
        "budgets": budgets,
        "log-dir": str(log_dir.absolute()),
        "out": _absolute(out),
        "overwrite": overwrite or None,
    }
    run = read_run_config(config, given, settings or [])
    check_output_directory(log_dir, overwrite=run.overwrite)
    check_run(run)
    shutil.rmtree(log_dir / "clients", ignore_errors=True)
    with following(log_dir, num_rounds=run.num_rounds, console=stderr):
        run_simulation(
            PROJECT,
            run_config=run.values(),
            num_supernodes=run.num_clients,
            log_dir=log_dir,
            client_cpus=client_cpus,
            timeout=_START_SECONDS + (run.num_rounds + 1) * run.reply_timeout,
        )
    summary = read_summary(log_dir)
    print_result(summary, as_json=as_json, lines=summary_lines(summary))


def read_run_config(config: Path | None, given: dict[str, Any], assignments: list[str]):
    """The run configuration: defaults, then the file, then named options, then ``--set``; paths made absolute.

    Raises:
        UserError: unknown keys, values out of range, conflicts.
    """
    from configs.schema import load_run_config, parse_assignments, read_config_file
    from federated.documents import absolute_sources

    values = read_config_file(config) if config else {}
    values |= {key: value for key, value in given.items() if value not in (None, "")}
    values |= parse_assignments(assignments)
    run = load_run_config(values)
    data = ";".join(absolute_sources(run.sources))
    server_data = ";".join(absolute_sources(run.server_sources))
    return load_run_config(run.values() | {"data": data, "server-data": server_data})


def check_run(run) -> None:
    """Find bad input before any process is started: the graph, the output folder, the data of every client.

    Raises:
        UserError: in one line, what to mend.
    """
    from clients.data_stream import all_clients
    from configs.output import check_output_directory
    from models.llama_loader import read_config
    from server.app import check_fit, graph_source

    if run.out:
        check_output_directory(Path(run.out), overwrite=run.overwrite)
    check_fit(run, read_config(graph_source(run)))
    with stderr.status("reading the data"):
        all_clients(run)


def summary_lines(summary: dict[str, Any]) -> list:
    """The result of a run for a reader: a table of clients, then bytes, edits and paths."""
    from rich.table import Table

    from server.live_table import human_bytes

    table = Table("client", "budget", title="held-out perplexity of the global model")
    for column in ("before", "after", "after, personal"):
        table.add_column(column, justify="right")
    for client in summary["clients"]:
        names = ("perplexity_before", "perplexity_after", "perplexity_after_personal")
        cells = ["-" if client[name] is None else f"{client[name]:.2f}" for name in names]
        table.add_row(client["name"], str(client["budget"]), *cells)
    lines: list = [table]
    for way in ("up", "down"):
        sent, dense = summary[f"bytes_{way}"], summary[f"bytes_{way}_dense"]
        ratio = f" ({dense / sent:.0f} times less)" if sent else ""
        lines.append(f"bytes {way}: {human_bytes(sent)}, dense FedAvg in bf16 {human_bytes(dense)}{ratio}")
    lines.append(f"graph edits: {summary['edits']}, graph {summary['graph_hash'][:12]}")
    lines.append(f"logs: {summary['log_dir']}")
    return [*lines, f"model: {summary['out']}"] if summary["out"] else lines


def _absolute(path: str | Path | None) -> str:
    return (
        str(Path(path).absolute())
        if path and Path(path).exists() or isinstance(path, Path)
        else str(path or "")
    )
