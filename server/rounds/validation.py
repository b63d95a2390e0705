"""Validation of the answers of an exchange: bad replies are refused with a reason and never reach the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from federated.aggregation.caps import capped
from federated.protocol.messages import Reply, read_reply
from federated.protocol.reply_bounds import check_reply
from federated.updates.update import RefusedUpdate
from models.runtime.perplexity import LossSum
from server.model.global_model import GlobalModel
from server.rounds.exchange import Answer
from server.rounds.reply_spool import HeldBytes
from server.strategies.strategy import Accepted, Strategy

# Bound of one client's part in the loss that is logged and that ends a run early.
LOSS_CAP = 4.0

_log = logging.getLogger(__name__)


@dataclass
class RoundReplies:
    """Validated answers of a training round.

    Attributes:
        accepted: in order of the clients' partitions.
        refused: reason by node.
    """

    accepted: list[Accepted] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """A valid answer to the final evaluation.

    Attributes:
        node: Flower node id of the sender.
        reply: reply as read.
        loss: of the global model on the client's held-out text.
    """

    node: int
    reply: Reply
    loss: LossSum


@dataclass
class Evaluations:
    """Validated answers to the final evaluation.

    Attributes:
        accepted: in order of node ids.
        refused: reason by node.
    """

    accepted: list[Evaluation] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def loss(self) -> LossSum:
        """Loss of the model over the held-out text of all clients (``total_loss``)."""
        return total_loss(each.loss for each in self.accepted)


_Checked = TypeVar("_Checked", Accepted, Evaluation)


def check_replies(
    answers: Mapping[int, Answer],
    global_model: GlobalModel,
    strategy: Strategy,
    *,
    partitions: Mapping[int, int] | None = None,
    weight_cap: float = 0.0,
    inclusion: Mapping[int, float] | None = None,
) -> RoundReplies:
    """Validate the answers of a training round.

    Updates stay packed; the strategy keeps a function that decodes its own.

    Args:
        answers: by node.
        global_model: model that the clients trained.
        strategy: validates the method-specific parts.
        partitions: client index by node, of nodes with an earlier accepted reply.
        weight_cap: largest weight of a client as a multiple of the lower median of the round; 0: as claimed.
        inclusion: probability of a node to be asked, by which its weight is divided (``Participants``); 1 where absent.
    """

    def accept(node: int, answer: Answer) -> Accepted:
        reply = _read(answer, global_model)
        packed = answer.update if answer.update is not None else HeldBytes(reply.update)
        return strategy.accept(node, reply, packed, global_model)

    accepted, refused = _sort_out(answers, accept, partitions, what="reply")
    accepted.sort(key=lambda each: each.reply.partition)
    return RoundReplies(_with_weights(accepted, weight_cap, inclusion or {}), refused)


def check_evaluations(
    answers: Mapping[int, Answer], global_model: GlobalModel, partitions: Mapping[int, int]
) -> Evaluations:
    """Validate the answers to the final evaluation.

    Args:
        answers: by node.
        global_model: model that the clients evaluated.
        partitions: client index by node, of nodes with an earlier accepted reply.
    """

    def accept(node: int, answer: Answer) -> Evaluation:
        reply = _read(answer, global_model)
        return Evaluation(node, reply, reply_loss(reply, "valid"))

    return Evaluations(*_sort_out(answers, accept, partitions, what="evaluation"))


def check_sender(node: int, reply: Reply, owners: Mapping[int, int]) -> None:
    """Refuse a node that answers as another client than before, or as a client of another node.

    Args:
        node: Flower node id of the sender.
        reply: its reply.
        owners: node by client index.

    Raises:
        RefusedUpdate: names the client.
    """
    if owners.get(reply.partition, node) != node:
        raise RefusedUpdate(f"client {reply.partition} has answered already, from another node")
    before = [partition for partition, owner in owners.items() if owner == node]
    if before and reply.partition not in before:
        raise RefusedUpdate(f"expected an answer of client {before[0]}, got one of client {reply.partition}")


def held_out_loss(replies: RoundReplies) -> LossSum:
    """Loss of the global model before training over the held-out text of all accepted clients (``total_loss``)."""
    return total_loss([reply_loss(accepted.reply, "valid") for accepted in replies.accepted])


def total_loss(losses: Iterable[LossSum]) -> LossSum:
    """Sum over clients; tokens and mean loss of each count at most ``LOSS_CAP`` times the median over all."""
    known = [loss for loss in losses if loss.tokens]
    tokens = capped([loss.tokens for loss in known], LOSS_CAP)
    means = capped([loss.mean for loss in known], LOSS_CAP)
    return sum(
        (
            loss if (count, mean) == (loss.tokens, loss.mean) else LossSum(mean * int(count), int(count))
            for loss, count, mean in zip(known, tokens, means, strict=True)
        ),
        LossSum(),
    )


def reply_loss(reply: Reply, name: str) -> LossSum:
    """Loss that a reply reports under ``name``; zero tokens where it reports none."""
    return LossSum(reply.numbers.get(f"{name}-nll", 0.0), int(reply.numbers.get(f"{name}-tokens", 0)))


def _with_weights(
    accepted: Sequence[Accepted], multiple: float, inclusion: Mapping[int, float]
) -> list[Accepted]:
    """Cap the claimed weights, divide them by the inclusion probabilities and cap them again.

    The probability follows from what a client claimed before, so that its quotient with the claim of now needs a bound
    of its own.
    """
    weights = capped([each.contribution.weight for each in accepted], multiple)
    weights = [weight / inclusion.get(each.node, 1.0) for each, weight in zip(accepted, weights, strict=True)]
    weights = capped(weights, multiple)
    return [
        replace(each, contribution=replace(each.contribution, weight=weight))
        for each, weight in zip(accepted, weights, strict=True)
    ]


def _sort_out(
    answers: Mapping[int, Answer],
    accept: Callable[[int, Answer], _Checked],
    partitions: Mapping[int, int] | None,
    *,
    what: str,
) -> tuple[list[_Checked], dict[int, str]]:
    """Accept or refuse each answer; a node keeps its client, and a client its node."""
    accepted, refused = [], {}
    owners = {partition: node for node, partition in (partitions or {}).items()}
    for node, answer in sorted(answers.items()):
        try:
            result = accept(node, answer)
            check_sender(node, result.reply, owners)
            owners[result.reply.partition] = node
            accepted.append(result)
        except RefusedUpdate as error:
            refused[node] = error.reason
        except Exception as error:  # noqa: BLE001 - the boundary to what clients send
            _log.exception("the %s of node %s cannot be checked", what, node)
            refused[node] = f"the {what} cannot be checked: {type(error).__name__}"
        if node in refused:
            _log.warning("the %s of node %s is refused: %s", what, node, refused[node])
    return accepted, refused


def _read(answer: Answer, global_model: GlobalModel) -> Reply:
    """Read a reply to the current version of the global model; RefusedUpdate for any other."""
    if answer.content is None:
        raise RefusedUpdate(answer.error)
    graph = global_model.graph
    reply = read_reply(answer.content, graph.num_experts)
    check_reply(reply, num_experts=max(graph.num_experts))
    if reply.version != global_model.version:
        raise RefusedUpdate(
            f"expected an update of version {global_model.version}, got one of version {reply.version}"
        )
    if reply.graph_hash != graph.digest():
        raise RefusedUpdate(f"expected the graph {graph.digest()[:12]}, got {reply.graph_hash[:12]!r}")
    return reply
