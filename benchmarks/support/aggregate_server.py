"""One server in a process of its own that takes in the replies of a round: what it takes of memory and time.

``python -m benchmarks.support.aggregate_server GRAPH REPLIES CLIENTS METHOD`` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import psutil
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.support.runner import peak_bytes
from configs.schema import RunConfig
from federated.aggregation.combine import aggregate
from federated.aggregation.usage import pack_usage
from federated.protocol.messages import Reply, write_reply
from federated.wire.codec import unpack_update
from models.graph.unit_vectors import unit_sizes
from server.model.global_model import GlobalModel
from server.rounds.exchange import exchange
from server.rounds.reply_spool import ReplySpool
from server.rounds.run_observer import (  # noqa: F401 - imports that a server makes count as imports
    RunObserver,
)
from server.rounds.validation import check_replies
from server.strategies.sam_v2 import sam_v2

_MIB = 2**20
_CLEAR = Path("/proc/self/clear_refs")
EXAMPLES = 100.0


class ReplyGrid(Grid):
    """A grid whose nodes answer with the packed updates of a folder, each read when it is pulled.

    Args:
        server: that the replies are for.
        updates: a file a client.
    """

    def __init__(self, server: GlobalModel, updates: list[Path]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._server, self._updates = server, updates
        self._asked: dict[str, tuple[Message, int]] = {}

    run: Run = Run.create_empty(1)

    def set_run(self, run: Run) -> None:
        """There is one only."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(len(self._updates))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            message_id = str(len(self._asked))
            message.metadata.__dict__["_message_id"] = message_id
            self._asked[message_id] = message, message.metadata.dst_node_id
        return list(self._asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._reply(*self._asked[message_id]) for message_id in message_ids]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, message: Message, node: int) -> Message:
        graph = self._server.graph
        reply = Reply(
            name=f"client {node}",
            partition=node,
            budget=0,
            version=self._server.version,
            graph_hash=graph.digest(),
            numbers={"examples": EXAMPLES + node, "train-loss": 1.0, "density": 0.0},
            update=self._updates[node].read_bytes(),
            usage=pack_usage([np.zeros((count, count), dtype=np.int64) for count in graph.num_experts]),
            residents=[np.ones(count, dtype=bool) for count in graph.num_experts],
        )
        return Message(write_reply(reply), reply_to=message)


def packed_round(server: GlobalModel, updates: list[Path], scratch: Path) -> None:
    """A round as the federation runs it: pull, check, aggregate, step."""
    grid = ReplyGrid(server, updates)
    contents = {node: RecordDict({}) for node in grid.get_node_ids()}
    with ReplySpool(scratch) as spool:
        answers = exchange(grid, contents, "train", group="1", timeout=600, spool=spool)
        replies = check_replies(answers, server, sam_v2(RunConfig()))
        if len(replies.accepted) != len(updates):
            raise RuntimeError(f"replies were refused: {sorted(set(replies.refused.values()))}")
        change = aggregate(
            [accepted.contribution for accepted in replies.accepted],
            combine=RunConfig().combine,
            clip_norm_multiple=2.0,
        )
    server.advance(change, value_bits=4)


def dense_round(server: GlobalModel, updates: list[Path], scratch: Path) -> None:
    """FedAvg over a list of dense fp32 arrays, as the clients of a plain strategy send them."""
    sizes = unit_sizes(server.model)
    arrays = [_dense(path, sizes) for path in updates]
    weights = np.array([EXAMPLES + node for node in range(len(updates))])
    step = np.zeros_like(arrays[0])
    for weight, array in zip(weights / weights.sum(), arrays, strict=True):
        step += np.float32(weight) * array
    if not np.isfinite(step).all():
        raise RuntimeError("the step is not finite")


METHODS: dict[str, Callable[[GlobalModel, list[Path], Path], None]] = {
    "packed": packed_round,
    "dense": dense_round,
}


def measure_server(graph: str, replies: Path, clients: int, method: str) -> dict[str, float]:
    """Peak MiB of the server's process beyond what imports take, and the seconds of the round."""
    imported = psutil.Process().memory_info().rss / _MIB
    _reset_peak()
    server = GlobalModel(graph)
    with tempfile.TemporaryDirectory(prefix="fedgraft-") as scratch:
        started = time.perf_counter()
        METHODS[method](server, sorted(replies.glob("*.update"))[:clients], Path(scratch))
        seconds = time.perf_counter() - started
    return {"imports_mib": imported, "peak_mib": peak_bytes() / _MIB - imported, "round_seconds": seconds}


def _dense(path: Path, sizes: dict) -> np.ndarray:
    update = unpack_update(path.read_bytes(), sizes=sizes)
    return np.concatenate([vector.to_dense() for _, vector in sorted(update.vectors.items())])


def _reset_peak() -> None:
    """Forget what imports took for a moment; elsewhere than on Linux it counts."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def main() -> None:
    """Measure the server that the command line describes."""
    graph, replies, clients, method = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(measure_server(graph, Path(replies), int(clients), method)))


if __name__ == "__main__":
    main()
