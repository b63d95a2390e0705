"""One exchange of messages over a Flower Grid: push, then pull until every node has answered or a timeout."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from configs.errors import UserError
from federated.protocol.messages import NEEDS_RECIPE, RESEND, detach_update, message_bytes
from server.reporting.unused_clients import NO_ANSWER
from server.rounds.reply_spool import ReplySpool, SpooledBytes

POLL_SECONDS = 0.2
LARGEST_REST = 1 << 26  # bytes of a reply apart from its update; residency and usage counts need far less
_PULLED_AT_ONCE = 2  # replies; all that Flower hands over in one pull are in memory together
_LONGEST_VERSION = 16  # digits
_LONGEST_REASON = 500  # characters

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """Reply or error of one node, with its traffic.

    Attributes:
        content: content of the reply; None for an error.
        error: reason of the error; empty for a reply.
        held_version: version that the node holds, where it requests the steps since then; else None.
        bytes_up: bytes of the reply or error reply; 0 without an answer.
        bytes_down: bytes of the request.
        update: packed update of the reply, where it was moved from ``content`` to disk.
        error_code: Flower's code of the error or one of ``federated.protocol.messages``; 0 without an error reply.
        surplus: whether the round went on without it because enough others had answered.
    """

    content: RecordDict | None
    error: str
    held_version: int | None
    bytes_up: int
    bytes_down: int
    update: SpooledBytes | None = None
    error_code: int = 0
    surplus: bool = False

    @property
    def silent(self) -> bool:
        """Whether the node did not answer although it was waited for."""
        return self.bytes_up == 0 and not self.surplus

    @property
    def needs_recipe(self) -> bool:
        """Whether the node requests the recipe of the graph."""
        return self.error_code == NEEDS_RECIPE


@dataclass(frozen=True)
class Patience:
    """How long the replies of an exchange are waited for.

    Attributes:
        timeout: seconds after which no reply is waited for.
        enough: replies, errors not counted, after which no other is waited for; None: all.
        deadline: seconds after which no other reply is waited for once there are ``quorum``; None: ``timeout``.
        quorum: see ``deadline``.
    """

    timeout: float
    enough: int | None = None
    deadline: float | None = None
    quorum: int = 1

    def ends(self, replies: int, seconds: float) -> bool:
        """Whether the exchange ends with so many replies after so many seconds."""
        if seconds >= self.timeout or (self.enough is not None and replies >= self.enough):
            return True
        return self.deadline is not None and seconds >= self.deadline and replies >= self.quorum


def wait_for_nodes(grid: Grid, count: int, *, timeout: float) -> list[int]:
    """Wait until ``count`` clients are connected; return that many node ids, sorted.

    Raises:
        UserError: fewer are connected after ``timeout`` seconds.
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
    grid: Grid,
    contents: Mapping[int, RecordDict],
    message_type: str,
    *,
    group: str,
    patience: Patience,
    spool: ReplySpool | None = None,
) -> dict[int, Answer]:
    """Send each node its content and collect one answer per node, an error for each node that was not waited for.

    Args:
        grid: Flower's.
        contents: request content by node id.
        message_type: ``train`` or ``evaluate``.
        group: group id of the messages, for Flower's log.
        patience: how long replies are waited for.
        spool: receives the packed updates; None: they stay in memory and count as the rest of a reply.
    """
    messages = [
        Message(content, dst_node_id=node, message_type=message_type, group_id=group)
        for node, content in contents.items()
    ]
    # Traffic is counted on Flower's own serialization.
    sent = {node: message_bytes(message) for node, message in zip(contents, messages, strict=True)}
    waiting = dict(zip(grid.push_messages(messages), contents, strict=True))
    answers: dict[int, Answer] = {}
    started, replies = time.monotonic(), 0
    while waiting and not patience.ends(replies, time.monotonic() - started):
        for reply in _pull(grid, list(waiting)):
            node = waiting.get(reply.metadata.reply_to_message_id)
            if node is not None and _from_another(reply, node):
                _log.warning("a reply of node %s in place of %s is ignored", reply.metadata.src_node_id, node)
            elif node is not None:
                del waiting[reply.metadata.reply_to_message_id]
                answers[node] = _read(reply, sent[node], spool)
                replies += answers[node].content is not None
        if waiting:
            time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - started
    return answers | {node: _missing(patience, replies, seconds, sent[node]) for node in waiting.values()}


def _missing(patience: Patience, replies: int, seconds: float, bytes_down: int) -> Answer:
    """Answer of a node that was not waited for."""
    if patience.enough is not None and replies >= patience.enough:
        return Answer(None, f"{replies} other clients answered first", None, 0, bytes_down, surplus=True)
    return Answer(None, f"{NO_ANSWER} within {seconds:.0f} s", None, 0, bytes_down)


def _from_another(reply: Message, node: int) -> bool:
    """Whether a reply comes from another node than ``node``; errors may come from the SuperLink."""
    return not reply.has_error() and reply.metadata.src_node_id != node


def _pull(grid: Grid, message_ids: list[str]) -> Iterator[Message]:
    """Yield the replies that have arrived, with at most two in memory."""
    for start in range(0, len(message_ids), _PULLED_AT_ONCE):
        replies = list(grid.pull_messages(message_ids[start : start + _PULLED_AT_ONCE]))
        while replies:
            yield replies.pop(0)


def _read(reply: Message, bytes_down: int, spool: ReplySpool | None) -> Answer:
    size = message_bytes(reply)
    if reply.has_error():
        reason = _plain(reply.error.reason or "") or f"Flower error {reply.error.code}"
        held = _held_version(reply, reason)
        if reply.error.code == ErrorCode.NODE_UNAVAILABLE:  # of the SuperLink: no heartbeat any more
            reason = f"{NO_ANSWER}: {reason}"
        return Answer(None, reason, held, size, bytes_down, error_code=reply.error.code)
    content, update = (reply.content, b"") if spool is None else detach_update(reply.content)
    if size - len(update) > LARGEST_REST:
        reason = f"expected at most {LARGEST_REST} bytes apart from the update, got {size - len(update)}"
        return Answer(None, reason, None, size, bytes_down)
    return Answer(content, "", None, size, bytes_down, spool.put(update) if spool is not None else None)


def _plain(reason: str) -> str:
    """Reason of an error in one line of at most ``_LONGEST_REASON`` printable characters."""
    line = " ".join(reason[: 2 * _LONGEST_REASON].split())
    return "".join(letter for letter in line if letter.isprintable())[:_LONGEST_REASON]


def _held_version(reply: Message, reason: str) -> int | None:
    is_version = reason.isascii() and reason.isdigit() and len(reason) < _LONGEST_VERSION
    return int(reason) if reply.error.code == RESEND and is_version else None
