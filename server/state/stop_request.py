"""Request to end a run early, as a file in its log directory."""

from __future__ import annotations

from pathlib import Path

STOP_FILE = "stop"


class StopRequested(RuntimeError):
    """The end of a run by request, before its last round."""


def request_stop(log_dir: Path) -> None:
    """Request that the run of a log directory saves its model and ends; it notices between two messages."""
    (log_dir / STOP_FILE).touch()


def stop_requested(log_dir: Path) -> bool:
    """Whether the run of a log directory is requested to end."""
    return (log_dir / STOP_FILE).exists()


def clear_stop(log_dir: Path) -> None:
    """Withdraw the request, also one of an earlier run."""
    (log_dir / STOP_FILE).unlink(missing_ok=True)
