"""From the answers of a round to what may touch the model: everything is checked, bad replies are refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from federated.aggregation import Contribution
from federated.codec import PackedStats, packed_stats, unpack_update
from federated.messages import Reply, read_reply
from federated.update import RefusedUpdate, Unit
from federated.usage import unpack_usage
from models.perplexity import LossSum
from models.units import OTHERS, unit_sizes
from server.exchange import Answer
from server.global_model import GlobalModel

REQUIRED_NUMBERS = ("examples", "train-loss", "density")


@dataclass(frozen=True)
class Accepted:
    """A reply that passed all checks.

    Attributes:
        node: Flower's id of the sender.
        reply: as read.
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
    answers: Mapping[int, Answer], server: GlobalModel, *, attention: bool = False
) -> RoundReplies:
    """Sort the answers of a round into those that count and those that are refused, with the reason.

    Args:
        answers: by node.
        server: what they are answers to.
        attention: whether clients train attention, too.
    """
    result, seen = RoundReplies(), set()
    for node, answer in sorted(answers.items()):
        try:
            if answer.content is None:
                raise RefusedUpdate(answer.error)
            accepted = _check(node, answer, server, attention)
            if accepted.reply.partition in seen:
                raise RefusedUpdate(f"client {accepted.reply.partition} has answered already")
            seen.add(accepted.reply.partition)
            result.accepted.append(accepted)
        except RefusedUpdate as error:
            result.refused[node] = error.reason
    result.accepted.sort(key=lambda each: each.reply.partition)
    return result


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


def _check(node: int, answer: Answer, server: GlobalModel, attention: bool) -> Accepted:
    graph = server.graph
    assert answer.content is not None
    reply = read_reply(answer.content, graph.num_experts)
    check_numbers(reply, REQUIRED_NUMBERS)
    if reply.version != server.version:
        raise RefusedUpdate(
            f"expected an update of version {server.version}, got one of version {reply.version}"
        )
    if len(reply.residents) != len(graph.masks):
        raise RefusedUpdate(
            f"expected the residents of {len(graph.masks)} layers, got {len(reply.residents)}"
        )
    sizes = unit_sizes(server.model, attention=attention)
    update = unpack_update(reply.update, sizes=sizes, graph_version=graph.version, graph_hash=graph.digest())
    trained = {(layer, int(e)) for layer, held in enumerate(reply.residents) for e in np.flatnonzero(held)}
    trained |= {unit for unit in sizes if unit[1] == OTHERS}
    stray = set(update.vectors) - trained
    if stray:
        raise RefusedUpdate(f"expected updates of resident experts only, got {min(stray)}")
    weight = reply.numbers["examples"]
    if weight <= 0:
        raise RefusedUpdate("expected at least one training example, got none")
    contribution = Contribution(weight, update, _inclusion(reply, trained), trained)
    usage = unpack_usage(reply.usage, graph.num_experts)
    return Accepted(node, reply, contribution, usage, packed_stats(reply.update))


def _inclusion(reply: Reply, trained: set[Unit]) -> dict[Unit, float]:
    inclusion = {}
    for name, probability in (reply.inclusion or {}).items():
        layer, _, expert = name.partition(".")
        unit = (int(layer), int(expert)) if layer.isdecimal() and expert.isdecimal() else (-1, -1)
        if unit not in trained or not 0 < probability <= 1:
            raise RefusedUpdate(
                f"expected the inclusion probability of a resident expert, got {name}: {probability}"
            )
        inclusion[unit] = probability
    return inclusion
