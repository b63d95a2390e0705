"""Options of the verbs that start a federation: keys of the run configuration, and the SuperLink that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import LossOn
from configs.errors import UserError
from scripts.shared.options import DATA, LOSS_ON
from scripts.shared.run_config import absolute_path

if TYPE_CHECKING:
    from server.flower.connection import Connection

RunConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of run configuration keys; options override it.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Run configuration key=value (see configs/default.toml); repeatable."),
]
LogDirectory = Annotated[
    Path, typer.Argument(metavar="LOG_DIR", help="Log directory of `fedgraft submit`.", show_default=False)
]
Timeout = Annotated[
    float | None,
    typer.Option(
        min=1, help="Seconds after which the command fails; the run goes on. No limit unless given."
    ),
]


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


@dataclass(frozen=True)
class ConnectionOptions:
    """SuperLink, by name or by address."""

    connection: Annotated[
        str,
        typer.Option(
            help="Name of a SuperLink connection in config.toml of FLWR_HOME (~/.flwr); its default unless given."
        ),
    ] = ""
    superlink: Annotated[str, typer.Option(help="Address host:port, in place of --connection.")] = ""
    root_certificates: Annotated[
        Path | None,
        typer.Option(help="PEM file of the authorities that sign the certificate of --superlink."),
    ] = None
    insecure: Annotated[bool, typer.Option(help="Connect to --superlink without TLS.")] = False

    def read(self, default: Connection | None = None) -> Connection:
        """Connection that the options name; ``default`` where none is given, else Flower's default one.

        Raises:
            UserError: conflicting options, or no such connection.
        """
        from server.flower.connection import Connection, read_connection

        if self.superlink:
            if self.connection:
                raise UserError("expected either --connection or --superlink, got both; drop one")
            return Connection(self.superlink, self.root_certificates, self.insecure)
        if self.root_certificates or self.insecure:
            raise UserError("expected --superlink with --root-certificates and --insecure, got none; add it")
        return read_connection(self.connection) if self.connection or default is None else default
