"""Steps that the asked clients of a run lack, from the rules by which the server draws clients, without training."""

from __future__ import annotations

from statistics import fmean

import numpy as np

from benchmarks.scale.apps.faults import faulty_count
from configs.run_views import Participation
from server.rounds.participants import choose_participants
from server.state.node_session import NodeSession

_DRAWS = 20  # orders of node ids, which are random in a run


def missing_steps(clients: int, rounds: int, keys: Participation, *, seed: int = 0) -> float:
    """Mean steps that an asked client lacks, over the rounds from the second on and orders of node ids.

    A client whose answer is late or an error keeps the version that the server recorded before.

    Args:
        clients: N.
        rounds: server rounds.
        keys: share of the clients that is asked.
        seed: seed of the run.
    """
    orders = np.random.default_rng(0)
    return fmean(_of_one_run(orders.permutation(clients), rounds, keys, seed) for _ in range(_DRAWS))


def _of_one_run(partitions: np.ndarray, rounds: int, keys: Participation, seed: int) -> float:
    """Mean over the requests of one run; ``partitions`` holds the client index of each node."""
    sessions = {node: NodeSession() for node in range(len(partitions))}
    missing: list[int] = []
    for server_round in range(1, rounds + 1):
        asked = choose_participants(sessions, server_round, keys, seed=seed).asked
        if server_round > 1:
            missing += [server_round - 1 - sessions[node].held_version for node in asked]
        each = faulty_count(len(asked))
        # In the first round no client is faulty, but as many are too late.
        late = each if server_round > 1 else 2 * each
        for place, node in enumerate(asked):
            used = place < len(asked) - 2 * each
            sessions[node].heard(place < len(asked) - late, server_round)
            if used:
                sessions[node].held_version = server_round - 1
                sessions[node].accept(int(partitions[node]), server_round)
    return fmean(missing)
