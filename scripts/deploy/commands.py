"""Ports, processes, node configurations and connections, for the shell scripts of this folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tomli_w

from configs.errors import UserError
from configs.node_config import load_node_config
from configs.output import write_bytes
from federated.driver_watch import driver_mark
from scripts.shared.run_config import read_node_values
from server.flower.connection import Connection, add_connection
from server.flower.deployed_run import flower_commands
from server.flower.flower_cli import register_node
from server.flower.flower_process import RunFailed, free_ports, stop_job
from server.flower.guard import guard


def main() -> int:
    """Run one sub-command; returns the exit status: 0, 2 for bad input, 1 for a failure."""
    options = vars(_parser().parse_args())
    try:
        return options.pop("function")(**options) or 0
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def print_ports(count: int) -> None:
    """Print free TCP ports on loopback."""
    print(*free_ports(count))


def guard_job(job: str, pid: int, folder: Path) -> None:
    """Wait for the end of a process, then end every process started for a job and remove its folder."""
    guard(job, driver_mark(pid), [folder])


def check_health(address: str, roots: Path | None) -> int:
    """Check that a SuperLink answers; returns 1 where it does not, also while it starts."""
    try:
        return 0 if Connection(address, roots, insecure=roots is None).is_healthy() else 1
    except UserError:
        return 1


def write_node_config(file: Path, assignments: list[str]) -> None:
    """Validate the configuration of a node and write it as TOML, paths made absolute."""
    values = read_node_values(assignments)
    load_node_config(values)
    write_bytes(file, tomli_w.dumps(values).encode())


def register_nodes(address: str, roots: Path, keys: list[Path]) -> None:
    """Let the SuperNodes with these public keys connect to a SuperLink; known keys are kept."""
    with flower_commands(Connection(address, roots)) as commands:
        for key in keys:
            if not key.is_file():
                raise UserError(
                    f"expected a public key, found none at {key}; make it with certificates.sh node"
                )
            added = register_node(key, **commands.options)
            print(f"{'registered' if added else 'kept'} {key}")


def name_connection(name: str, address: str, roots: Path) -> None:
    """Name a SuperLink in Flower's configuration."""
    path = add_connection(name, Connection(address, roots))
    print(f"{name} is {address} in {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)

    def add(name: str, function: object) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        return command

    add("ports", print_ports).add_argument("count", type=int)
    add("stop", stop_job).add_argument("job")
    watch = add("guard", guard_job)
    watch.add_argument("job")
    watch.add_argument("pid", type=int)
    watch.add_argument("folder", type=Path)
    health = add("healthy", check_health)
    health.add_argument("address")
    health.add_argument("roots", type=Path, nargs="?")
    config = add("node-config", write_node_config)
    config.add_argument("file", type=Path)
    config.add_argument("assignments", nargs="+", metavar="KEY=VALUE")
    register = add("register", register_nodes)
    register.add_argument("address")
    register.add_argument("roots", type=Path)
    register.add_argument("keys", type=Path, nargs="+")
    connection = add("connection", name_connection)
    connection.add_argument("name")
    connection.add_argument("address")
    connection.add_argument("roots", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
