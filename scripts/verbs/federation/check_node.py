"""``fedgraft check-node``: whether a machine fits a federation, before it joins."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.shared.console import print_result, quiet_libraries, stderr
from scripts.shared.options import JsonFlag
from scripts.shared.run_config import read_node_values
from scripts.shared.run_options import ConnectionOptions, RunConfigFile, Settings
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from clients.node_check import Finding


@verb
def check_node(
    node: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Node configuration, as for supernode.sh: partition-id=0 data-dir=/srv/data base=/models/llama.",
            show_default=False,
        ),
    ],
    link: ConnectionOptions = ConnectionOptions(),
    config: RunConfigFile = None,
    settings: Settings = None,
    fingerprint: Annotated[
        str, typer.Option(help="Fingerprint of the server's graph, which this command prints there.")
    ] = "",
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe of the server's graph: a file or the graph folder; needed with base."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check whether data, graph, disk, memory and connection of a site fit a run, and measure what one round costs.

    Nothing is sent. The exit code is 1 if something does not fit; each line says how to fix it. The SuperLink is
    contacted if --connection or --superlink names one.
    """
    from clients.node_check import NodeCheck, read_recipe_of
    from configs.node_config import load_node_config
    from configs.schema import load_run_config
    from configs.values import parse_assignments, read_config_file

    quiet_libraries()
    run = load_run_config((read_config_file(config) if config else {}) | parse_assignments(settings or []))
    check = NodeCheck(
        run, load_node_config(read_node_values(node)), fingerprint, read_recipe_of(recipe) if recipe else b""
    )
    if link != ConnectionOptions():
        check.findings.append(_connection(link))
        _show(check.findings[-1])
    for finding in check.run():
        _show(finding)
    cost: dict[str, Any] | None = asdict(check.cost) if check.cost else None
    findings = [asdict(finding) for finding in check.findings]
    result = {"ok": check.ok, "checks": findings, "round": cost, "fingerprint": check.fingerprint}
    print_result(
        result, as_json=as_json, lines=["the node may join" if check.ok else "the node does not fit"]
    )
    if not check.ok:
        raise typer.Exit(1)


def _show(finding: Finding) -> None:
    """Print the result of a check on stderr."""
    line = f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}"
    stderr.print(line, soft_wrap=True, markup=False, highlight=False)


def _connection(link: ConnectionOptions) -> Finding:
    from clients.node_check import Finding
    from configs.errors import UserError
    from server.flower.flower_process import RunFailed, wait_until_healthy

    try:
        connection = link.read()
        wait_until_healthy(connection, timeout=10.0)
    except (UserError, RunFailed) as error:
        return Finding("connection", False, str(error))
    security = "without TLS" if connection.insecure else "over TLS"
    return Finding("connection", True, f"the SuperLink answers at {connection.address} {security}")
