"""Expected missing steps and budgets of the asked clients, from the server's rules of the draw, without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from benchmarks.scale.apps.faults import faulty_count
from configs.run_views import Participation
from server.rounds.participants import choose_participants
from server.state.node_session import NodeSession

RESIDUAL_DECAY = 0.5  # default of ``residual-decay``
_DRAWS = 20  # orders of node ids, which are random in a run


class Expected(NamedTuple):
    """Means over the rounds from the second on.

    Attributes:
        missing_steps: steps that an asked client lacks, without that of the first round.
        missing_first: steps of the first round, which are smaller, that an asked client lacks.
        budget: experts per layer of a client whose update is used.
        fresh: mean over used updates, weighted by the budgets, of ``RESIDUAL_DECAY`` to the power of the client's
            earlier ones.
    """

    missing_steps: float
    missing_first: float
    budget: float
    fresh: float


def expected_rounds(budgets: Sequence[int], rounds: int, keys: Participation, *, seed: int = 0) -> Expected:
    """Draw the clients of all rounds as the server does, for several orders of node ids.

    A client whose answer is late or an error keeps the version that the server recorded before.

    Args:
        budgets: experts per layer that each client holds.
        rounds: server rounds.
        keys: share of the clients that is asked.
        seed: seed of the run.
    """
    orders = np.random.default_rng(0)
    runs = [_one_run(orders.permutation(len(budgets)), budgets, rounds, keys, seed) for _ in range(_DRAWS)]
    return Expected(*(fmean(values) for values in zip(*runs, strict=True)))


def _one_run(
    partitions: np.ndarray, budgets: Sequence[int], rounds: int, keys: Participation, seed: int
) -> Expected:
    """Means of one run; ``partitions`` holds the client index of each node."""
    sessions = {node: NodeSession() for node in range(len(partitions))}
    earlier = Counter[int]()
    versions: list[int] = []
    missing: list[int] = []
    held: list[int] = []
    fresh: list[float] = []
    for server_round in range(1, rounds + 1):
        asked = choose_participants(sessions, server_round, keys, seed=seed).asked
        each = faulty_count(len(asked))
        used = asked[: len(asked) - 2 * each]
        # In the first round no client is faulty, but as many are too late.
        silent = asked[len(asked) - (each if server_round > 1 else 2 * each) :]
        if server_round > 1:
            versions += [sessions[node].held_version for node in asked]
            missing += [server_round - 1 - max(1, sessions[node].held_version) for node in asked]
            held += [budgets[partitions[node]] for node in used]
            fresh += [RESIDUAL_DECAY ** earlier[node] for node in used]
        earlier.update(used)
        for node in asked:
            sessions[node].heard(node not in silent, server_round)
        for node in used:
            sessions[node].held_version = server_round - 1
            sessions[node].accept(int(partitions[node]), server_round)
    first = sum(version == 0 for version in versions) / len(versions)
    return Expected(fmean(missing), first, fmean(held), fmean(fresh, held))
