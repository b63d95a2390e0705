"""Command that starts a federation in the folder of runs."""

from __future__ import annotations

from pathlib import Path

from configs.errors import UserError
from ui.shared.local_data import local_data

_MOST_CLIENTS = 16
_OWN_KEYS = {
    "graph",
    "data",
    "log-dir",
    "out",
    "num-clients",
    "num-rounds",
    "overwrite",
    "resume",
    "server-data",
}


def start_arguments(
    graph: Path, log_dir: Path, *, clients: float | None, rounds: float | None, data: str, settings: str
) -> list[str]:
    """Arguments of ``fedgraft simulate``; the trained graph is written to ``log_dir/model``.

    Args:
        graph: folder of the expert graph.
        log_dir: new log directory.
        clients: number of clients, at most 16 on one machine.
        rounds: number of rounds.
        data: sources, one per line: ``wikimix``, or files and folders of this machine.
        settings: run configuration, one ``key=value`` per line.

    Raises:
        UserError: a number out of range, data that is not on this machine, a setting of a path or without a value.
    """
    if not (clients and 1 <= clients <= _MOST_CLIENTS and clients == int(clients)):
        raise UserError(f"expected 1 to {_MOST_CLIENTS} clients, got {clients}")
    if not (rounds and rounds >= 1 and rounds == int(rounds)):
        raise UserError(f"expected at least 1 round, got {rounds}")
    arguments = [
        "simulate",
        "--graph",
        str(graph),
        "--clients",
        str(int(clients)),
        "--rounds",
        str(int(rounds)),
    ]
    for source in _lines(data) or [""]:
        arguments += ["--data", local_data(source)]
    arguments += ["--log-dir", str(log_dir), "--out", str(log_dir / "model")]
    for setting in _lines(settings):
        key, equals, _ = setting.partition("=")
        if not equals or key.strip() in _OWN_KEYS:
            raise UserError(
                f"expected settings `key=value`, none of {', '.join(sorted(_OWN_KEYS))}; got {setting!r}"
            )
        arguments += ["--set", setting]
    return arguments


def _lines(text: str) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
