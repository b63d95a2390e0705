"""One exchange with the clients over a Flower Grid: push, pull until all have answered or time is up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from configs.errors import UserError
from federated.messages import NEEDS_RECIPE, RESEND, message_bytes

POLL_SECONDS = 0.2
_LONGEST_VERSION = 16  # digits


@dataclass(frozen=True)
class Answer:
    """What came back from one node.

    Attributes:
        content: of the reply; None where there is an error.
        error: reason why there is none; empty where there is a reply.
        held_version: version that the node holds, where it asks for the steps since then; else None.
        bytes_up: of the reply.
        bytes_down: of the request.
        needs_recipe: whether the node asks for the recipe of the graph.
    """

    content: RecordDict | None
    error: str
    held_version: int | None
    bytes_up: int
    bytes_down: int
    needs_recipe: bool = False


def wait_for_nodes(grid: Grid, count: int, *, timeout: float) -> list[int]:
    """Node ids of at least ``count`` connected clients, in order.

    Raises:
        UserError: fewer are there after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= count:
            return nodes[:count]
        if time.monotonic() > deadline:
            raise UserError(
                f"expected {count} connected clients, got {len(nodes)} within {timeout:.0f} s; "
                "start more SuperNodes or lower num-clients"
            )
        time.sleep(POLL_SECONDS)


def exchange(
    grid: Grid, contents: Mapping[int, RecordDict], message_type: str, *, group: str, timeout: float
) -> dict[int, Answer]:
    """Send each node its content and collect one answer per node.

    A node that does not answer within ``timeout`` seconds is answered for with an error.

    Args:
        grid: Flower's.
        contents: by node id.
        message_type: ``train`` or ``evaluate``.
        group: name of the exchange, for Flower's log.
        timeout: seconds.
    """
    messages = [
        Message(content, dst_node_id=node, message_type=message_type, group_id=group)
        for node, content in contents.items()
    ]
    # Flower's serialisation is the truth about what is sent; an error reply carries no content.
    sent = {node: message_bytes(content) for node, content in contents.items()}
    waiting = dict(zip(grid.push_messages(messages), contents, strict=True))
    answers: dict[int, Answer] = {}
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                answers[node] = _read(reply, sent[node])
        if waiting:
            time.sleep(POLL_SECONDS)
    late = f"no answer within {timeout:.0f} s"
    return answers | {node: Answer(None, late, None, 0, sent[node]) for node in waiting.values()}


def _read(reply: Message, bytes_down: int) -> Answer:
    if reply.has_error():
        reason = reply.error.reason or f"Flower error {reply.error.code}"
        return Answer(
            None,
            reason,
            _held_version(reply, reason),
            len(reason.encode()),
            bytes_down,
            needs_recipe=reply.error.code == NEEDS_RECIPE,
        )
    return Answer(reply.content, "", None, message_bytes(reply.content), bytes_down)


def _held_version(reply: Message, reason: str) -> int | None:
    is_version = reason.isascii() and reason.isdigit() and len(reason) < _LONGEST_VERSION
    return int(reason) if reply.error.code == RESEND and is_version else None
