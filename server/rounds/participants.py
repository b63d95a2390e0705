"""Choice of the nodes that are asked in a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from configs.run_views import Participation
from server.state.node_session import NodeSession


@dataclass(frozen=True)
class Participants:
    """Nodes of a round.

    Attributes:
        asked: node ids, in order of the clients' indices.
        enough: replies with which the round goes on; the others are not waited for.
    """

    asked: list[int]
    enough: int


def choose_participants(
    sessions: Mapping[int, NodeSession],
    server_round: int,
    keys: Participation,
    *,
    seed: int,
    attempt: int = 0,
) -> Participants:
    """Draw the nodes of a round without replacement, each with the same probability.

    Nodes that did not answer the last times they were asked rest for a growing number of rounds (see
    ``NodeSession.silence``) and are asked only where the others are fewer than ``min-clients``.

    Args:
        sessions: connected nodes.
        server_round: number of the round, from 1.
        keys: share of the nodes, least number of replies and over-provisioning.
        seed: seed of the run.
        attempt: exchanges of this round so far, each with another draw.
    """
    wanted = max(1, min(len(sessions), max(keys.min_clients, math.ceil(keys.fraction_train * len(sessions)))))
    asked = min(len(sessions), math.ceil(wanted * keys.over_provision))
    # Node ids are random, client indices are not: a run is repeated with the same clients.
    order = sorted(sessions, key=lambda node: (_index(sessions[node]), node))
    awake = [node for node in order if sessions[node].rests_until <= server_round]
    resting = [node for node in order if sessions[node].rests_until > server_round]
    generator = np.random.default_rng([seed, server_round, attempt])
    drawn = {awake[index] for index in generator.permutation(len(awake))[:asked]}
    drawn |= set(resting[: max(0, keys.quorum - len(drawn))])
    return Participants([node for node in order if node in drawn], min(wanted, len(drawn)))


def _index(session: NodeSession) -> float:
    return math.inf if session.partition is None else session.partition
