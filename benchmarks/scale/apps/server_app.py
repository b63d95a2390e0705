"""The project's ServerApp with its CPU seconds per round and its peak memory, written to ``server_costs.json``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from benchmarks.scale.apps.costs import ServerCosts
from benchmarks.scale.apps.faults import faulty, write_faults
from configs.schema import load_run_config
from server.app import run_federation
from server.model.global_model import GlobalModel
from server.reporting.failure import recording_failure
from server.rounds.stoppable_grid import StoppableGrid
from server.state.journal import Journal
from server.strategies.sam_v2 import SamV2

# Methods of the server whose CPU seconds are counted by name; the rest of a round is "other".
PARTS = (
    (SamV2, "accept", "check"),
    (SamV2, "combine", "aggregate"),
    (GlobalModel, "advance", "pack"),
    (Journal, "save", "save"),
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the project's ServerApp and write its costs; a client may fail or be late in all rounds."""
    log_dir, costs = Path(str(context.run_config["log-dir"])), ServerCosts()
    config = load_run_config(context.run_config)
    with recording_failure(log_dir), counting_parts(costs):
        run_federation(MeasuredGrid(grid, log_dir, costs), config, run_id=context.run_id)
    costs.write(log_dir)


@contextmanager
def counting_parts(costs: ServerCosts) -> Iterator[None]:
    """Count the CPU seconds of the server's methods of ``PARTS`` in the block."""
    with ExitStack() as stack:
        for owner, method, part in PARTS:
            stack.enter_context(patch.object(owner, method, costs.counted(part, getattr(owner, method))))
        yield


class MeasuredGrid(StoppableGrid):
    """Grid whose exchanges are counted, and which chooses the faults of each round.

    Args:
        grid: Flower's.
        log_dir: log directory of the run.
        costs: receives the CPU seconds of sending, of receiving, and of requests that no reply had arrived to.
    """

    def __init__(self, grid: Grid, log_dir: Path, costs: ServerCosts) -> None:
        super().__init__(grid, log_dir)
        self._costs = costs

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, the first ones of a round after its faults are chosen."""
        messages = list(messages)
        server_round = int(messages[0].metadata.group_id)
        if self._costs.begin(server_round) and server_round > 1 and _is_training(messages):
            asked = [message.metadata.dst_node_id for message in messages]
            write_faults(self._log_dir, server_round, faulty(asked))
        with self._costs.counting("exchange"):
            return list(super().push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have arrived."""
        with self._costs.counting("poll") as part:
            replies = list(super().pull_messages(message_ids))
            if replies:
                part.name = "exchange"
        return replies


def _is_training(messages: list[Message]) -> bool:
    return messages[0].metadata.message_type == MessageType.TRAIN
