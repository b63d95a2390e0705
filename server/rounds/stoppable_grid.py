"""Flower Grid that ends a run on request."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from server.state.stop_request import StopRequested, stop_requested


class StoppableGrid(Grid):
    """Grid that raises StopRequested in place of exchanging messages once a stop is requested.

    Args:
        grid: Flower's, which exchanges the messages.
        log_dir: log directory of the run.
    """

    def __init__(self, grid: Grid, log_dir: Path) -> None:
        self._grid, self._log_dir = grid, log_dir

    @property
    def run(self) -> Run:
        """Flower's run."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Set Flower's run."""
        self._grid.set_run(run)

    def create_message(self, *args, **options) -> Message:  # type: ignore[no-untyped-def]
        """Create a message as the other Grid does."""
        return self._grid.create_message(*args, **options)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes."""
        self._check()
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        self._check()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to sent messages that have arrived."""
        self._check()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for their replies."""
        self._check()
        return self._grid.send_and_receive(messages, timeout=timeout)

    def _check(self) -> None:
        if stop_requested(self._log_dir):
            raise StopRequested("interrupted")
