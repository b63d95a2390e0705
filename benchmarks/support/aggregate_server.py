"""Peak memory and seconds of one aggregation round, measured in a server process of its own.

``python -m benchmarks.support.aggregate_server GRAPH REPLIES CLIENTS METHOD`` prints one JSON object (MiB and seconds).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.support.process_peak import peak_bytes
from configs.run_views import Combine
from configs.schema import RunConfig
from federated.aggregation.combine import aggregate
from federated.aggregation.usage import pack_usage
from federated.protocol.messages import Reply, write_reply
from federated.wire.codec import unpack_update
from models.graph.unit_vectors import unit_sizes
from server.flower.in_process_grid import InProcessGrid
from server.model.global_model import GlobalModel
from server.rounds.exchange import Patience, exchange
from server.rounds.reply_spool import ReplySpool
from server.rounds.run_observer import (  # noqa: F401 - counts as import memory, as in a real server
    RunObserver,
)
from server.rounds.validation import check_replies
from server.strategies.sam_v2 import sam_v2

_MIB = 2**20
_CLEAR = Path("/proc/self/clear_refs")
EXAMPLES = 100.0


class ReplyGrid(InProcessGrid):
    """Grid whose nodes reply with packed updates from files; a reply is read when it is pulled, one at a time.

    Args:
        server: global model that the replies fit.
        updates: one file per client.
    """

    def __init__(self, server: GlobalModel, updates: list[Path]) -> None:
        super().__init__(ClientApp(), [{}] * len(updates), {}, wire=False)
        self._server, self._updates = server, updates
        self._asked: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to the messages, each read from its client's file."""
        return [self._reply_to(self._asked[message_id]) for message_id in message_ids]

    def _deliver(self, message: Message) -> str:
        message_id = str(len(self._asked))
        message.metadata.__dict__["_message_id"] = message_id
        self._asked[message_id] = message
        return message_id

    def _reply_to(self, message: Message) -> Message:
        graph, node = self._server.graph, self.node_ids.index(message.metadata.dst_node_id)
        reply = Reply(
            name=f"client-{node}",
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


def packed_round(
    server: GlobalModel, updates: list[Path], scratch: Path, combine: Combine = RunConfig().combine
) -> None:
    """Run one server round on packed replies: pull, check, aggregate, and apply the step."""
    grid = ReplyGrid(server, updates)
    contents = {node: RecordDict({}) for node in grid.get_node_ids()}
    with ReplySpool(scratch) as spool:
        answers = exchange(grid, contents, "train", group="1", patience=Patience(600), spool=spool)
        replies = check_replies(answers, server, sam_v2(RunConfig()))
        if len(replies.accepted) != len(updates):
            raise RuntimeError(f"replies were refused: {sorted(set(replies.refused.values()))}")
        change = aggregate(
            [accepted.contribution for accepted in replies.accepted],
            combine=combine,
            clip_norm_multiple=2.0,
        )
    server.advance(change, value_bits=4)


def dense_round(server: GlobalModel, updates: list[Path], scratch: Path) -> None:
    """Average dense fp32 arrays as plain FedAvg does: all of them in memory at once."""
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
    "median": partial(packed_round, combine="median"),
}


def measure_server(graph: str, replies: Path, clients: int, method: str) -> dict[str, float]:
    """Peak MiB of this process above its size after imports, and seconds of the round."""
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
    """Reset the peak resident set size, which imports may have raised; a no-op outside Linux."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def main() -> None:
    """Measure the server given by the command line."""
    graph, replies, clients, method = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(measure_server(graph, Path(replies), int(clients), method)))


if __name__ == "__main__":
    main()
