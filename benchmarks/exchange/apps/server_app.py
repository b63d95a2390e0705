"""ServerApp that measures exchanges by ``server.rounds.exchange`` and by Flower's ``send_and_receive`` in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from configs.output import write_json
from configs.schema import load_run_config
from server.rounds.exchange import Patience, exchange, wait_for_nodes

SECONDS_FILE = "seconds.json"
PAYLOAD_BYTES = 1 << 20
_TIMEOUT = 300.0  # seconds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Exchange ``num-rounds`` messages with every node in each of the two ways; the seconds go to ``SECONDS_FILE``.

    Raises:
        RuntimeError: a node did not send the payload back.
    """
    config = load_run_config(context.run_config)
    nodes = wait_for_nodes(grid, config.num_clients, timeout=_TIMEOUT)
    ways: dict[str, Callable[[Grid, Sequence[int]], list[RecordDict | None]]] = {
        "own": _own,
        "flower": _flower,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.num_rounds):
        for name, send in ways.items():
            started = time.perf_counter()
            contents = send(grid, nodes)
            seconds[name].append(time.perf_counter() - started)
            _check(contents, len(nodes))
    write_json(Path(config.log_dir) / SECONDS_FILE, seconds)


def _own(grid: Grid, nodes: Sequence[int]) -> list[RecordDict | None]:
    sent = {node: _content() for node in nodes}
    answers = exchange(grid, sent, MessageType.TRAIN, group="1", patience=Patience(_TIMEOUT))
    return [answer.content for answer in answers.values()]


def _flower(grid: Grid, nodes: Sequence[int]) -> list[RecordDict | None]:
    messages = [Message(_content(), dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
    return [reply.content for reply in grid.send_and_receive(messages, timeout=_TIMEOUT)]


def _content() -> RecordDict:
    """A payload that is new in every message, since Flower sends equal arrays once."""
    data = random.randbytes(PAYLOAD_BYTES)
    array = Array(dtype="uint8", shape=(PAYLOAD_BYTES,), stype="fedgraft.bytes", data=data)
    return RecordDict({"arrays": ArrayRecord({"payload": array})})


def _check(contents: Sequence[RecordDict | None], nodes: int) -> None:
    sizes = [len(each.array_records["arrays"]["payload"].data) for each in contents if each is not None]
    if sizes != [PAYLOAD_BYTES] * nodes:
        raise RuntimeError(f"expected {nodes} payloads of {PAYLOAD_BYTES} bytes, got {sizes}")
