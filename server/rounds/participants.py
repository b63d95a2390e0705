"""Choice of the nodes that are asked in a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from configs.choices import SamplingWeights
from configs.run_views import Participation
from federated.aggregation.caps import capped
from federated.selection.systematic import draw_systematic, inclusion_probabilities
from server.state.node_session import NodeSession


@dataclass(frozen=True)
class Participants:
    """Nodes of a round.

    Attributes:
        asked: node ids, in order of the clients' indices.
        enough: replies with which the round goes on; the others are not waited for.
        inclusion: probability to be asked of each node whose weight in the aggregate is divided by it.
    """

    asked: list[int]
    enough: int
    inclusion: Mapping[int, float] = field(default_factory=dict)


def choose_participants(
    sessions: Mapping[int, NodeSession],
    server_round: int,
    keys: Participation,
    *,
    seed: int,
    attempt: int = 0,
) -> Participants:
    """Draw the nodes of a round without replacement.

    ``sampling-weights`` says how a node's probability to be asked compares with the others':

    - ``uniform``: all have the same;
    - ``staleness``: proportional to the rounds since the last request to it, so that gaps are more even. In the long
      run all are asked equally often, and the aggregate is weighted as with ``uniform``;
    - ``examples``: proportional to the training blocks that its last accepted reply claimed, at most ``weight-cap``
      times the lower median; of nodes without one, to the mean of the others. The weight of its update is divided by
      the probability (Hajek, 1971), or blocks would count twice: in the draw and in the weight.

    With over-provisioning the probability is that to be asked; which of those asked answer first is not modeled.

    Nodes that did not answer the last times they were asked rest for a growing number of rounds (see
    ``NodeSession.silence``) and are asked only where the others are fewer than ``min-clients``.

    Args:
        sessions: connected nodes.
        server_round: number of the round, from 1.
        keys: share of the nodes, sampling weights, least number of replies and over-provisioning.
        seed: seed of the run.
        attempt: exchanges of this round so far, each with another draw.
    """
    wanted = keys.wanted(len(sessions))
    asked = min(len(sessions), math.ceil(wanted * keys.over_provision))
    # Node ids are random, client indices are not: a run is repeated with the same clients.
    order = sorted(sessions, key=lambda node: (_index(sessions[node]), node))
    awake = [node for node in order if sessions[node].rests_until <= server_round]
    resting = [node for node in order if sessions[node].rests_until > server_round]
    generator = np.random.default_rng([seed, server_round, attempt])
    shuffled = [awake[index] for index in generator.permutation(len(awake))]
    sizes = sampling_sizes({node: sessions[node] for node in shuffled}, server_round, keys)
    if sizes is None:
        drawn = dict.fromkeys(shuffled[:asked], 1.0)
    else:
        drawn = draw_systematic(inclusion_probabilities(sizes, asked), generator.random())
    inclusion = drawn if keys.sampling_weights == SamplingWeights.EXAMPLES else {}
    called = set(drawn) | set(resting[: max(0, keys.quorum - len(drawn))])
    return Participants([node for node in order if node in called], min(wanted, len(called)), inclusion)


def sampling_sizes(
    sessions: Mapping[int, NodeSession], server_round: int, keys: Participation
) -> dict[int, float] | None:
    """Quantity that the probability of each node to be asked is proportional to; None: all have the same.

    Args:
        sessions: nodes to draw from, not empty unless uniform.
        server_round: number of the round, from 1.
        keys: names the quantity.
    """
    if keys.sampling_weights == SamplingWeights.STALENESS:
        # A node that is asked again in the same round has not become stale.
        return {node: max(1, server_round - each.asked_round) for node, each in sessions.items()}
    if keys.sampling_weights == SamplingWeights.EXAMPLES:
        known = [each.examples for each in sessions.values() if each.examples]
        typical = statistics.mean(capped(known, keys.weight_cap)) if known else 1.0
        claimed = [each.examples or typical for each in sessions.values()]
        return dict(zip(sessions, capped(claimed, keys.weight_cap), strict=True))
    return None


def _index(session: NodeSession) -> float:
    return math.inf if session.partition is None else session.partition
