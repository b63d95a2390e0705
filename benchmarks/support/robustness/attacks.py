"""Attacks of hostile clients: changes of their honest training replies, as messages of Flower."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Context, Message, MessageType

from federated.aggregation.usage import pack_usage
from federated.protocol.messages import Reply, read_reply, write_reply
from federated.protocol.reply_bounds import LARGEST_COUNT
from federated.updates.update import SparseUpdate, SparseVector
from federated.wire.codec import pack_update, unpack_update
from models.graph.unit_vectors import Unit

ClientApp = Callable[[Message, Context], Message]
_VALUE_BITS = 8  # of altered updates


@dataclass(frozen=True)
class Victim:
    """Facts of the model and the federation that an attacker knows.

    Attributes:
        num_experts: E of each layer.
        sizes: entries of each unit.
        num_clients: clients of the federation.
    """

    num_experts: list[int]
    sizes: Mapping[Unit, int]
    num_clients: int


Attack = Callable[[Reply, Victim], Reply]


class AttackedApp:
    """ClientApp some of whose clients alter their training replies; errors and evaluations stay as they are.

    Args:
        app: honest ClientApp.
        attackers: partitions of the hostile clients.
        attack: change of a reply.
        victim: facts of the model and the federation.
    """

    def __init__(self, app: ClientApp, attackers: Collection[int], attack: Attack, victim: Victim) -> None:
        self._app, self._attackers, self._attack, self._victim = app, frozenset(attackers), attack, victim

    def __call__(self, message: Message, context: Context) -> Message:
        answer = self._app(message, context)
        hostile = context.node_config["partition-id"] in self._attackers
        if not hostile or message.metadata.message_type != MessageType.TRAIN or answer.has_error():
            return answer
        reply = read_reply(answer.content, self._victim.num_experts)
        return Message(write_reply(self._attack(reply, self._victim)), reply_to=message)


def scaled(reply: Reply, victim: Victim) -> Reply:
    """Send 100 times the update."""
    return _with_update(reply, victim, lambda vector, _: 100 * vector.values)


def flipped(reply: Reply, victim: Victim) -> Reply:
    """Send 10 times the update with its sign flipped."""
    return _with_update(reply, victim, lambda vector, _: -10 * vector.values)


def random(reply: Reply, victim: Victim) -> Reply:
    """Send normally distributed values of 10 times the update's root mean square, at the same entries."""

    def draw(vector: SparseVector, generator: np.random.Generator) -> np.ndarray:
        scale = 10 * float(np.sqrt(np.mean(np.square(vector.values)))) if vector.values.size else 0.0
        return scale * generator.standard_normal(vector.values.size)

    return _with_update(reply, victim, draw)


def not_a_number(reply: Reply, victim: Victim) -> Reply:
    """Report NaN for every number."""
    return replace(reply, numbers=dict.fromkeys(reply.numbers, float("nan")))


def lied(reply: Reply, victim: Victim) -> Reply:
    """Claim the largest number of examples and one forged pair of experts, with the sign of the update flipped."""
    numbers = reply.numbers | {"examples": float(LARGEST_COUNT), "train-tokens": float(LARGEST_COUNT)}
    counts = [np.zeros((count, count), dtype=np.int64) for count in victim.num_experts]
    for count in counts:
        count[0, -1] = 2**32 - 1
    turned = _with_update(reply, victim, lambda vector, _: -vector.values)
    return replace(turned, numbers=numbers, usage=pack_usage(counts))


def stolen(reply: Reply, victim: Victim) -> Reply:
    """Answer as the client at the other end of the list, with 10 times the update and its sign flipped."""
    return replace(flipped(reply, victim), partition=victim.num_clients - 1 - reply.partition)


ATTACKS: dict[str, Attack] = {
    "scaled": scaled,
    "flipped": flipped,
    "random": random,
    "nan": not_a_number,
    "lied": lied,
    "stolen": stolen,
}


def _with_update(
    reply: Reply, victim: Victim, values: Callable[[SparseVector, np.random.Generator], np.ndarray]
) -> Reply:
    update = unpack_update(reply.update, sizes=victim.sizes)
    generator = np.random.default_rng((reply.version, reply.partition))
    vectors = {
        unit: SparseVector(vector.size, vector.indices, values(vector, generator))
        for unit, vector in update.vectors.items()
    }
    altered = SparseUpdate(update.graph_version, update.graph_hash, vectors)
    return replace(reply, update=pack_update(altered, value_bits=_VALUE_BITS))
