from __future__ import annotations

import json
import math

import pytest

from models.runtime.perplexity import LossSum
from server.state.best_round import BestRound


def best_of(losses: list[float | None]) -> BestRound:
    """Best of models with these losses, from round 0; a loss of None: no held-out text."""
    best = BestRound()
    for server_round, loss in enumerate(losses):
        held_out = LossSum() if loss is None else LossSum(loss * 8, 8)
        best.after(held_out, server_round=server_round, version=server_round, copy_hash=f"hash{server_round}")
    return best


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 2.0, 2.5, 2.25], 1),
        ([3.0, 2.0, 2.0, 2.0], 1),  # of equal ones the first
        ([3.0, None, 2.5], 2),
        ([2.0, 2.5, 3.0], 0),
        ([None, 9.0], 1),
    ],
)
def test_the_lowest_loss_wins(losses, expected):
    best = best_of(losses)
    assert best == BestRound(losses[expected], expected, expected, f"hash{expected}")
    entry = {"round": expected, "perplexity": pytest.approx(math.exp(losses[expected])), "out": "/x"}
    assert best.entry("/x") == entry


def test_without_held_out_text_no_round_is_best():
    assert best_of([None, None]) == BestRound() and BestRound().entry("") is None


@pytest.mark.parametrize("best", [BestRound(), BestRound(0.1 + 0.2, 7, 6, "ab")])
def test_it_survives_json(best):
    assert BestRound.from_json(json.loads(json.dumps(best.to_json(), allow_nan=False))) == best


def test_states_written_before_there_was_one_know_none():
    assert BestRound.from_json({}) == BestRound()
