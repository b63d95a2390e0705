"""Flower Grid within one process: each message runs a ClientApp at once; replies can be dropped, delayed or altered.

A whole federation, server and clients, then runs without SuperLink and SuperNodes, e.g. in a benchmark or a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
CLIENT_APP_RAISED = 2  # Flower's error code for an exception in a ClientApp


@dataclass(frozen=True)
class Drop:
    """Fault: no reply arrives, as from a node that died."""


@dataclass(frozen=True)
class Late:
    """Fault: the reply arrives ``pulls`` pulls after the first one."""

    pulls: int = 1


# A fault: no reply, a late one, an error in its place, or a function that changes the reply on the way.
Fault = Drop | Late | Error | Callable[[Message], Message]


class InProcessGrid(Grid):
    """Grid that runs a ClientApp once per pushed message, with one lasting Context per node.

    Args:
        client_app: called with each message and the Context of its node.
        node_configs: node configuration of each node (e.g. partition-id, num-partitions); node ids descend in this
            order, since those of a real Grid follow no order.
        run_config: run configuration, the same in every Context.
        wire: whether messages are serialized and restored as by Flower in both directions, and their bytes counted.
        faults: fault by ``(node index, group id)``.

    Attributes:
        bytes_down: serialized bytes of all messages so far; 0 without ``wire``.
        bytes_up: serialized bytes of all replies so far; 0 without ``wire``.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        node_configs: Sequence[Mapping[str, bool | int | float | str]],
        run_config: Mapping[str, bool | int | float | str],
        *,
        wire: bool = True,
        faults: Mapping[tuple[int, str], Fault] | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
        self.client_app, self.wire, self.faults = client_app, wire, dict(faults or {})
        self.node_ids = [1000 - index for index in range(len(node_configs))]
        self.contexts = {
            node_id: Context(
                run_id=RUN_ID,
                node_id=node_id,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node_id, config in zip(self.node_ids, node_configs, strict=True)
        }
        self.bytes_down = self.bytes_up = 0
        self._replies: dict[str, Message] = {}
        self._waits: dict[str, int] = {}
        self._run = Run.create_empty(RUN_ID)

    @property
    def run(self) -> Run:
        """Run that the messages belong to."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run that the messages belong to."""
        self._run = run

    def get_node_ids(self) -> list[int]:
        """Ids of all nodes, ascending: not the order of ``node_configs``."""
        return sorted(self.node_ids)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message to a node; new code calls the Message constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the ClientApp on each message, keep the replies, and return the message ids."""
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages that have arrived and were not pulled before."""
        arrived = []
        for message_id in message_ids:
            if self._waits.get(message_id, 0) > 0:
                self._waits[message_id] -= 1
            elif message_id in self._replies:
                arrived.append(self._replies.pop(message_id))
        return arrived

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push the messages and pull until all replies have arrived; with a ``timeout``, dropped ones are left out.

        Raises:
            TimeoutError: a reply was dropped and ``timeout`` is None, for which a real Grid would wait without end.
        """
        message_ids = self.push_messages(messages)
        replies: list[Message] = []
        while any(message_id in self._replies for message_id in message_ids):
            replies += self.pull_messages(message_ids)
        if len(replies) < len(message_ids) and timeout is None:
            raise TimeoutError(f"expected {len(message_ids)} replies, got {len(replies)}; set a timeout")
        return replies

    def _deliver(self, message: Message) -> str:
        if self.wire:
            message, size = over_the_wire(message)
            self.bytes_down += size
        else:
            message.metadata.__dict__["_message_id"] = uuid4().hex
        message_id = message.metadata.message_id
        node_id = message.metadata.dst_node_id
        fault = self.faults.get((self.node_ids.index(node_id), message.metadata.group_id))
        reply = self._reply(message, node_id, fault)
        if reply is not None:
            if self.wire:
                reply, size = over_the_wire(reply)
                self.bytes_up += size
            self._replies[message_id] = reply
        if isinstance(fault, Late):
            self._waits[message_id] = fault.pulls
        return message_id

    def _reply(self, message: Message, node_id: int, fault: Fault | None) -> Message | None:
        if isinstance(fault, Drop):
            return None
        if isinstance(fault, Error):
            return Message(fault, reply_to=message)
        try:
            reply = self.client_app(message, self.contexts[node_id])
        except Exception as error:  # what flwr-clientapp does with it
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(code=CLIENT_APP_RAISED, reason=reason), reply_to=message)
        # A real SuperNode that gets anything else never answers again.
        assert isinstance(reply, Message), f"the ClientApp returned {type(reply).__name__}, not a Message"
        return reply if fault is None or isinstance(fault, Late) else fault(reply)


def over_the_wire(message: Message) -> tuple[Message, int]:
    """Serialize and restore a message as Flower does; returns the copy and its serialized bytes."""
    message_id = message.object_id
    contents = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}
    copy = inflate_object_from_contents(message_id, dict(contents))
    assert isinstance(copy, Message)
    copy.metadata.__dict__["_message_id"] = message_id
    return copy, sum(map(len, contents.values()))
