from __future__ import annotations

import pytest

from models.runtime.perplexity import LossSum
from server.state.early_stop import EarlyStop


def stops(losses: list[float | None], *, rounds: int, delta: float = 0.0, target: float = 0.0) -> int | None:
    """Return the round, from 1, after which a run with these losses ends, or None; a loss of None: no held-out text."""
    watch = EarlyStop()
    for server_round, loss in enumerate(losses, start=1):
        held_out = LossSum() if loss is None else LossSum(loss * 8, 8)
        if watch.after(held_out, rounds=rounds, delta=delta, target=target) is not None:
            return server_round
    return None


@pytest.mark.parametrize(
    ("losses", "rounds", "delta", "expected"),
    [
        ([3.0, 3.0, 3.0, 3.0], 0, 0.0, None),
        ([3.0, 3.0], 1, 0.0, 2),
        ([3.0, 2.0, 2.0, 2.5, 2.0], 3, 0.0, 5),
        ([3.0, 2.9, 2.8, 2.7], 1, 0.0, None),
        ([3.0, 3.5, 2.9, 3.5, 2.8, 3.5], 2, 0.0, None),
        ([3.0, 2.75, 2.5], 1, 0.25, 2),  # a fall of exactly delta is none
        ([3.0, 2.75, 2.25, 2.0], 2, 0.25, None),  # the fall counts from the best so far
        ([3.0, 2.8, 2.6, 2.4], 1, 0.25, 2),
        ([None, None, None], 1, 0.0, None),
        ([3.0, None, 3.0, None, 3.0], 2, 0.0, 5),
        ([1.0], 1, 0.0, None),
    ],
)
def test_a_run_ends_after_so_many_rounds_without_a_better_loss(losses, rounds, delta, expected):
    assert stops(losses, rounds=rounds, delta=delta) == expected


@pytest.mark.parametrize(
    ("losses", "rounds", "target", "expected"),
    [
        ([3.0, 2.5, 2.0], 0, 2.5, 2),  # at most the target, without any number of rounds
        ([3.0, 2.5, 2.0], 0, 2.25, 3),
        ([3.0, 2.5, 2.0], 0, 0.0, None),
        ([None, 3.0, 3.0], 1, 2.0, 3),  # whichever is first
        ([None, 1.0], 1, 2.0, 2),
    ],
)
def test_a_run_ends_at_its_target_loss(losses, rounds, target, expected):
    assert stops(losses, rounds=rounds, target=target) == expected


def test_the_reason_of_a_target_holds_the_figures():
    reason = EarlyStop().after(LossSum(19.0, 10), rounds=0, delta=0.0, target=2.25)
    assert reason == "the held-out loss of 1.9000 nats per token is at most early-stop-loss 2.25"


def test_the_reason_holds_the_figures():
    watch = EarlyStop()
    assert watch.after(LossSum(20.0, 10), rounds=1, delta=0.5) is None
    reason = watch.after(LossSum(18.0, 10), rounds=1, delta=0.5)
    assert reason == "the held-out loss did not fall by more than 0.5 below 2.0000 nats per token in 1 rounds"
