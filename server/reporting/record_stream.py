"""Copy of a run's records through its log: the ServerApp prints them, and a follower on another machine writes them."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from server.reporting.background import in_background
from server.reporting.failure import FAILURE_FILE
from server.reporting.run_log import ROUNDS_FILE, read_rounds, write_atomically
from server.reporting.summary import SUMMARY_FILE

POLL_SECONDS = 0.5
_MARK = "fedgraft-record "  # starts a line of the log, before a file name and its JSON
_FILES = (SUMMARY_FILE, FAILURE_FILE)
_NO_FILE = (-1, -1)  # stamp of a file that is not there

_log = logging.getLogger(__name__)


@contextmanager
def printing_records(log_dir: Path | None) -> Iterator[None]:
    """Print each new line of ``rounds.jsonl`` in the block, and ``summary.json`` and ``failure.json`` after it.

    Args:
        log_dir: log directory of the run; None: nothing is printed.
    """
    if log_dir is None:
        yield
        return
    printed = {
        row["round"]: row for row in read_rounds(log_dir)
    }  # of an earlier run, or an earlier part of this one
    earlier = {name: _stamp(log_dir / name) for name in _FILES}

    def look() -> None:
        for row in read_rounds(log_dir):
            if printed.get(row["round"]) != row:
                printed[row["round"]] = row
                _print(ROUNDS_FILE, row)

    try:
        with _repeating(_on_change(log_dir / ROUNDS_FILE, look), "print-records"):
            yield
    finally:
        for name in _FILES:
            if _stamp(log_dir / name) not in (_NO_FILE, earlier[name]):
                _print(name, json.loads((log_dir / name).read_text(encoding="utf-8")))


@contextmanager
def writing_records(log_file: Path, log_dir: Path) -> Iterator[None]:
    """Write the records that a growing log holds to ``log_dir`` during the block, and the last ones at its end.

    Args:
        log_file: log of the run; it need not exist yet.
        log_dir: folder that receives ``rounds.jsonl``, ``summary.json`` and ``failure.json``.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    with _repeating(_on_change(log_file, lambda: write_records(log_file, log_dir)), "write-records"):
        yield


def write_records(log_file: Path, log_dir: Path) -> None:
    """Write the latest record of each round, of the summary and of the failure in a log to ``log_dir``.

    Rounds that the log lacks, those before a run was continued, stay in ``rounds.jsonl``.
    """
    known = read_rounds(log_dir)
    rounds = {row["round"]: row for row in known}
    for line in _marked_lines(log_file):
        name, _, content = line.removeprefix(_MARK).partition(" ")
        with suppress(ValueError, TypeError, KeyError):  # printed by something else
            value = json.loads(content)
            if name == ROUNDS_FILE:
                rounds[int(value["round"])] = value
            elif name in _FILES and isinstance(value, dict):
                write_atomically(log_dir / name, json.dumps(value, indent=2) + "\n")
    rows = [rounds[number] for number in sorted(rounds)]
    if rows != known:
        write_atomically(log_dir / ROUNDS_FILE, "".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def _repeating(act: Callable[[], None], name: str) -> Iterator[None]:
    """Call a function in a thread every POLL_SECONDS during the block, and once more at its end."""

    def repeat(done: threading.Event) -> None:
        while not done.wait(POLL_SECONDS):
            _attempt(act)
        _attempt(act)

    with in_background(repeat, name):
        yield


def _attempt(act: Callable[[], None]) -> None:
    try:
        act()
    except (OSError, ValueError) as error:  # a full disk, or a file that is being replaced
        _log.warning("the records of the run were not copied: %s", error)


def _print(name: str, value: dict[str, Any]) -> None:
    print(f"\n{_MARK}{name} {json.dumps(value)}", flush=True)


def _on_change(path: Path, act: Callable[[], None]) -> Callable[[], None]:
    """Function that calls ``act`` unless the stamp of a file is the one at its last call that succeeded."""
    seen: tuple[int, int] | None = None

    def look() -> None:
        nonlocal seen
        if (stamp := _stamp(path)) != seen:
            act()
            seen = stamp

    return look


def _stamp(path: Path) -> tuple[int, int]:
    """Time of the last change of a file in ns and its size in bytes."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    return _NO_FILE


def _marked_lines(log_file: Path) -> list[str]:
    """Complete lines of a log, which need not exist, that hold records."""
    with suppress(FileNotFoundError):
        text = log_file.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [line for line in lines if line.startswith(_MARK)]
    return []
