"""From the answers of a round to what may touch the model: everything is checked, bad replies are refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from federated.aggregation.combine import Contribution, Shipped, summarize
from federated.aggregation.usage import unpack_usage
from federated.protocol.messages import Reply, read_reply
from federated.updates.update import RefusedUpdate, SparseUpdate, Unit
from federated.wire.codec import PackedStats, packed_stats, unpack_update
from models.graph.unit_vectors import OTHERS, unit_sizes
from models.runtime.perplexity import LossSum
from server.model.global_model import GlobalModel
from server.rounds.exchange import Answer

REQUIRED_NUMBERS = ("examples", "train-loss", "density")
WEIGHT_NUMBERS = {"examples": "examples", "tokens": "train-tokens"}

_log = logging.getLogger(__name__)
_LARGEST_HEADER = 1 << 16  # bytes of a packed update beside its columns

# What no honest client exceeds, and what keeps every sum of a round finite whatever clients claim.
LARGEST_CHANGE = 65504.0  # of a single weight: what half precision can hold
LARGEST_COUNT = 2.0**40  # examples or tokens of one client in one round
SMALLEST_INCLUSION = 2.0**-20  # probability with which a shipped expert was drawn


@dataclass(frozen=True)
class Accepted:
    """A reply that passed all checks.

    Attributes:
        node: Flower's id of the sender.
        reply: as read, without the packed update.
        contribution: for the aggregation.
        usage: per layer ``[E, E]``.
        stats: sizes of its packed update.
    """

    node: int
    reply: Reply
    contribution: Contribution
    usage: list[np.ndarray]
    stats: PackedStats


@dataclass
class RoundReplies:
    """The answers of one round.

    Attributes:
        accepted: in order of the clients' partitions.
        refused: reason by node.
    """

    accepted: list[Accepted] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)


def check_replies(
    answers: Mapping[int, Answer],
    server: GlobalModel,
    *,
    attention: bool = False,
    client_weight: Literal["examples", "tokens"] = "examples",
    partitions: Mapping[int, int] | None = None,
) -> RoundReplies:
    """Sort the answers of a round into those that count and those that are refused, with the reason.

    No update stays unpacked: a contribution unpacks its own anew.

    Args:
        answers: by node.
        server: what they are answers to.
        attention: whether clients train attention, too.
        client_weight: what a client weighs, its examples or the tokens it trained on in this round.
        partitions: by node, the client that it has answered as before.
    """
    result = RoundReplies()
    owners = {partition: node for node, partition in (partitions or {}).items()}
    for node, answer in sorted(answers.items()):
        try:
            accepted = _check(node, answer, server, attention, client_weight)
            check_sender(node, accepted.reply, owners)
            owners[accepted.reply.partition] = node
            result.accepted.append(accepted)
        except RefusedUpdate as error:
            _log.warning("the reply of node %s is refused: %s", node, error.reason)
            result.refused[node] = error.reason
    result.accepted.sort(key=lambda each: each.reply.partition)
    return result


def check_evaluations(
    answers: Mapping[int, Answer], server: GlobalModel, partitions: Mapping[int, int]
) -> dict[int, Answer]:
    """The answers to an evaluation, with errors in the place of those that are refused.

    Args:
        answers: by node.
        server: what they are answers to.
        partitions: by node, the client that it has answered as before.
    """
    checked, owners = {}, {partition: node for node, partition in partitions.items()}
    for node, answer in sorted(answers.items()):
        checked[node] = answer
        try:
            if answer.content is not None:
                reply = read_reply(answer.content, server.graph.num_experts)
                check_numbers(reply)
                _check_state(reply, server)
                check_sender(node, reply, owners)
                owners[reply.partition] = node
        except RefusedUpdate as error:
            _log.warning("the evaluation of node %s is refused: %s", node, error.reason)
            checked[node] = replace(answer, content=None, error=error.reason)
    return checked


def check_sender(node: int, reply: Reply, owners: Mapping[int, int]) -> None:
    """Refuse a node that answers as another client than before, or as one that another node answers for.

    Args:
        node: the sender.
        reply: of it.
        owners: by partition, the node that answers for it.

    Raises:
        RefusedUpdate: says which.
    """
    if owners.get(reply.partition, node) != node:
        raise RefusedUpdate(f"client {reply.partition} has answered already, from another node")
    before = [partition for partition, owner in owners.items() if owner == node]
    if before and reply.partition not in before:
        raise RefusedUpdate(f"expected an answer of client {before[0]}, got one of client {reply.partition}")


def held_out_loss(replies: RoundReplies) -> LossSum:
    """Loss of the global model on the held-out text of all clients accepted, as it was before they trained."""
    return sum((reply_loss(accepted.reply, "valid") for accepted in replies.accepted), LossSum())


def reply_loss(reply: Reply, name: str) -> LossSum:
    """The loss that a reply reports under ``name``; over no token where it reports none."""
    return LossSum(reply.numbers.get(f"{name}-nll", 0.0), int(reply.numbers.get(f"{name}-tokens", 0)))


def check_numbers(reply: Reply, required: Iterable[str] = ()) -> None:
    """Refuse numbers that are not finite or below zero.

    Raises:
        RefusedUpdate: names the number, or the one of ``required`` that is missing.
    """
    for name in required:
        if name not in reply.numbers:
            raise RefusedUpdate(f"expected the number {name}, got none")
    for name, value in reply.numbers.items():
        if not math.isfinite(value) or value < 0:
            raise RefusedUpdate(f"expected {name} to be a finite number of at least 0, got {value}")


def _check(node: int, answer: Answer, server: GlobalModel, attention: bool, client_weight: str) -> Accepted:
    if answer.content is None:
        raise RefusedUpdate(answer.error)
    graph, sizes = server.graph, unit_sizes(server.model, attention=attention)
    reply = read_reply(answer.content, graph.num_experts)
    check_numbers(reply, (*REQUIRED_NUMBERS, WEIGHT_NUMBERS[client_weight]))
    _check_state(reply, server)
    if len(reply.residents) != len(graph.masks):
        raise RefusedUpdate(
            f"expected the residents of {len(graph.masks)} layers, got {len(reply.residents)}"
        )
    trained = {(layer, int(e)) for layer, held in enumerate(reply.residents) for e in np.flatnonzero(held)}
    trained |= {unit for unit in sizes if unit[1] == OTHERS}
    read = answer.update.read if answer.update is not None else lambda: reply.update
    if answer.update is not None:
        _check_size(answer.update.size, sizes)

    def unpack() -> SparseUpdate:
        return unpack_update(read(), sizes=sizes, graph_version=graph.version, graph_hash=graph.digest())

    contribution = Contribution(
        _weight(reply, client_weight),
        unpack,
        _inclusion(reply, trained),
        trained,
        _first_pass(unpack, trained),
    )
    usage = unpack_usage(reply.usage, graph.num_experts)
    return Accepted(node, reply, contribution, usage, packed_stats(read()))


def _check_state(reply: Reply, server: GlobalModel) -> None:
    """Refuse a reply to anything but the global model as it is."""
    if reply.version != server.version:
        raise RefusedUpdate(
            f"expected an update of version {server.version}, got one of version {reply.version}"
        )
    graph = server.graph
    if reply.graph_hash != graph.digest():
        raise RefusedUpdate(f"expected the graph {graph.digest()[:12]}, got {reply.graph_hash[:12]!r}")
    if reply.partition < 0:
        raise RefusedUpdate(f"expected a client of number 0 or above, got {reply.partition}")


def _check_size(size: int, sizes: Mapping[Unit, int]) -> None:
    """Refuse a packed update larger than all its entries uncompressed, before it is read."""
    most = 16 * sum(sizes.values()) + _LARGEST_HEADER
    if size > most:
        raise RefusedUpdate(f"expected an update of at most {most} bytes, got {size}")


def _first_pass(unpack: Callable[[], SparseUpdate], trained: set[Unit]) -> Shipped:
    """What the aggregation needs to know of an update in advance, once its values are seen to be possible."""
    update = unpack()
    stray = set(update.vectors) - trained
    if stray:
        raise RefusedUpdate(f"expected updates of resident experts only, got {min(stray)}")
    for unit, vector in update.vectors.items():
        largest = float(np.abs(vector.values).max()) if vector.values.size else 0.0
        if largest > LARGEST_CHANGE:
            raise RefusedUpdate(
                f"expected changes of at most {LARGEST_CHANGE:.0f}, got {largest:.3g} in unit {unit}"
            )
    return summarize(update)


def _weight(reply: Reply, client_weight: str) -> float:
    name = WEIGHT_NUMBERS[client_weight]
    weight = reply.numbers[name]
    if not 1 <= weight <= LARGEST_COUNT:
        raise RefusedUpdate(f"expected {name} from 1 to {LARGEST_COUNT:.0f}, got {weight}")
    return weight


def _inclusion(reply: Reply, trained: set[Unit]) -> dict[Unit, float]:
    inclusion = {}
    for name, probability in (reply.inclusion or {}).items():
        layer, _, expert = name.partition(".")
        unit = (int(layer), int(expert)) if layer.isdecimal() and expert.isdecimal() else (-1, -1)
        if unit not in trained or not SMALLEST_INCLUSION <= probability <= 1:
            raise RefusedUpdate(
                f"expected the inclusion probability of a resident expert, got {name}: {probability}"
            )
        inclusion[unit] = probability
    return inclusion
