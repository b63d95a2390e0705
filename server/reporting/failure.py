"""Exception that ended a ServerApp, as ``failure.json`` in the log directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import first_line
from configs.output import write_json

_log = logging.getLogger(__name__)

FAILURE_FILE = "failure.json"


@contextmanager
def recording_failure(log_dir: Path | None) -> Iterator[None]:
    """Write an exception raised in the block to ``failure.json`` as ``{"type", "message"}`` and raise it again.

    Args:
        log_dir: log directory, from which the file of an earlier run is removed; None: nothing is written.
    """
    clear_failure(log_dir)
    try:
        yield
    except Exception as error:
        if log_dir is not None:
            message = first_line(error) if str(error) else ""
            try:
                write_json(log_dir / FAILURE_FILE, {"type": type(error).__name__, "message": message})
            except OSError as full:
                _log.warning("%s could not be written: %s", FAILURE_FILE, full)
        raise


def read_failure(log_dir: Path | None) -> tuple[str, str] | None:
    """Class name and first message line in ``failure.json``; None if the ServerApp wrote none."""
    if log_dir is None or not (path := log_dir / FAILURE_FILE).is_file():
        return None
    failure = json.loads(path.read_text(encoding="utf-8"))
    return failure["type"], failure["message"]


def clear_failure(log_dir: Path | None) -> None:
    """Remove ``failure.json`` of an earlier run."""
    if log_dir is not None:
        (log_dir / FAILURE_FILE).unlink(missing_ok=True)
