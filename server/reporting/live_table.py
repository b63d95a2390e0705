"""Live console table of a run, one row per round, read from the run's log files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from server.reporting.background import in_background
from server.reporting.run_log import read_rewirings, read_rounds

POLL_SECONDS = 0.5
MAX_CLIENT_COLUMNS = 4  # with more clients the table shows the worst instead of each

Row = Mapping[str, Any]


def follow_run(
    log_dir: Path, *, is_finished: Callable[[], bool], num_rounds: int, console: Console | None = None
) -> None:
    """Print the rounds in ``log_dir`` as they are written: a live table on a terminal, otherwise a line per round.

    Args:
        log_dir: log directory of the run.
        is_finished: returns whether the run has ended, which ends this function after a last look.
        num_rounds: planned rounds.
        console: destination; stderr by default.
    """
    console = console or Console(stderr=True)
    follow = _follow_live if console.is_terminal else _follow_plain
    follow(log_dir, is_finished, num_rounds, console)


@contextmanager
def following(log_dir: Path, *, num_rounds: int, console: Console | None = None) -> Iterator[None]:
    """Run ``follow_run`` in a thread for the duration of a ``with`` block."""
    with in_background(
        lambda done: follow_run(log_dir, is_finished=done.is_set, num_rounds=num_rounds, console=console),
        "follow-run",
    ):
        yield


def rounds_table(rounds: list[dict[str, Any]], edits: Mapping[int, int]) -> Table:
    """Build the table of the completed rounds; ``edits``: number of graph edits by round."""
    names = _client_columns(rounds)
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = map(escape, names)
    private = ["epsilon"] if any(row.get("epsilon") is not None for row in rounds) else []
    headers = (
        "round",
        "time",
        "loss",
        "perplexity",
        *shown,
        "up",
        "down",
        "density",
        "edges",
        "edits",
        *private,
    )
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    for row in rounds:
        table.add_row(*_cells(row, names, edits), *(_number(row.get(name)) for name in private))
    return table


def round_line(row: Row, *, num_rounds: int, edits: int | None) -> str:
    """Format one round as a plain line, for a console without a terminal."""
    clients = ", ".join(f"{c['name']} {_number(c['perplexity'])}" for c in row["clients"])
    parts = [
        f"round {row['round']}/{num_rounds}",
        f"{row['seconds']:.1f} s",
        f"train loss {_number(row['train_loss'])}",
        f"perplexity {_number(row['perplexity'])} ({clients})",
        f"up {decimal(row['bytes_up'])}",
        f"down {decimal(row['bytes_down'])}",
        f"density {_number(row['density'], digits=4)}",
        f"edges {sum(row['edges'])}",
    ]
    if edits is not None:
        parts.append(f"edits {edits}")
    if row.get("epsilon") is not None:
        parts.append(f"epsilon {_number(row['epsilon'])}")
    return "  ".join(parts)


def _follow_live(log_dir: Path, is_finished: Callable[[], bool], num_rounds: int, console: Console) -> None:
    started = round_started = time.monotonic()
    spinner = Spinner("dots")
    seen = 0
    with Live(console=console, refresh_per_second=8) as live:
        while True:
            finished = is_finished()
            rounds, edits = read_rounds(log_dir), _edit_counts(log_dir)
            if len(rounds) != seen:
                seen, round_started = len(rounds), time.monotonic()
            table = rounds_table(rounds, edits)
            if finished:
                live.update(table, refresh=True)
                return
            planned = seen if _stopped(rounds) else num_rounds
            spinner.update(text=_status(seen, planned, started, round_started))
            live.update(Group(table, spinner) if rounds else spinner)
            time.sleep(POLL_SECONDS)


def _follow_plain(log_dir: Path, is_finished: Callable[[], bool], num_rounds: int, console: Console) -> None:
    seen = 0
    while True:
        finished = is_finished()
        rounds = read_rounds(log_dir)
        for row in rounds[seen:]:
            edits = _edit_counts(log_dir).get(row["round"])
            line = round_line(row, num_rounds=num_rounds, edits=edits)
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        if len(rounds) > seen and (reason := _stopped(rounds)):
            console.print(f"stopped early: {reason}", soft_wrap=True, markup=False, highlight=False)
        seen = len(rounds)
        if finished:
            return
        time.sleep(POLL_SECONDS)


def _status(done: int, num_rounds: int, started: float, round_started: float) -> str:
    now = time.monotonic()
    total = _clock(now - started)
    if not done:
        return f"starting the federation and round 1 of {num_rounds}  {total}"
    if done >= num_rounds:
        return f"finishing after round {done} of {num_rounds}  {total}"
    return f"round {done + 1} of {num_rounds}  {_clock(now - round_started)}, {total} in all"


def _stopped(rounds: list[dict[str, Any]]) -> str | None:
    """Reason of an early end, from the last round; None where there is none."""
    return rounds[-1].get("stopped") if rounds else None


def _client_columns(rounds: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(client["name"] for row in rounds for client in row["clients"]))
    return names if len(names) <= MAX_CLIENT_COLUMNS else ["worst"]


def _cells(row: Row, names: list[str], edits: Mapping[int, int]) -> list[str]:
    perplexities = {client["name"]: client["perplexity"] for client in row["clients"]}
    known = [value for value in perplexities.values() if value is not None]
    perplexities.setdefault("worst", max(known, default=None))
    return [
        str(row["round"]),
        f"{row['seconds']:.1f} s",
        _number(row["train_loss"]),
        _number(row["perplexity"]),
        *(_number(perplexities.get(name)) for name in names),
        decimal(row["bytes_up"]),
        decimal(row["bytes_down"]),
        _number(row["density"], digits=4),
        str(sum(row["edges"])),
        str(edits.get(row["round"], "")),
    ]


def _edit_counts(log_dir: Path) -> dict[int, int]:
    return {each["round"]: len(each["edits"]) for each in read_rewirings(log_dir)}


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"
